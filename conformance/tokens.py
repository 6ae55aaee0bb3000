"""Relations that reach every token of a large batch, of which the oracle judges only some; and capture in a graph.

They hold bit for bit where each token's sums do not depend on the others': on backends whose arithmetic is replayed.
Every call has the same shapes, so that whatever is chosen by shape (the height of a tile, and with it the matrix
instruction) stays the same.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from conformance.bits import difference
from conformance.build import CaseTensors
from conformance.capture import capturing
from conformance.draw import Draw
from fp8moe.experts import FusedMoEPermuteExpertsUnpermute
from fp8moe.keys import GroupShape

CHUNKS = 2


class Call(Protocol):
    """One call of a backend, on a case's expert map and options."""

    def __call__(self, hidden_states: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor: ...


def broken_relation(call: Call, tensors: CaseTensors, output: Tensor) -> str:
    """The relation that `output` breaks, and where; "" where none."""
    desc = tensors.quant.a1
    shared = desc.dtype is not None and not desc.static and (desc.shape or GroupShape.PER_TENSOR).is_per_tensor()
    # A scale that all tokens share stays when they change places, and not when some of them go.
    return _permuted(call, tensors, output) or ("" if shared else _chunked(call, tensors, output))


def _order(tensors: CaseTensors) -> Tensor:
    tokens = len(tensors.hidden_states)
    order = torch.argsort(Draw(tensors.case.seed).uniform("permutation", (tokens,)))
    return order.to(tensors.hidden_states.device)


def _permuted(call: Call, tensors: CaseTensors, output: Tensor) -> str:
    """Tokens in another order give the same results in that order."""
    order = _order(tensors)
    again = call(tensors.hidden_states[order], tensors.topk_weights[order], tensors.topk_ids[order])
    return _told("permutation: with its tokens in another order", output[order], again, order)


def _chunked(call: Call, tensors: CaseTensors, output: Tensor) -> str:
    """A part of the tokens, the others' slots emptied, gives the same results for this part and zeros elsewhere."""
    tokens = torch.arange(len(tensors.hidden_states), device=output.device)
    for chunk in range(CHUNKS):
        kept = (tokens * CHUNKS // max(len(tokens), 1) == chunk)[:, None]
        again = call(tensors.hidden_states, tensors.topk_weights, tensors.topk_ids.masked_fill(~kept, -1))
        part = f"chunk: with only part {chunk + 1} of {CHUNKS} of its tokens"
        broken = _told(part, torch.where(kept, output, 0.0), again, tokens)
        if broken:
            return broken
    return ""


def captured_differs(backend: FusedMoEPermuteExpertsUnpermute, tensors: CaseTensors, output: Tensor) -> str:
    """A graph captured on the case's tensors, replayed on the tokens in another order, gives `output` in that order.

    Nothing of the first routing may have been baked in. The backend has been called before, which is when it compiles.
    """
    order = _order(tensors)
    names = ("hidden_states", "topk_weights", "topk_ids")
    buffers = {name: getattr(tensors, name).clone() for name in names}
    with capturing() as graph:
        result = replace(tensors, **buffers).call(backend)
    for name, buffer in buffers.items():
        buffer.copy_(getattr(tensors, name)[order])
    graph.replay()
    torch.cuda.synchronize()
    return _told("graph: captured, and replayed on its tokens in another order,", output[order], result, order)


def _told(relation: str, expected: Tensor, got: Tensor, tokens: Tensor) -> str:
    found = difference(expected, got)
    if not found.differing:
        return ""
    return (
        f"relation {relation} {found.differing} of {found.elements} elements differ, the farthest of token "
        f"{int(tokens[found.row])}, column {found.column}: {found.expected:.9g} became {found.got:.9g}"
    )
