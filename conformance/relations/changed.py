"""A call with something changed: rows taken, experts moved, codes changed; always new tensors, never the case's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from conformance.build import CaseTensors
from conformance.draw import Draw
from conformance.trial import Trial
from fp8moe.dispatch import local_ids
from fp8moe.experts import MoEWeights
from fp8moe.scaling import FP8_FORMATS, decode, encode

SCALARS = ("a13_scale", "a2_scale")


def shuffled(trial: Trial, name: str, count: int) -> Tensor:
    """(count,) int64, 0 to count - 1 in an order that the case's seed gives, in which none keeps its place (of two or
    more); on the tensors' device."""
    circle = torch.argsort(Draw(trial.case.seed).uniform(f"relation/{name}", (count,)), stable=True)
    order = torch.empty_like(circle)
    order[circle] = circle.roll(-1)
    return order.to(trial.tensors.hidden_states.device)


def rows(tensors: CaseTensors, order: Tensor) -> CaseTensors:
    """A call on these tokens, in this order."""
    return replace(
        tensors,
        hidden_states=tensors.hidden_states[order],
        topk_weights=tensors.topk_weights[order],
        topk_ids=tensors.topk_ids[order],
    )


def with_weights(tensors: CaseTensors, **changed: Any) -> CaseTensors:
    """The same call of a layer with other weights."""
    return replace(tensors, weights=replace(tensors.weights, **changed))


def every_expert(weights: MoEWeights, change: Callable[[Tensor], Tensor]) -> MoEWeights:
    """`change` applied to everything that has a part for each expert; FP8 codes as bytes, so that torch can index."""

    def changed(tensor: Tensor) -> Tensor:
        if tensor.dtype in FP8_FORMATS:
            return change(tensor.view(torch.uint8)).view(tensor.dtype)
        return change(tensor)

    given = {name: tensor for name, tensor in vars(weights).items() if tensor is not None and name not in SCALARS}
    return replace(weights, **{name: changed(tensor) for name, tensor in given.items()})


def numbers(weight: Tensor) -> Tensor:
    """What a weight's codes stand for, fp32, without scales; a copy."""
    return decode(weight) if weight.dtype in FP8_FORMATS else weight.to(torch.float32, copy=True)


def coded(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Numbers as a weight of this dtype, FP8 or 16 bit."""
    return encode(values, dtype) if dtype in FP8_FORMATS else values.to(dtype)


def experts_of(tensors: CaseTensors) -> Tensor:
    """(M, k) int64 local experts, -1 where a slot has none here."""
    return local_ids(tensors.topk_ids, tensors.expert_map, tensors.config.num_local_experts)


def busiest_expert(tensors: CaseTensors) -> int | None:
    """The local expert with the most slots, the first of several; None where no token has one here."""
    local = experts_of(tensors)
    present = local[local >= 0]
    if not present.numel():
        return None
    return int(torch.bincount(present, minlength=tensors.config.num_local_experts).argmax())
