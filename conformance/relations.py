"""Relations that reach every token of a large batch, of which the oracle judges only some.

They hold bit for bit where each token's sums do not depend on the others': on backends whose arithmetic is replayed, in
schemes in which no dynamic scale is the whole batch's. Every call has the same shapes, so that whatever is chosen by
shape (the height of a tile, and with it the matrix instruction) stays the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

from conformance.bits import difference
from conformance.build import CaseTensors
from conformance.draw import Draw
from fp8moe.experts import FusedMoEPermuteExpertsUnpermute
from fp8moe.keys import GroupShape

CHUNKS = 2


def broken_relation(backend: FusedMoEPermuteExpertsUnpermute, tensors: CaseTensors, output: Tensor) -> str:
    """The relation that `output` breaks, and where; "" where none, or where none applies."""
    desc = tensors.quant.a1
    if desc.dtype is not None and not desc.static and (desc.shape or GroupShape.PER_TENSOR).is_per_tensor():
        return ""
    return _permuted(backend, tensors, output) or _chunked(backend, tensors, output)


def _permuted(backend: FusedMoEPermuteExpertsUnpermute, tensors: CaseTensors, output: Tensor) -> str:
    """Tokens in another order give the same results in that order."""
    tokens = len(tensors.hidden_states)
    order = torch.argsort(Draw(tensors.case.seed).uniform("permutation", (tokens,))).to(output.device)
    again = _run(backend, tensors, tensors.hidden_states[order], tensors.topk_weights[order], tensors.topk_ids[order])
    found = difference(output[order], again)
    if not found.differing:
        return ""
    return (
        f"relation permutation: with its tokens in another order {found.differing} of {found.elements} elements "
        f"differ, first of token {int(order[found.row])}, column {found.column}: "
        f"{found.expected:.9g} became {found.got:.9g}"
    )


def _chunked(backend: FusedMoEPermuteExpertsUnpermute, tensors: CaseTensors, output: Tensor) -> str:
    """A part of the tokens, the others' slots emptied, gives the same results for this part and zeros elsewhere."""
    tokens = torch.arange(len(tensors.hidden_states), device=output.device)
    for chunk in range(CHUNKS):
        kept = (tokens * CHUNKS // max(len(tokens), 1) == chunk)[:, None]
        again = _run(
            backend, tensors, tensors.hidden_states, tensors.topk_weights, tensors.topk_ids.masked_fill(~kept, -1)
        )
        found = difference(torch.where(kept, output, 0.0), again)
        if found.differing:
            return (
                f"relation chunk: with only part {chunk + 1} of {CHUNKS} of the tokens {found.differing} of "
                f"{found.elements} elements differ, first of token {found.row}, column {found.column}: "
                f"{found.expected:.9g} became {found.got:.9g}"
            )
    return ""


def _run(
    backend: FusedMoEPermuteExpertsUnpermute, tensors: CaseTensors, hidden: Tensor, weights: Tensor, ids: Tensor
) -> Tensor:
    return backend.apply(
        hidden,
        weights,
        ids,
        expert_map=tensors.expert_map,
        apply_router_weight_on_input=tensors.apply_router_weight_on_input,
    )
