"""Files that commands write: asked about before any work, and there as a whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from fp8moe.commands.question import BadInput


def check_folders(paths: Mapping[str, Path]) -> None:
    """
    Args:
        paths: by the option that gives each.

    Raises:
        BadInput: one cannot be written.
    """
    for option, path in paths.items():
        if not path.absolute().parent.is_dir():
            raise BadInput(f"{option} {path}: the folder does not exist; make it first")
        if path.is_dir():
            raise BadInput(f"{option} {path}: it is a folder; name a file")
        if not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
            raise BadInput(f"{option} {path}: it cannot be written; name a file that can")


def write_whole(path: Path, text: str) -> None:
    """All of it, or nothing: a reader never meets half a file."""
    with beside(path) as made:
        made.write_text(text, encoding="utf-8")


@contextmanager
def beside(path: Path) -> Iterator[Path]:
    """A place in the same folder to write to; it becomes `path` at the end, and nothing is left where that is not
    reached."""
    made = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        yield made
        made.replace(path)
    finally:
        made.unlink(missing_ok=True)
