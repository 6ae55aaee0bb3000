"""Times taken in other processes: two checkouts that take turns on the device, or a record in a fresh process."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from conformance.gate.record import Record
from conformance.gate.samples import Samples
from conformance.timing import worker
from conformance.timing.recorded import HERE, Planted
from conformance.timing.state import Watch, opened_here

MOST_KEPT = 4
"""Cells that stay in memory: the screen goes from cell to cell, the looks come back to few."""
WARM = 2
SECONDS = 300.0
"""For one answer: kernels may have to be compiled."""
RECORD_SECONDS = 1800.0
"""For a record of all cells."""
MOST_BYTES, AT_ONCE = 1 << 26, 1 << 16
"""Of an answer; and read at a time."""
CLOCK = time.monotonic


class WorkerFailed(RuntimeError):
    """A version's process ended, or answered with an error; the text says which version and what."""


class Version:
    """One checkout's process.

    Args:
        name: in messages, such as "A".
        checkout: a folder with `fp8moe/` and `conformance/`.
        seconds: until it must be there; None: `SECONDS`.

    Raises:
        WorkerFailed: it is no checkout that can be timed, or its protocol is another.
    """

    def __init__(self, name: str, checkout: Path, seconds: float | None = None) -> None:
        self.name, self.checkout = name, checkout.resolve()
        if not (self.checkout / "conformance" / "timing" / "worker.py").is_file():
            raise WorkerFailed(f"{checkout}: no conformance/timing/worker.py: expected a checkout of this project")
        entries = [os.path.abspath(entry) for entry in sys.path]  # "" is the folder that this process is in
        elsewhere = [entry for entry in entries if not (Path(entry) / "conformance").is_dir()]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(self.checkout), *elsewhere])}
        self._process = subprocess.Popen(
            [sys.executable, "-m", worker.__name__],
            cwd=self.checkout,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self._unread = bytearray()
        try:
            self.told = self.ask("hello", seconds)
            if self.told["protocol"] != worker.PROTOCOL:
                other = self.told["protocol"]
                raise WorkerFailed(f"{name}: {checkout} times by protocol {other}, not {worker.PROTOCOL}")
        except BaseException:
            self.close()
            raise

    @classmethod
    def pair(cls, a: Path, b: Path) -> tuple[Version, Version]:
        """Versions A and B; where B cannot be had, A is closed.

        Raises:
            WorkerFailed: as the class.
        """
        first = cls("A", a)
        try:
            return first, cls("B", b)
        except BaseException:
            first.close()
            raise

    def ask(self, verb: str, seconds: float | None = None, **given: Any) -> dict[str, Any]:
        """One answer, within so many seconds; None: `SECONDS`.

        Raises:
            WorkerFailed: an error, or none.
        """
        assert self._process.stdin is not None
        seconds = SECONDS if seconds is None else seconds
        try:
            self._process.stdin.write(json.dumps({"verb": verb, **given}).encode() + b"\n")
            self._process.stdin.flush()
            line = self._line(seconds)
        except BrokenPipeError:
            line = ""
        if line is None:
            self._process.kill()
            raise WorkerFailed(f"{self.name}: no answer to {verb!r} within {seconds:g} s: {given.get('cell', '')}")
        if not line:
            raise WorkerFailed(f"{self.name}: its process ended with status {self._process.wait()}")
        try:
            answer = json.loads(line)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise WorkerFailed(f"{self.name}: its answer to {verb!r} is no object of JSON: {line.strip()[:200]!r}")
        if "error" in answer:
            raise WorkerFailed(f"{self.name}: {answer['error']}")
        return answer

    def _line(self, seconds: float) -> str | None:
        """The next whole one; "" where the process ended before it did, or wrote `MOST_BYTES` without an end; None
        where the time was over."""
        assert self._process.stdout is not None
        descriptor, deadline, searched = self._process.stdout.fileno(), CLOCK() + seconds, 0
        while (end := self._unread.find(b"\n", searched)) < 0:
            searched = len(self._unread)
            if searched > MOST_BYTES:
                self._process.kill()
                return ""
            if not select.select([descriptor], [], [], max(deadline - CLOCK(), 0.0))[0]:
                return None
            read = os.read(descriptor, AT_ONCE)
            if not read:
                return ""
            self._unread += read
        line = self._unread[:end].decode(errors="replace")
        del self._unread[: end + 1]
        return line or " "  # an empty line is no end

    def close(self) -> None:
        with suppress(BrokenPipeError):
            if self._process.stdin is not None:
                self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def record_apart(cells: Sequence[str], planted: Planted | None = None) -> tuple[Record, dict[str, str]]:
    """As `conformance.timing.recorded.recorded`, in a fresh process: a later run will be in another one, too.

    Raises:
        WorkerFailed: a cell cannot be timed.
    """
    version = Version("the process that times", HERE)
    try:
        given = {"cells": list(cells), "planted": dict(planted or {}), "ours": 1 + opened_here()}
        answer = version.ask("record", RECORD_SECONDS, **given)
    finally:
        version.close()
    return Record.from_json(json.dumps(answer["record"])), answer["state"]


class TwoProcessPairs:
    """`conformance.gate.samples.PairSampler` for two checkouts; B works on A's weights and inputs, into A's output.

    Args:
        cells: by name, the cell's name in each version: they differ where two backends are compared.
        versions: A and B; closed with this.
        watch: entered by the caller, with two processes of ours.
        planted: cells that are slower in B on purpose.
    """

    processes = 2

    def __init__(
        self,
        cells: Mapping[str, tuple[str, str]],
        versions: tuple[Version, Version],
        watch: Watch,
        planted: Planted | None = None,
    ) -> None:
        self.cells, self.versions, self.watch = cells, versions, watch
        self.planted = planted or {}
        self._made: list[str] = []

    def __enter__(self) -> TwoProcessPairs:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for version in reversed(self.versions):  # B reads A's memory
            version.close()

    def pairs(self, cell: str, count: int) -> Samples:
        names = self.cells[cell]
        self._make(cell)
        spent = 0.0
        for number in range(WARM):
            spent += sum(self._replay(side, names[side], number)[0] for side in (0, 1))
        times: tuple[list[float], list[float]] = ([], [])
        flags = []
        for number in range(count):
            flag = 0
            for side in (0, 1) if number % 2 == 0 else (1, 0):
                us, seen = self._replay(side, names[side], number)
                times[side].append(us)
                flag |= seen
            flags.append(flag)
        # Each replay is launched once more before it, untimed.
        overhead = 2 * spent + sum(times[0]) + sum(times[1])
        return Samples(np.array(times[0]), np.array(times[1]), np.array(flags, dtype=np.uint8), overhead)

    def _make(self, cell: str) -> None:
        """Unless both have it; the one that was asked for least lately makes room."""
        if cell in self._made:
            self._made.remove(cell)
        else:
            while len(self._made) >= MOST_KEPT:
                self._drop(self._made.pop(0))
            a, b = self.versions
            calls, more = self.planted.get(cell, (None, 0))
            made = a.ask("make", cell=self.cells[cell][0], count=calls, more=0, given=None)
            count, given = made["count"], made["given"]
            other = b.ask("make", cell=self.cells[cell][1], count=count, more=more, given=given)
            if made["method"] != other["method"]:
                raise WorkerFailed(
                    f"{cell}: A makes {made['method']}, B {other['method']}: such times are not compared"
                )
        self._made.append(cell)

    def _drop(self, cell: str) -> None:
        for side in (1, 0):  # B first, which reads A's memory
            self.versions[side].ask("drop", cell=self.cells[cell][side])

    def _replay(self, side: int, name: str, turn: int) -> tuple[float, int]:
        answer = self.versions[side].ask("replay", cell=name, turn=turn)
        (us,), ((begin, end),) = answer["us"], answer["at"]
        return us, self.watch.flags(begin, end)
