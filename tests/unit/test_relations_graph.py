"""Replays of a captured graph, on a graph that runs the captured call again: no GPU is needed for that."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from conformance.checks import CHECKS
from conformance.plan import Subject, Target
from conformance.relations import relation_case
from conformance.trial import Ended, Trial
from fp8moe.backends.torch_experts import TorchExperts
from fp8moe.platforms import PLATFORMS

HERE = Target("cpu", PLATFORMS["cpu"], "cpu")
CHECK = CHECKS["computes.relation.graph_replay"]


class Capturable(TorchExperts):
    """Called while a graph is captured, it leaves what a replay does with it."""

    contract = replace(TorchExperts.contract, graph_capturable=True)
    capturing: list[Any] | None = None

    def apply(self, *args: Any, **kwargs: Any) -> Tensor:
        result = super().apply(*args, **kwargs)
        if Capturable.capturing is not None:
            Capturable.capturing.append(lambda: result.copy_(self.replayed(*args, **kwargs)))
        return result

    def replayed(self, *args: Any, **kwargs: Any) -> Tensor:
        return TorchExperts.apply(self, *args, **kwargs)


class BakedIds(Capturable):
    """The ids of the capture are used in every replay."""

    def apply(self, *args: Any, **kwargs: Any) -> Tensor:
        hidden, weights, ids = args
        return super().apply(hidden, weights, ids if Capturable.capturing is None else ids.clone(), **kwargs)


class GrownWorkspace(Capturable):
    """A larger eager call frees the memory that the graph holds."""

    def apply(self, *args: Any, **kwargs: Any) -> Tensor:
        self.largest = max(self.__dict__.get("largest", 0), len(args[0]))
        return super().apply(*args, **kwargs)

    def replayed(self, *args: Any, **kwargs: Any) -> Tensor:
        result = super().replayed(*args, **kwargs)
        return result * 0 if self.largest > len(result) else result


class FakeGraph:
    def __init__(self) -> None:
        self.work: list[Any] = []

    def replay(self) -> None:
        for work in self.work:
            work()


@contextmanager
def fake_capture(graph: FakeGraph, pool: object = None) -> Iterator[None]:
    Capturable.capturing = graph.work
    try:
        yield
    finally:
        Capturable.capturing = None


@pytest.fixture
def _graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", fake_capture)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)


def run(cls: type[TorchExperts], device: str = "cuda") -> None:
    trial = Trial(relation_case(CHECK, "block", seed=2), Subject(cls.__name__, cls, cls.__name__), HERE)
    trial.start()
    trial.target = replace(HERE, device=device)
    CHECK.run(trial)


@pytest.mark.usefixtures("_graphs")
def test_the_honest_one_passes() -> None:
    run(Capturable)


@pytest.mark.usefixtures("_graphs")
@pytest.mark.parametrize("cls", [BakedIds, GrownWorkspace])
def test_a_faulty_one_is_convicted(cls: type[TorchExperts]) -> None:
    with pytest.raises(Ended, match=r"replay [123] of a captured call"):
        run(cls)


@pytest.mark.parametrize(
    ("cls", "device", "words"), [(Capturable, "cpu", "on CUDA devices"), (TorchExperts, "cuda", "does not declare")]
)
def test_it_does_not_apply_without_a_device_or_a_declaration(cls: type[TorchExperts], device: str, words: str) -> None:
    with pytest.raises(Ended, match=words):
        run(cls, device)
