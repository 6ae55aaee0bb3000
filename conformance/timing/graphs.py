"""Many calls in one graph: one number for all of them, so that a launch is not what is timed.

Why not NVBench for Python (cuda-bench): it times one callable until its own noise is small, cold, and knows throttling;
but it cannot make two versions take turns, which is what tells 2% from a moving clock (a sample of an 11 us GEMM has 4%
noise there, measured on one H100, 2026-11-24), and it is for CUDA alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from conformance.capture import capturing, uncollected

WARM_UP = 3
Call = Callable[[], object]


class CaptureFailed(Exception):
    """A call cannot be captured; the text says what it raised."""


class Unrolled:
    """Calls, one after the other, as graphs that are launched one after the other.

    Where intermediate results lie in memory makes equal graphs differ steadily, by 0.35 to 0.6% (standard deviation,
    four cases on one H200, 2026-11-29; weights, inputs and output elsewhere: by less than 0.2%). So they lie in several
    places, each with calls of its own; where there are more places than calls, launches take turns among them.

    Args:
        calls: gone through in turn, so that inputs rotate; each launches its work and waits for nothing.
        count: of the calls in a launch.
        capture: as CUDA graphs; without, a loop of eager calls.
        beside: in whose places this one's intermediate results go, where both are captured.
        more: calls that `count` does not tell, to be slower on purpose.
        places: for intermediate results; those of `beside` where that is given.

    Raises:
        CaptureFailed: one of them cannot be captured.
    """

    def __init__(
        self,
        calls: Sequence[Call],
        count: int,
        *,
        capture: bool = True,
        beside: Unrolled | None = None,
        more: int = 0,
        places: int = 1,
    ) -> None:
        for _ in range(WARM_UP):
            for call in calls:
                call()
        torch.cuda.synchronize()
        self.count, self.calls = count, calls  # a graph does not keep the memory that it reads
        self.output: Tensor | None = None  # what all calls write to, for whoever made them
        self.graphs: list[list[torch.cuda.CUDAGraph]] = []
        self.method = f"{count} eager calls"
        self._all = range(count + more)
        self.places: int = places if beside is None else beside.places
        if capture:
            self._capture(beside)
            self.method = f"{count} calls in {len(self.graphs)} x {len(self.graphs[0])} graphs"

    def _capture(self, beside: Unrolled | None) -> None:
        parts = min(self.places, self.count)
        ends = [len(self._all) * part // parts for part in range(parts + 1)]
        with uncollected():
            for turn in range(self.places // parts):
                row: list[torch.cuda.CUDAGraph] = []
                for part, numbers in enumerate(map(range, ends, ends[1:])):
                    there = None
                    if beside is not None and beside.graphs:
                        others = beside.graphs[turn % len(beside.graphs)]
                        there = others[part % len(others)]
                    row.append(captured(partial(self._call, numbers), there))
                self.graphs.append(row)

    def _call(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            self.calls[number % len(self.calls)]()

    def launch(self, turn: int = 0) -> None:
        """All calls, once.

        Args:
            turn: for the places; equal turns of two that share them are at the same ones.
        """
        if not self.graphs:
            self._call(self._all)
            return
        for graph in self.graphs[turn % len(self.graphs)]:
            graph.replay()


def captured(call: Call, beside: torch.cuda.CUDAGraph | None = None) -> torch.cuda.CUDAGraph:
    """A graph of what `call` launches; in the memory of `beside`, if that is given.

    Raises:
        CaptureFailed: it raised under capture.
    """
    try:
        with capturing(beside) as graph:
            call()
    except torch.OutOfMemoryError:
        raise
    except (Exception, SystemExit) as error:
        cause = error.__context__ or error  # leaving a capture that went wrong raises once more
        raise CaptureFailed(f"{type(cause).__name__}: {(str(cause).strip().splitlines() or ['no text'])[0]}") from error
    return graph


@dataclass(frozen=True)
class Replay:
    """One replay of a graph.

    Args:
        us: microseconds of the device.
        begin, end: `time.monotonic()`.
    """

    us: float
    begin: float
    end: float


def replays(sequence: Sequence[Unrolled], turn: int = 0) -> list[Replay]:
    """Each graph once, in this order, all launched before the first has ended, so that the device waits for no launch.

    The first is launched once more before that, untimed: it hides its own launch, and wakes the clocks.

    Args:
        turn: of the first launch of each; those after it are at the next ones.
    """
    sequence[0].launch(turn)
    events = [_event()]
    events[0].record()
    turns: dict[int, int] = {}
    for graph in sequence:
        now = turns[id(graph)] = turns.get(id(graph), turn - 1) + 1
        graph.launch(now)
        event = _event()
        event.record()
        events.append(event)
    torch.cuda.synchronize()
    ended = time.monotonic()
    us = [float(first.elapsed_time(then)) * 1e3 for first, then in pairwise(events)]
    until_end = [sum(us[number:]) / 1e6 for number in range(len(us) + 1)]
    return [Replay(us[n], ended - until_end[n], ended - until_end[n + 1]) for n in range(len(us))]


def _event() -> Any:
    event: Callable[..., Any] = torch.cuda.Event
    return event(enable_timing=True)
