"""Where an output is worst: the token, the expert behind it where one can be told, the block of columns."""

from __future__ import annotations

import torch
from torch import Tensor

from conformance.results import Mismatch
from fp8moe.reference.problem import Pairs
from fp8moe.reference.recipe import RecipeTrace

BLOCK = 128
"""Columns of a block in a report."""


def experts_of_pairs(trace: RecipeTrace) -> tuple[Pairs, Tensor]:
    """The trace's pairs, and each one's expert by its id in `topk_ids`, (P,) int64."""
    pairs = trace.pairs
    return pairs, trace.problem.topk_ids[pairs.row, pairs.slot].to(torch.int64)


def per_expert_maxima(trace: RecipeTrace, per_token: Tensor) -> dict[int, float]:
    """Largest of `per_token` over the tokens routed to each expert, by its id in `topk_ids`."""
    pairs, ids = experts_of_pairs(trace)
    judged = pairs.token >= 0
    found: dict[int, float] = {}
    for expert, value in zip(ids[judged].tolist(), per_token[pairs.token[judged]].tolist(), strict=True):
        found[expert] = max(value, found.get(expert, 0.0))
    return dict(sorted(found.items()))


def mismatch_at(
    trace: RecipeTrace,
    got: Tensor,
    error: Tensor,
    token: int,
    column: int,
    ratio: float,
    judged: Tensor,
    bound: Tensor,
) -> Mismatch:
    """One element of the output, `token` counting among the judged ones.

    Args:
        got, error: (T, H), the output, and what it is off by.
        judged, bound: (T, H), the error that was judged, and what it may be.
    """
    first = column // BLOCK * BLOCK
    return Mismatch(
        token,
        suspected_expert(trace, token, error[token]),
        column,
        (first, min(first + BLOCK, got.shape[1]) - 1),
        float(trace.R[token, column]),
        float(got[token, column]),
        ratio,
        abs(float(judged[token, column])),
        float(bound[token, column]),
    )


def suspected_expert(trace: RecipeTrace, token: int, error: Tensor) -> int | None:
    """The expert id whose slot explains a token's error: its only one, or that of most of the error's energy.

    A wrong expert errs along its own result (a scale, a lost or doubled slot); so the error is projected on each
    slot's result, and the slot named that holds more of it than all others together.
    """
    pairs = trace.pairs
    mine = (pairs.token == token).nonzero()[:, 0]
    if not mine.numel():
        return None
    ids = trace.problem.topk_ids[pairs.row[mine], pairs.slot[mine]].to(torch.int64)
    if len(torch.unique(ids)) == 1:
        return int(ids[0])
    results = trace.second[mine]
    energy = (results @ error).square() / results.square().sum(-1).clamp(min=torch.finfo(torch.float64).tiny)
    if not bool(torch.isfinite(energy).all()):
        return None
    place = int(energy.argmax())
    return int(ids[place]) if float(energy[place]) > float(error.square().sum()) / 2 else None
