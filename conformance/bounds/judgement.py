"""The verdict on an output: within what the recipe allows, element by element, token by token, expert by expert."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from conformance.bounds.allowance import Allowance, allowance_for, half_spacing
from conformance.bounds.statistics import (
    element_ratio,
    gain_ratio,
    output_variance,
    pooled_gain_ratio,
    token_norm_ratio,
)
from conformance.results import Mismatch
from fp8moe.recipe import Arithmetic
from fp8moe.reference.recipe import RecipeTrace
from fp8moe.reference.rounding import FloatFormat

BLOCK = 128
"""Columns of a block in a report."""


@dataclass(frozen=True)
class Judgement:
    """What a comparison came to.

    Args:
        passed: every ratio is at most 1.
        error_over_bound: largest error/bound of an element; infinite where something else is wrong.
        reason: why it failed; where the arithmetic was not declared, what was assumed instead.
        per_token: (T,) largest error/bound.
        per_expert: the same over the tokens routed to an expert, by its id in `topk_ids`.
        statistics: further ratios, each with limit 1.
        worst: the element farthest outside (or nearest to) its bound.
    """

    passed: bool
    error_over_bound: float
    reason: str
    per_token: Tensor
    per_expert: Mapping[int, float]
    statistics: Mapping[str, float]
    worst: Mismatch | None = None
    notes: tuple[str, ...] = field(default=())


def judge(trace: RecipeTrace, output: Tensor, arithmetic: Arithmetic | None) -> Judgement:
    """Judges T rows of an output, those of the trace's tokens, in their order.

    First E1, which allows for every flip that is possible; then, without allowing for any; then, for the tokens that
    need some, after reading the flips off the output (E3). TN and gain are of the last of these.

    Args:
        output: (T, H), the dtype of the hidden states.
        arithmetic: the backend's; None where it declares none.
    """
    wrong = _form(trace, output)
    if wrong:
        return Judgement(False, torch.inf, wrong, torch.full((len(trace.R),), torch.inf), {}, {})
    if not output.numel():
        return Judgement(True, 0.0, "", torch.zeros(len(trace.R)), {}, {})
    got = output.to(trace.R.device).double()
    allowance = allowance_for(trace, arithmetic)
    notes = _notes(allowance)
    comparison = _Comparison(trace, allowance, got)
    broken = comparison.not_finite()
    if broken is not None:
        return comparison.judgement({}, broken[0], broken[1], notes)
    first = element_ratio(comparison.error, trace.smooth, allowance.total, trace.problem.carrier)
    statistics = {"E1": float(first.max())}
    if statistics["E1"] > 1:
        return comparison.judgement(statistics, first, "", notes)
    ratio, per_token = comparison.after_decoding()
    statistics |= {"E3": float(ratio.max())} | {name: float(values.max()) for name, values in per_token.items()}
    return comparison.judgement(statistics, ratio, "", notes, per_token)


def _form(trace: RecipeTrace, output: Tensor) -> str:
    if tuple(output.shape) != tuple(trace.R.shape):
        return f"shape {tuple(output.shape)}: expected (tokens, hidden) = {tuple(trace.R.shape)}"
    if output.dtype != trace.problem.hidden_states.dtype:
        return f"dtype {output.dtype}: expected that of the hidden states, {trace.problem.hidden_states.dtype}"
    return ""


def _notes(allowance: Allowance) -> tuple[str, ...]:
    unit = allowance.arithmetic
    if unit != UNKNOWN:
        return ()
    return (
        f"arithmetic not declared: judged as a matrix unit of {unit.fraction_bits} fraction bits in groups of "
        f"{unit.group}, promoted every {unit.promote_every}",
    )
