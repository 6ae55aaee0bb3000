"""Reports in files, gzipped where the name ends in .gz: a tenth of the size, to keep in a repository."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

from conformance.untrusted import MOST_UNPACKED, Malformed

MOST_BYTES = MOST_UNPACKED
"""Of a text once it is unpacked; a report at level certify has some millions."""


def read_bytes(path: Path) -> bytes:
    """
    Raises:
        OSError: as reading raises it.
        conformance.untrusted.Malformed: (a ValueError) no gzip though it is named so, cut off, or longer than
            MOST_BYTES.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            text = file.read(MOST_BYTES + 1)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise Malformed(f"{path.name} is no whole gzip file ({error}): pack it again, or give it plain") from None
    if len(text) > MOST_BYTES:
        raise Malformed(f"{path.name} holds more than {MOST_BYTES >> 20} MiB: that is no report")
    return text


def read_text(path: Path) -> str:
    """As `read_bytes`, which is UTF-8.

    Raises:
        OSError, Malformed: as `read_bytes`; other bytes than UTF-8.
    """
    try:
        return read_bytes(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise Malformed(f"{path.name}: no text in UTF-8 ({error})") from None


def content_of(path: Path, text: str) -> bytes:
    """What a file of this name has for a text; the same text gives the same bytes."""
    content = text.encode("utf-8")
    return gzip.compress(content, mtime=0) if path.suffix == ".gz" else content
