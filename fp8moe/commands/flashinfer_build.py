"""Building FlashInfer's CUTLASS module: how much memory and time that takes, and the build, by FlashInfer itself."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any

from fp8moe.backends.flashinfer_modules import FlashInferModule

UNIT_SECONDS = 110
UNIT_BYTES = 7 * 10**9
"""Of one compilation, nvcc 13.0 for SM90: about how long on one core, and the most memory; most take 5 GB or less."""
MOST_LINES = 15


class CannotBuild(RuntimeError):
    """Something is missing here, or the build failed; the text has one line for each thing, with its remedy."""


@dataclass(frozen=True)
class Machine:
    """What a build has here: cores, bytes of memory that are free, the environment."""

    cores: int
    memory: int
    env: Mapping[str, str] = field(default_factory=lambda: os.environ)

    @classmethod
    def here(cls) -> Machine:
        """With ninja to be found where pip puts it, beside the interpreter."""
        path = os.pathsep.join(filter(None, (os.environ.get("PATH"), interpreter_folder())))
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return cls(cores, free_memory(), {**os.environ, "PATH": path})

    def jobs(self, asked: int | None) -> int:
        """As many compilations at a time as there are cores and memory for.

        Raises:
            CannotBuild: there is no memory for one, or for as many as were asked for.
        """
        fit = self.memory // UNIT_BYTES
        if fit >= (asked or 1):
            return asked or min(self.cores, fit)
        wanted = f"--jobs {asked}" if asked else "one compilation"
        fewer = f"give --jobs {fit}, or " if fit else "build on another machine of this kind, or "
        raise CannotBuild(
            f"memory: {wanted} may take {gb((asked or 1) * UNIT_BYTES)}, and {gb(self.memory)} are free; {fewer}end "
            "what takes the rest"
        )


def interpreter_folder() -> str:
    return str(Path(sys.executable).parent)


def free_memory(proc: Path = Path("/proc/meminfo"), groups: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that may be taken: those that are free, and no more than the control group's limit."""
    found = re.search(r"^MemAvailable:\s*(\d+) kB", proc.read_text(), re.MULTILINE) if proc.is_file() else None
    limits = [int(found[1]) * 1024] if found else []
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        limit = groups / name
        if limit.is_file() and limit.read_text().strip().isdigit():
            limits.append(int(limit.read_text()))
    return min(limits, default=UNIT_BYTES)


def gb(size: float) -> str:
    return f"{size / 1e9:.0f} GB"


def clock(seconds: float) -> str:
    """A duration as one would say it."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


@dataclass(frozen=True)
class Estimate:
    """Of a build before it starts."""

    steps: int
    jobs: int

    @property
    def seconds(self) -> float:
        return self.steps * UNIT_SECONDS / self.jobs

    def __str__(self) -> str:
        return (
            f"{self.steps} steps at about {UNIT_SECONDS} s of one core and up to {gb(UNIT_BYTES)} each: with "
            f"{self.jobs} at a time about {clock(self.seconds)} and up to {gb(self.jobs * UNIT_BYTES)} of memory"
        )


@dataclass
class Progress:
    """What ninja's output comes to: steps done of all, the lines about a failure, and the last ones."""

    estimate: Estimate
    start: float
    done: int = 0
    total: int = 0
    failure: list[str] = field(default_factory=list)
    last: deque[str] = field(default_factory=lambda: deque(maxlen=MOST_LINES))

    def line(self, text: str, now: float) -> str:
        """What to tell about one line of output; "" for nothing."""
        step = re.match(r"\[(\d+)/(\d+)\] (.*)", text)
        if self.failure or text.startswith(("FAILED:", "ninja: error:", "ninja: fatal:")):
            self.failure.append(text.rstrip()[:300])
        self.last.append(text.rstrip()[:300])
        if step is None:
            return ""
        self.done, self.total = int(step[1]), int(step[2])
        source = re.search(r" -c (\S+)", step[3])
        name = Path(source[1]).name if source else "linking"
        taken = now - self.start
        left = (self.total - self.done) * self.step_seconds(taken)
        return f"{self.done}/{self.total} {name}: {clock(taken)} so far, about {clock(left)} left"

    def step_seconds(self, taken: float) -> float:
        """As measured so far; at first, while most of what runs has not ended, as estimated."""
        assumed = 2 * self.estimate.jobs
        return (taken + assumed * UNIT_SECONDS / self.estimate.jobs) / (self.done + assumed)


def run_builder(module: FlashInferModule, estimate: Estimate, machine: Machine, tell: Callable[[str], None]) -> float:
    """FlashInfer's own build in a child process; its duration in seconds.

    Stopped (by a signal or an exception) it ends its children, and leaves what is compiled for the next time.

    Args:
        tell: is called with a line for each step.

    Raises:
        CannotBuild: it failed.
    """
    code = f"from flashinfer.jit.fused_moe import {module.generator} as module; module().build(verbose=True)"
    path = os.pathsep.join(entry for entry in sys.path if entry)
    own = {"MAX_JOBS": str(estimate.jobs), "NINJA_STATUS": "[%f/%t] ", "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
    env = {**machine.env, **own}
    progress = Progress(estimate, time.monotonic())
    with _child([sys.executable, "-c", code], env) as child:
        for text in child.stdout:
            told = progress.line(text, time.monotonic())
            if told:
                tell(told)
        status = child.wait()
    if status:
        raise CannotBuild(_failed(status, progress, estimate.jobs))
    return time.monotonic() - progress.start


def _failed(status: int, progress: Progress, jobs: int) -> str:
    ours = list(takewhile(lambda line: not line.startswith("Traceback"), progress.failure))  # FlashInfer's own follows
    command = re.compile(r"\s*\S*(nvcc|c\+\+)\s+-")
    text = "\n".join([line for line in ours or progress.last if not command.match(line)][:MOST_LINES])
    killed = "killed" in text.lower() or "signal 9" in text
    remedy = f"a compiler was killed, most likely for want of memory: --jobs {max(1, jobs // 2)}" if killed else ""
    head = f"the build failed (status {status}) after {progress.done} of {progress.total} steps; {remedy}".rstrip("; ")
    return f"{head}\n{text}".rstrip()


@contextmanager
def _child(command: list[str], env: Mapping[str, str]) -> Iterator[Any]:
    """A process in a session of its own, which is interrupted with all of its children if it is left early."""

    def stopped(number: int, _frame: object) -> None:
        raise KeyboardInterrupt(signal.Signals(number).name)

    before = signal.signal(signal.SIGTERM, stopped)
    child = subprocess.Popen(
        command,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        yield child
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGINT)  # ninja takes away what is half written
            try:
                child.wait(timeout=30)
            except subprocess.TimeoutExpired:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
        signal.signal(signal.SIGTERM, before)
