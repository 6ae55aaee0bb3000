"""Timing without a device: what is called in which order, what is kept, and which broken promises are failures.

The device's clock and graphs are played here; that the real ones are used rightly shows on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from conformance import performs
from conformance.cases import Case
from conformance.performs import Selected, time_case
from conformance.plan import Target
from conformance.rates import Rates
from conformance.results import Evidence, Status
from fp8moe import BackendUnavailable
from fp8moe.backends.torch_experts import TorchExperts
from fp8moe.platforms import PLATFORMS

CASE = Case(tokens=3, experts=4, top_k=2, hidden=128, inter=128)
HERE = Target("cuda", PLATFORMS["h100"], "cpu")


class Event:
    """A clock on which each call takes 5 ms."""

    now = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = Event.now
        Event.now += 5.0

    def elapsed_time(self, end: Event) -> float:
        return end.at - self.at


class Allocated:
    """The device's memory, of which each call keeps 8 bytes and uses 32 for a while."""

    now, at_work = 100, 32


class Graph:
    def __init__(self, call: Callable[[], None]) -> None:
        call()
        self.replay = call


@pytest.fixture(autouse=True)
def played_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "a played device")
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: Allocated.now)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: Allocated.now + Allocated.at_work)
    Allocated.now = 100
    monkeypatch.setattr(performs, "FLUSHED_BYTES", 16)
    monkeypatch.setattr(performs, "REPLAYS", 3)
    monkeypatch.setattr(performs, "captured", Graph)


class Captured(TorchExperts):
    contract = replace(TorchExperts.contract, graph_capturable=True, deterministic=True)

    def apply(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.calls = getattr(self, "calls", 0) + 1
        Allocated.now += 8
        return super().apply(*args, **kwargs)


def timed(cls: type[TorchExperts]) -> performs.Measured:
    return time_case(Selected(CASE, cls.__name__, cls), HERE)


def test_replays_of_a_graph() -> None:
    measured = timed(Captured)
    result, stopwatch = measured.result, measured.stopwatch
    assert (result.status, result.evidence, result.case) == (Status.PASSED, Evidence.HARDWARE, str(CASE))
    assert (result.measured["median_us"], result.measured["warm_us"]) == (5000.0, 5000.0)
    assert "floor_us" not in result.measured
    assert result.measured["flops"] > 0
    assert (result.measured["held_bytes"], result.measured["peak_bytes"]) == (8, 40)
    assert stopwatch is not None
    assert stopwatch.method == "graph replays"


def test_eager_calls_where_capture_is_not_declared() -> None:
    measured = timed(TorchExperts)
    assert measured.result.status is Status.PASSED
    assert "eager calls" in measured.result.reason


def test_a_floor_is_beside_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(performs, "rates_of", lambda name: Rates(1e10, 1e12, 1e12, name))
    measured = timed(Captured)
    figures = measured.result.measured
    assert measured.floor_by == "bytes"
    assert figures["floor_us"] == pytest.approx(figures["bytes"] / 1e10 * 1e6)
    assert figures["floor_over_time"] == pytest.approx(figures["floor_us"] / 5000)


def test_less_time_than_the_work_needs_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(performs, "rates_of", lambda name: Rates(1e6, 1e12, 1e12, name))
    assert timed(Captured).result.status is Status.FAILED


class Forgetful(Captured):
    """Computes when it is called at first, and nothing in a graph."""

    def apply(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        if getattr(self, "calls", 0) < performs.WARM_UP:
            return super().apply(*args, **kwargs)
        output: torch.Tensor = kwargs["output"]
        return output


class Raises(Captured):
    def apply(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        raise RuntimeError("no kernel image")


class Unavailable(Captured):
    def __init__(self, *args: Any) -> None:
        raise BackendUnavailable("libacme is not installed")


class Large(Captured):
    def apply(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("tried to allocate\nmuch")


@pytest.mark.parametrize(
    ("cls", "status", "reason"),
    [
        (Forgetful, Status.FAILED, "a replay gives another output than the eager call"),
        (Raises, Status.FAILED, "apply raised RuntimeError: no kernel image"),
        (Unavailable, Status.NOT_RUN, "libacme is not installed"),
        (Large, Status.NOT_RUN, "out of memory: OutOfMemoryError: tried to allocate"),
    ],
)
def test_what_went_wrong_is_told(cls: type[TorchExperts], status: Status, reason: str) -> None:
    measured = timed(cls)
    assert measured.result.status is status
    assert measured.result.reason.endswith(reason)
    assert measured.result.measured == {}
    assert measured.stopwatch is None
