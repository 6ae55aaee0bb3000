"""What Linux tells of processes, and the few things that only its own calls can do: /proc, prctl, pidfd."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_PAGE = os.sysconf("SC_PAGE_SIZE")
PROC = Path("/proc")


def die_with_parent() -> None:
    """SIGKILL to this process when its parent ends, however that ends."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def adopt_orphans() -> None:
    """Descendants whose parent ends become children of this process, also those in a session of their own."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"prctl({option}): {os.strerror(code)}")


def opened(pid: int) -> int | None:
    """A descriptor that becomes readable when the process ends; None where the kernel has none (before Linux 5.3)."""
    try:
        return os.pidfd_open(pid)
    except OSError:
        return None


def children(pid: int) -> list[int]:
    """Child processes, those that have ended and were not waited for among them."""
    found: list[int] = []
    try:
        for task in os.listdir(PROC / str(pid) / "task"):
            found += map(int, (PROC / str(pid) / "task" / task / "children").read_text().split())
    except (FileNotFoundError, ProcessLookupError):
        # A kernel without CONFIG_PROC_CHILDREN, or a thread or the process itself that has just ended.
        return _children_by_parent(pid)
    return found


def _children_by_parent(pid: int) -> list[int]:
    return [int(name) for name in os.listdir(PROC) if name.isdigit() and parent(int(name)) == pid]


def descendants(pid: int) -> list[int]:
    """Children, theirs, and so on."""
    found: list[int] = []
    pending = children(pid)
    while pending:
        found += pending
        pending = [grandchild for child in pending for grandchild in children(child)]
    return found


def state(pid: int) -> str:
    """The letter of its state, "Z" where it has ended and was not waited for; "" where there is none."""
    fields = _stat(pid)
    return fields[0] if fields else ""


def parent(pid: int) -> int:
    """Its parent's pid; 0 where there is none."""
    fields = _stat(pid)
    return int(fields[1]) if fields else 0


def is_living(pid: int) -> bool:
    return state(pid) not in ("", "Z", "X")


def _stat(pid: int) -> list[str]:
    try:
        text = (PROC / str(pid) / "stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return []
    return text.rpartition(")")[2].split()  # the name in brackets before it may hold anything


def command(pid: int) -> str:
    """Its command line; "" where there is none."""
    try:
        return (PROC / str(pid) / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def resident_bytes(pid: int) -> int:
    """Host memory that it occupies; 0 where there is no such process."""
    try:
        return int((PROC / str(pid) / "statm").read_text().split()[1]) * _PAGE
    except (FileNotFoundError, ProcessLookupError, IndexError):
        return 0


def kill(pid: int, number: int = signal.SIGKILL) -> None:
    """A signal to one process; nothing where it has ended."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)


def kill_group(leader: int) -> None:
    """SIGKILL to every process of a group; nothing where it has none left."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, signal.SIGKILL)
