"""Cases that adapters are tried on, and how their outputs are compared.

A played library has the signatures of the real one, read from its wheel, so that an argument that is no more, or one
that is missing, is an error. It reads the weights back by their layout's definition, and computes with TorchExperts: an
adapter that converts, scales, packs or places anything wrongly gives other bits than TorchExperts on the checkpoint.
Evidence class contract: none of this says that the real kernel does so, or that it is right.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from conformance.build import CaseTensors, build
from conformance.cases import Case
from fp8moe.activations import activate
from fp8moe.backends.libraries import LibraryBackend
from fp8moe.experts import MoEWeights

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


def as_fnuz(weights: MoEWeights) -> MoEWeights:
    """The same bits by another name: other numbers."""
    return replace(weights, **{name: getattr(weights, name).view(torch.float8_e4m3fnuz) for name in ("w13", "w2")})


def bits(values: Tensor) -> Tensor:
    return values.contiguous().view(torch.uint8)


def same(got: Tensor, expected: Tensor) -> bool:
    return got.dtype == expected.dtype and torch.equal(bits(got), bits(expected))


def with_holes(case: Case) -> CaseTensors:
    """Without an expert in a first place, in a last one, and in all of the last token's, which holds what must reach no
    other. Sums are exact: an expert's product has the same bits with rows more or less."""
    tensors = build(replace(case, values="exact_sums"), "cpu")
    ids, states = tensors.topk_ids.clone(), tensors.hidden_states.clone()
    ids[0, 0], ids[1:2, -1] = -1, -1
    ids[-1] = -1
    shared = case.scheme == "tensor_dyn"  # its first scale is all tokens', by the recipe
    states[-1] = states[-1] * 8 if shared else torch.nan
    return replace(tensors, topk_ids=ids, hidden_states=states)


def with_repeats(case: Case) -> tuple[CaseTensors, CaseTensors]:
    """With one expert in the first and the last slot of each token; and the same with it in the first alone, which has
    the sum of both weights."""
    tensors = build(case, "cpu")
    ids, weights = tensors.topk_ids.clone(), torch.full_like(tensors.topk_weights, 0.25)
    ids[:, -1] = ids[:, 0]
    once, sums = ids.clone(), weights.clone()
    once[:, -1], sums[:, 0] = -1, 0.5
    return replace(tensors, topk_ids=ids, topk_weights=weights), replace(tensors, topk_ids=once, topk_weights=sums)


def last_of_slots(ids: Tensor) -> Tensor:
    """-1 where a later slot of the token has the same expert: what becomes of (M, k) ids in a table of experts by
    tokens with one slot in each place."""
    same = ids[:, :, None] == ids[:, None, :]
    return ids.masked_fill(same.triu(1).any(2), -1)


class ByTorch(LibraryBackend):
    """In place of our kernels, which have tests of their own and no device here."""

    def activated_by_triton(
        self, gate_up: Tensor, *, present: Tensor | None = None, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        values = activate(self.config.activation, gate_up.float()).to(dtype)
        return values if present is None else values.masked_fill((present < 0)[:, None], torch.nan)

    def combine(
        self, results: Tensor, places: Tensor, output: Tensor, weights: Tensor | None, *, by_row: bool = True
    ) -> None:
        assert weights is None
        assert not by_row
        total = torch.zeros(output.shape)
        for slot, there in enumerate((places >= 0).view(len(output), -1).T):
            values = results.view(len(output), -1, output.shape[1])[:, slot].float()
            total = torch.where(there[:, None], total + values, total)
        output.copy_(total)
