"""Cases that adapters are tried on, and how their outputs are compared.

A played library has the signatures of the real one, read from its wheel, so that an argument that is no more, or one
that is missing, is an error. It reads the weights back by their layout's definition, and computes with TorchExperts: an
adapter that converts, scales, packs or places anything wrongly gives other bits than TorchExperts on the checkpoint.
Evidence class contract: none of this says that the real kernel does so, or that it is right.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from conformance.build import CaseTensors
from conformance.cases import Case
from fp8moe.activations import activate

LAYER = Case(tokens=7, experts=8, top_k=3, hidden=256, inter=128)
CASES = {
    "plain": {},
    "one token": {"tokens": 1},
    "a rank of two": {"ep": "2:1"},
    "weights on the input": {"top_k": 1, "weight_on_input": True},
    "rows apart": {"layout": "strided"},
    "few experts": {"law": "skewed", "seed": 3},
}


def case(scheme: str, **fields: Any) -> Case:
    return replace(LAYER, scheme=scheme, **fields)


def bits(values: Tensor) -> Tensor:
    return values.contiguous().view(torch.uint8)


def same(got: Tensor, expected: Tensor) -> bool:
    return got.dtype == expected.dtype and torch.equal(bits(got), bits(expected))


def with_holes(tensors: CaseTensors) -> tuple[CaseTensors, CaseTensors]:
    """Without an expert in one place, and in all of one token's; and the same for who knows no -1: another expert with
    no weight, on another rank where there is one. (With fewer rows an expert's product may have other bits.)"""
    other = 0 if tensors.expert_map is None else int((tensors.expert_map < 0).int().argmax())
    ids, filled, weights = tensors.topk_ids.clone(), tensors.topk_ids.clone(), tensors.topk_weights.clone()
    for place in ((0, 0), (-1, slice(None))):
        ids[place], filled[place], weights[place] = -1, other, 0.0
    return replace(tensors, topk_ids=ids), replace(tensors, topk_ids=filled, topk_weights=weights)


def played_activation(name: str) -> Callable[[Tensor, Tensor], None]:
    """An operator (output!, values): rows of gate then up, in fp32, rounded to the output's dtype."""

    def activate_rows(output: Tensor, values: Tensor) -> None:
        output.copy_(activate(name, values.float()))

    return activate_rows
