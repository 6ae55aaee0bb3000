"""Files that commands write: asked about before any work, there as a whole or not at all, and kept elsewhere where
their place turns out to take none."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from fp8moe.commands.question import BadInput

ONLY_IN_PLACE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EBUSY, errno.EXDEV)
"""A folder says so that takes no other file, or a file that is mounted by itself; it may still be written to."""


class NotWritten(Exception):
    """What was asked for has been done, and its file could not be written; the text says where it is instead.

    Args:
        kept: the file that has it; None where no place took it.
    """

    def __init__(self, text: str, kept: Path | None) -> None:
        super().__init__(text)
        self.kept = kept


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
        why = _why_not(path)
        if why:
            raise BadInput(f"{option} {path}: it cannot be written ({why}); name a file that can")


def _why_not(path: Path) -> str:
    """By trying it, since permissions do not tell of every place; nothing is left there."""
    if _is_written_through(path):
        return "" if os.access(path, os.W_OK) else os.strerror(errno.EACCES)
    try:
        made = _beside(path)
        made.touch()
        made.unlink()
    except OSError as error:
        in_place = error.errno in ONLY_IN_PLACE and path.is_file() and os.access(path, os.W_OK)
        return "" if in_place else error.strerror or str(error)
    except RuntimeError as error:  # links that lead to each other, before Python 3.13
        return str(error)
    return ""


def write_whole(path: Path, content: str | bytes) -> None:
    """All of it, or nothing: a reader never meets half a file.

    Raises:
        NotWritten: it cannot be written there; another place has it, if any takes it.
    """
    data = content.encode("utf-8") if isinstance(content, str) else content
    try:
        try:
            with beside(path) as made:
                made.write_bytes(data)
        except OSError as error:
            if error.errno not in ONLY_IN_PLACE or not path.is_file():
                raise
            path.write_bytes(data)
    except OSError as error:
        kept = kept_elsewhere(path.name, data)
        where = f"it is kept as {kept}: move it from there" if kept else "no other place took it either"
        raise NotWritten(f"{path}: could not be written ({error.strerror or error}); {where}", kept) from error


def write_meanwhile(path: Path, content: str | bytes) -> None:
    """As `write_whole`, of what will be written again: where that would not be there as a whole, nothing is done."""
    data = content.encode("utf-8") if isinstance(content, str) else content
    if not _is_written_through(path):
        with suppress(OSError), beside(path) as made:
            made.write_bytes(data)


def why_unread(path: Path, error: Exception) -> str:
    """Why a file could not be read, or is none of the kind, without its name."""
    if isinstance(error, FileNotFoundError):
        return "no such file"
    told = error.strerror if isinstance(error, OSError) else None
    return (told or str(error)).removeprefix(f"{path}: ")


@contextmanager
def beside(path: Path) -> Iterator[Path]:
    """A place in the same folder to write to; it becomes `path` at the end, and nothing is left where that is not
    reached. A device or a pipe is written to itself."""
    if _is_written_through(path):
        yield path
        return
    made = _beside(path)
    try:
        yield made
        made.replace(made.with_name(path.resolve().name))
    finally:
        made.unlink(missing_ok=True)


def _is_written_through(path: Path) -> bool:
    return path.exists() and not path.is_file()


def _beside(path: Path) -> Path:
    """Of a link: beside what it leads to."""
    real = path.resolve()
    if real.is_symlink():  # links that lead to each other; Python before 3.13 raises of itself
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
    return real.with_name(f"{real.name}.{os.getpid()}")


def kept_elsewhere(name: str, data: bytes) -> Path | None:
    """A new file, in the folder for temporary ones if that takes it; None where no place does."""
    for folder in (tempfile.gettempdir, Path.cwd, Path.home):
        try:
            descriptor, made = tempfile.mkstemp(prefix="fp8moe-", suffix=f"-{name}", dir=folder())
        except (OSError, RuntimeError):  # there is no such folder, or it takes no file
            continue
        try:
            with open(descriptor, "wb") as file:
                file.write(data)
            return Path(made)
        except OSError:
            Path(made).unlink(missing_ok=True)
    return None
