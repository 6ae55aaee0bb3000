"""compute-sanitizer itself: where it is, how it is called, what its log says."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

NAME = "compute-sanitizer"
TOOLS: Mapping[str, str] = {
    "memcheck": "loads and stores outside what was allocated, and misaligned ones",
    "initcheck": "loads from device memory that nothing has written",
    "racecheck": "threads of a block that touch the same shared memory in no order",
    "synccheck": "barriers that not all threads of a block come to",
}
"""Its tools, and what each finds."""
ROOTS = ("CUDA_HOME", "CUDA_PATH")
ERRORS = 87
"""The exit status that it is asked to end with where it found anything; no status of ours."""
MOST_ERRORS = 20
"""Findings of one case that are told; the rest are counted."""

# How `conformance.sanitizer.one` ends, beside 0.
REFUSED, RAISED, UNAVAILABLE = 3, 4, 5

_SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+) (?:errors?|hazards?)")
_LINE = re.compile(r"^=+ ?(?P<text>.*)$")
_KERNEL = re.compile(r"\bat (?P<kernel>[^\s(]+?)(?:\(.*\))?(?:\+0x[0-9a-f]+)?(?: in (?P<where>\S+))?$")
_NOISE = (
    "Program hit",
    "Target application",
    "COMPUTE-SANITIZER",
    "ERROR SUMMARY",
    "RACECHECK SUMMARY",
    "LEAK SUMMARY",
    "Saved host backtrace",
)


class SanitizerMissing(RuntimeError):
    """There is no compute-sanitizer here; the text says where it was looked for."""


@dataclass(frozen=True)
class Found:
    """What a log says: how many errors (None: it has no summary, so the tool did not come to its end), and the first
    few, each in a line."""

    errors: int | None
    findings: tuple[str, ...]


def located(environment: Mapping[str, str] | None = None) -> str:
    """The program's path.

    Raises:
        SanitizerMissing: it is neither on the path nor in a CUDA toolkit that is named by a variable.
    """
    given = os.environ if environment is None else environment
    found = shutil.which(NAME, path=given.get("PATH", ""))
    if found:
        return found
    for root in filter(None, map(given.get, ROOTS)):
        for folder in ("bin", "compute-sanitizer"):
            path = Path(root, folder, NAME)
            if os.access(path, os.X_OK) and path.is_file():
                return str(path)
    raise SanitizerMissing(
        f"{NAME} is neither on PATH nor below {' or '.join(ROOTS)}: it comes with the CUDA toolkit; install that, or "
        "put its folder on PATH"
    )


def command_for(program: str, tool: str, log: Path, command: Sequence[str]) -> list[str]:
    """The command line that runs `command` under a tool, with what is found written to `log`."""
    options = {
        "--tool": tool,
        "--log-file": str(log),
        "--error-exitcode": str(ERRORS),
        "--print-limit": str(MOST_ERRORS),
        "--target-processes": "application-only",  # not the assembler that Triton starts
    }
    return [program, *(part for pair in options.items() for part in pair), *command]


def read_log(text: str) -> Found:
    """What a tool wrote: each finding is a block of lines, its first line says what, the next ones where."""
    summary = _SUMMARY.search(text)
    findings: list[str] = []
    block: list[str] = []
    for line in [*text.splitlines(), "========="]:
        match = _LINE.match(line)
        content = match["text"] if match else ""
        if content.strip():
            block.append(content)
            continue
        told = _told(block)
        if told:
            findings.append(told)
        block = []
    return Found(int(summary[1]) if summary else None, tuple(dict.fromkeys(findings)))


def _told(block: Sequence[str]) -> str:
    """One finding in a line: what, and the kernel; "" where the block is none."""
    lines = [line.strip() for line in block]
    if not lines or any(lines[0].startswith(noise) for noise in _NOISE):
        return ""
    kernels = (match for match in map(_KERNEL.search, lines[1:]) if match)
    kernel = next(kernels, None)
    if kernel is None:
        return lines[0]
    return f"{lines[0]} in {kernel['kernel']}{' at ' + kernel['where'] if kernel['where'] else ''}"
