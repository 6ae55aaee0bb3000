"""A case's tensors in the memory of another process, so that two processes time their calls on the same memory.

Weights, inputs and output elsewhere change a time by 0.03 to 0.2% each (standard deviation; four cases on one H200,
2026-11-29). Intermediate results cannot be shared and count for more: `conformance.timing.graphs.Unrolled`.
"""

from __future__ import annotations

import base64
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from multiprocessing.reduction import ForkingPickler

import torch
import torch.multiprocessing  # how a pickle tells where a tensor lies
from torch import Tensor

from conformance.build import CaseTensors
from fp8moe.experts import MoEWeights

INPUTS = ("hidden_states", "topk_weights", "topk_ids")


@dataclass(frozen=True)
class Given:
    """What one process gives to another.

    Args:
        layers: of each, weights and inputs by name; None where a case has none of that name.
        output: what all calls write to.
    """

    layers: Sequence[Mapping[str, Tensor | None]]
    output: Tensor

    @classmethod
    def of(cls, calls: Sequence[CaseTensors], output: Tensor) -> Given:
        return cls([vars(one.weights) | {name: getattr(one, name) for name in INPUTS} for one in calls], output)

    def sent(self) -> str:
        """Where they lie, for exactly one receiver; they stay there while this process keeps them.

        Raises:
            RuntimeError: memory of this device cannot be shared; `fp8moe gate --baseline` needs none of that.
        """
        return base64.b64encode(ForkingPickler.dumps((self.layers, self.output))).decode()

    @classmethod
    def received(cls, text: str) -> Given:
        """The same memory here. The text comes from a process of this run, which may run any code as it is."""
        return cls(*pickle.loads(base64.b64decode(text)))


def on_memory_of(given: Mapping[str, Tensor | None], tensors: CaseTensors) -> CaseTensors:
    """The case's tensors as they lie elsewhere.

    Raises:
        ValueError: this version builds the case in another shape, type or layout.
    """
    own = vars(tensors.weights) | {name: getattr(tensors, name) for name in INPUTS}
    for name in sorted(own.keys() | given.keys()):
        here, there = (_layout(one.get(name), strides=name not in INPUTS) for one in (own, given))
        if here != there:
            raise ValueError(f"{name}: {there} in one version, {here} in the other: they build the case differently")
    weights = {name: given.get(name) for name in vars(tensors.weights)}
    return replace(tensors, weights=MoEWeights(**weights), **{name: given[name] for name in INPUTS})  # type: ignore[arg-type]


def _layout(tensor: Tensor | None, *, strides: bool) -> str:
    """Without strides for inputs, which have other ones in further layers."""
    if tensor is None:
        return "none"
    steps = tuple(step for step, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1)
    return f"{tuple(tensor.shape)} {tensor.dtype}" + (f" strides {steps}" if strides else "")


def released() -> None:
    """Gives back what other processes have let go of."""
    if torch.cuda.is_available():
        collect: Callable[[], None] = torch.cuda.ipc_collect
        collect()
