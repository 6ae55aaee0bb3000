"""Messages over a socket: four bytes of length, then as many bytes."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator

LONGEST = 1 << 26
"""Bytes of one message; what claims to be longer is no message of ours."""
_LENGTH = struct.Struct("!I")
_AT_ONCE = 1 << 16


class NotAMessage(ValueError):
    """The bytes are none that this protocol writes."""


def framed(data: bytes) -> bytes:
    """A message as it travels."""
    return _LENGTH.pack(len(data)) + data


class Incoming:
    """Puts messages together from whatever arrives."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._buffer = bytearray()

    def receive(self) -> bool:
        """Takes what is there, waiting where the socket blocks; False at the end of the stream."""
        try:
            data = self._socket.recv(_AT_ONCE)
        except BlockingIOError:
            return True
        except ConnectionError:
            return False
        self._buffer += data
        return bool(data)

    def messages(self) -> Iterator[bytes]:
        """The messages that are whole, each once.

        Raises:
            NotAMessage: the bytes are something else.
        """
        while len(self._buffer) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer)
            if length > LONGEST:
                raise NotAMessage(f"a message of {length} bytes")
            end = _LENGTH.size + length
            if len(self._buffer) < end:
                return
            message = bytes(self._buffer[_LENGTH.size : end])
            del self._buffer[:end]
            yield message
