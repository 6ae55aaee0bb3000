"""Files that nobody vouches for: bytes, gzip and JSON, bounded in size, depth and length; whatever is wrong with one is
a `Malformed` that names the place."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

MOST_UNPACKED = 64 << 20
MOST_TEXT, MOST_DEPTH = 20_000, 12
SHOWN = 80
"""Characters of a value in an error."""


class Malformed(ValueError):
    """A file that cannot be read as what it should be; the text names the file, the place and what is expected."""


def bytes_of(path: Path, most: int, where: object = None) -> bytes:
    """
    Args:
        where: names the file in errors; None: its own name.

    Raises:
        Malformed: it cannot be read, or has more than `most` bytes.
    """
    where = path.name if where is None else where
    try:
        with path.open("rb") as file:
            content = file.read(most + 1)
    except OSError as error:
        raise Malformed(f"{where}: {error.strerror or error}") from None
    if len(content) > most:
        raise Malformed(f"{where}: more than {most >> 20} MiB: it is none of ours")
    return content


def unpacked(packed: bytes, where: str) -> bytes:
    """What a gzip file of one member holds.

    Raises:
        Malformed: it is none, cut off, followed by something, or holds more than MOST_UNPACKED.
    """
    unpack = zlib.decompressobj(wbits=31)  # gzip alone
    try:
        content = unpack.decompress(packed, MOST_UNPACKED + 1)
    except zlib.error as error:
        raise Malformed(f"{where}: no gzip file ({error})") from None
    if len(content) > MOST_UNPACKED:
        raise Malformed(f"{where}: unpacked more than {MOST_UNPACKED >> 20} MiB")
    if not unpack.eof or unpack.unused_data:
        raise Malformed(f"{where}: {'cut off' if not unpack.eof else 'something follows the end of the file'}")
    return content


def object_of(content: bytes | str, where: str, most: int = MOST_TEXT) -> dict[str, Any]:
    """As `json_of`, of a text that holds an object.

    Raises:
        Malformed: it does not.
    """
    found = json_of(content, where, most)
    if not isinstance(found, dict):
        raise Malformed(f"{where}: expected an object")
    return found


def json_of(content: bytes | str, where: str, most: int = MOST_TEXT) -> Any:
    """The value of a JSON text.

    Args:
        where: names the text in errors.
        most: characters of a text in it.

    Raises:
        Malformed: no JSON of UTF-8, a key twice in one object, NaN or an infinity, too deep, too long a text.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise Malformed(f"{where}: a key stands twice in one object")
        return found

    def no_constant(text: str) -> Any:
        raise Malformed(f"{where}: {text} is no number of JSON")

    try:
        text = content.decode("utf-8") if isinstance(content, bytes) else content
        found = json.loads(text, object_pairs_hook=once, parse_constant=no_constant)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise Malformed(f"{where}: no JSON ({error})") from None
    except (RecursionError, ValueError) as error:
        if isinstance(error, Malformed):
            raise
        raise Malformed(f"{where}: no JSON of ours ({type(error).__name__})") from None
    _bounded(found, where, MOST_DEPTH, most)
    return found


def _bounded(value: Any, where: str, depth: int, most: int) -> None:
    if isinstance(value, str) and len(value) > most:
        raise Malformed(f"{where}: a text of {len(value)} characters, more than {most}")
    if isinstance(value, (dict, list)):
        if depth == 0:
            raise Malformed(f"{where}: nested more than {MOST_DEPTH} deep")
        for each in (*value, *value.values()) if isinstance(value, dict) else value:
            _bounded(each, where, depth - 1, most)


def shown(value: object) -> str:
    """A value in an error: one short line that can be printed."""
    text = ascii(value)  # of what is bounded already
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 1]}…"
