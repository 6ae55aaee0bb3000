"""Many calls in one graph: one number for all of them, so that a launch is not what is timed.

Why not NVBench for Python (cuda-bench): it times one callable until its own noise is small, cold, and knows throttling;
but it cannot make two versions take turns, which is what tells 2% from a moving clock (a sample of an 11 us GEMM has 4%
noise there, measured on one H100, 2026-11-24), and it is for CUDA alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from conformance.capture import capturing

WARM_UP = 3
Call = Callable[[], None]


class CaptureFailed(Exception):
    """A call cannot be captured; the text says what it raised."""


class Unrolled:
    """Calls, one after the other, as one graph.

    Args:
        calls: gone through in turn, so that inputs rotate; each launches its work and waits for nothing.
        count: of the calls in the graph.
        capture: as a CUDA graph; without, a loop of eager calls.
        beside: in whose memory this one's intermediate results go, where both are captured.
        more: calls that `count` does not tell, to be slower on purpose.

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
    ) -> None:
        for _ in range(WARM_UP):
            for call in calls:
                call()
        torch.cuda.synchronize()
        self.count = count

        def all_of_them() -> None:
            for number in range(count + more):
                calls[number % len(calls)]()

        self.graph: torch.cuda.CUDAGraph | None = None
        self.output: Tensor | None = None  # what all calls write to, for whoever made them
        self.launch: Callable[[], object] = all_of_them
        self.held = all_of_them  # a graph does not keep the memory that it reads
        self.method = f"{self.count} eager calls"
        if capture:
            self.graph = captured(all_of_them, None if beside is None else beside.graph)
            self.launch, self.method = self.graph.replay, f"{self.count} calls in a graph"


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


def replays(sequence: Sequence[Unrolled]) -> list[Replay]:
    """Each graph once, in this order, all launched before the first has ended, so that the device waits for no launch.

    The first is launched once more before that, untimed: it hides its own launch, and wakes the clocks.
    """
    sequence[0].launch()
    events = [_event()]
    events[0].record()
    for graph in sequence:
        graph.launch()
        event = _event()
        event.record()
        events.append(event)
    torch.cuda.synchronize()
    now = time.monotonic()
    us = [float(first.elapsed_time(then)) * 1e3 for first, then in pairwise(events)]
    until_end = [sum(us[number:]) / 1e6 for number in range(len(us) + 1)]
    return [Replay(us[n], now - until_end[n], now - until_end[n + 1]) for n in range(len(us))]


def _event() -> Any:
    event: Callable[..., Any] = torch.cuda.Event
    return event(enable_timing=True)
