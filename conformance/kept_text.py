"""Reports in files, gzipped where the name ends in .gz: a tenth of the size, to keep in a repository."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

MOST_BYTES = 1 << 28
"""Of a text once it is unpacked; a report at level certify has some millions."""


def read_bytes(path: Path) -> bytes:
    """
    Raises:
        OSError: as reading raises it.
        ValueError: no gzip though it is named so, cut off, or longer than MOST_BYTES.
    """
    if path.suffix != ".gz":
        return path.read_bytes()
    try:
        with gzip.open(path) as packed:
            text = packed.read(MOST_BYTES + 1)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path.name} is no whole gzip file ({error}): pack it again, or give it plain") from None
    if len(text) > MOST_BYTES:
        raise ValueError(f"{path.name} holds more than {MOST_BYTES >> 20} MiB: that is no report")
    return text


def read_text(path: Path) -> str:
    """As `read_bytes`, which is UTF-8.

    Raises:
        OSError, ValueError: as `read_bytes`; other bytes than UTF-8.
    """
    return read_bytes(path).decode("utf-8")


def write_text(path: Path, text: str) -> None:
    """The same text gives the same bytes."""
    content = text.encode("utf-8")
    path.write_bytes(gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)
