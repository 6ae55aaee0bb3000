"""The verdict on an output: within what the recipe allows, element by element, token by token, expert by expert."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from conformance.bounds.accumulation import UNKNOWN
from conformance.bounds.aggregates import Residuals, bias_ratio, case_sums, columns_ratios, expert_ratios
from conformance.bounds.allowance import Allowance, allowance_for
from conformance.bounds.decode import decode_flips, one_thread
from conformance.bounds.pooled import as_floats
from conformance.bounds.statistics import element_bound, element_ratio, gain_ratio, token_norm_ratio
from conformance.bounds.suspect import experts_of_pairs, mismatch_at, per_expert_maxima
from conformance.results import Mismatch
from fp8moe.recipe import Arithmetic
from fp8moe.reference.activation import gate_part
from fp8moe.reference.recipe import RecipeTrace
from fp8moe.reference.rounding import FloatFormat, spacing


@dataclass(frozen=True)
class Judgement:
    """What a comparison came to.

    Args:
        passed: every ratio is at most 1.
        error_over_bound: largest error/bound of an element; infinite where the output's form is wrong.
        reason: why it failed, or what a passed one was judged under, where that was not declared.
        per_token: (T,) largest ratio of each token, of its elements, its blocks of columns or of the token as a whole.
        per_expert: the largest of these over the tokens routed to an expert, and of them together, by its id in
            `topk_ids`.
        statistics: every ratio with limit 1, the largest over the tokens.
        worst: of the token with the largest ratio the worst element; None where the form is wrong.
        sums: what `conformance.bounds.pooled.pooled` adds up over cases; empty where an element is outside its bound.
    """

    passed: bool
    error_over_bound: float
    reason: str
    per_token: Tensor
    per_expert: Mapping[int, float]
    statistics: Mapping[str, float]
    worst: Mismatch | None = None
    sums: Mapping[str, float] = field(default_factory=dict)


MEANINGS = {
    "finite": "not finite where the recipe is, or finite where it is not",
    "E1": "an element is outside its bound, whichever way the intermediate was rounded",
    "E3": "an element is outside its bound, after allowing for the flips that fit best",
    "TN": "a token's errors are together larger than roundings explain",
    "gain": "a token's output is scaled",
    "gain_pooled": "the outputs are scaled",
    "columns": "a token's errors in one block of 128 columns are together larger than roundings explain",
    "expert": "the errors of one expert's tokens are together larger than roundings explain",
    "expert_gain": "what one expert adds to its tokens is scaled",
    "bias": "errors lean to one side",
}


def judge(trace: RecipeTrace, output: Tensor, arithmetic: Arithmetic | None) -> Judgement:
    """Judges T rows of an output, those of the trace's tokens, in their order.

    First E1, which allows for every flip that is possible. Then each token without any flip; then, for the tokens
    that need some, with those that can be read off the output (E3). All others are of what is left after that: of a
    token (TN, gain), of its blocks of columns, of an expert's tokens, of the whole (gain_pooled, bias).

    Args:
        output: (T, H), the dtype of the hidden states.
        arithmetic: the backend's; None where it declares none.
    """
    wrong = form_of(output, trace.R, trace.problem.hidden_states.dtype)
    if wrong:
        return Judgement(False, torch.inf, wrong, torch.full((len(trace.R),), torch.inf), {}, {})
    if not output.numel():
        return Judgement(True, 0.0, "", torch.zeros(len(trace.R)), {}, {})
    got = output.to(trace.R.device).double()
    allowance = allowance_for(trace, arithmetic)
    fmt = trace.problem.carrier
    error = got - trace.smooth
    bound = element_bound(trace.smooth, allowance.total, fmt)
    broken, excused = not_finite(trace, got, allowance.total)
    if bool(broken.any()):
        ratio = torch.where(broken, torch.inf, 0.0)
        found = _Found(ratio, ratio.amax(-1), {}, {"finite": torch.inf}, {}, error, bound)
        return _judgement(trace, allowance, got, error, found)
    # Overflow that the recipe shares; a token that it makes nothing of says nothing.
    error = torch.where(excused, 0.0, error)
    judged = torch.isfinite(trace.smooth).all(-1) & ~may_overflow(trace)
    ratio = torch.where(judged[:, None], element_ratio(error, trace.smooth, allowance.total, fmt), 0.0)
    first = float(ratio.max())
    if not first <= 1:
        found = _Found(ratio, ratio.amax(-1), {}, {"E1": first}, {}, error, bound)
        return _judgement(trace, allowance, got, error, found)
    found = _decoded(trace, allowance, error, judged, excused)
    return _judgement(trace, allowance, got, error, replace(found, statistics={"E1": first, **found.statistics}))


def form_of(output: Tensor, reference: Tensor, dtype: torch.dtype) -> str:
    """What is wrong with an output's shape or dtype; "" where nothing is."""
    if tuple(output.shape) != tuple(reference.shape):
        return f"shape {tuple(output.shape)}: expected (tokens, hidden) = {tuple(reference.shape)}"
    if output.dtype != dtype:
        return f"dtype {output.dtype}: expected that of the hidden states, {dtype}"
    return ""


def not_finite(trace: RecipeTrace, got: Tensor, allowance: Tensor) -> tuple[Tensor, Tensor]:
    """(wrong, excused), both (T, H) bool.

    Excused: an infinity where the bound reaches past the format's largest number on its side, or anything not finite
    where the recipe's own result is not; and everything of a token that `may_overflow` on the way. Wrong: any
    other NaN or infinity, and numbers in place of those.
    """
    reference, fmt = trace.smooth, trace.problem.carrier
    strange, expected = ~torch.isfinite(got), ~torch.isfinite(reference)
    largest = torch.tensor(fmt.largest, dtype=torch.float64, device=got.device)
    reached = torch.sign(got) * reference + allowance >= largest + spacing(largest, fmt) / 2
    excused = strange & (expected | (torch.isinf(got) & reached))
    open_ = may_overflow(trace)[:, None]
    return ((strange & ~excused) | (expected & ~strange)) & ~open_, excused | (strange & open_)


def may_overflow(trace: RecipeTrace) -> Tensor:
    """(T,) bool: tokens of which something that the recipe rounds to 16 bits before the output passes half of that
    format's range. Whether it becomes infinite is then a matter of the last bit, or was one long before."""
    recipe, pairs, limit = trace.problem.recipe, trace.pairs, trace.problem.carrier.largest / 2
    stages = [
        (recipe.gemm1_output, trace.first),
        (recipe.activation_output, trace.intermediate),
        (recipe.gemm2_output, trace.second),
    ]
    if recipe.gate_output == "input" and trace.activation.linear is not None:
        stages.append(("input", gate_part(trace.activation, trace.first)))
    loud = torch.zeros_like(pairs.token, dtype=torch.bool)
    for rounding, values in stages:
        if rounding == "input":
            loud |= ~(values.abs().amax(-1) < limit)
    if recipe.bias == "input":
        for name, result in (("w13", trace.first), ("w2", trace.second)):
            loud |= ~(_before_bias(trace, name, result).abs().amax(-1) < limit)
    tokens = torch.zeros(len(trace.R), dtype=torch.int64, device=trace.R.device)
    judged = pairs.token >= 0
    found = tokens.index_add(0, pairs.token[judged], loud[judged].to(torch.int64)) > 0
    if "input" in (recipe.weighted, recipe.combine):  # no term is larger than all of them
        terms = (trace.second * pairs.weight[:, None])[judged].abs()
        found |= ~(torch.zeros_like(trace.R).index_add(0, pairs.token[judged], terms).amax(-1) < limit)
    return found


def _before_bias(trace: RecipeTrace, name: str, result: Tensor) -> Tensor:
    """(P, columns): a GEMM's result without the biases that were added to it."""
    product = result.clone()
    for expert, rows in trace.pairs.segments():
        bias = trace.problem.bias(name, expert)
        if bias is not None:
            product[rows] -= bias
    return product


@dataclass(frozen=True)
class _Found:
    """What is left after the flips that the output shows: (T, H) E3, (T,) the largest ratio of each token, ...; (T, H)
    the error that was judged, and what it may be."""

    ratio: Tensor
    per_token: Tensor
    per_expert: Mapping[int, float]
    statistics: Mapping[str, float]
    sums: Mapping[str, float]
    error: Tensor
    bound: Tensor


def _decoded(trace: RecipeTrace, allowance: Allowance, error: Tensor, judged: Tensor, excused: Tensor) -> _Found:
    fmt = trace.problem.carrier
    moved, undecided = torch.zeros_like(error), torch.zeros_like(error)
    left = _ratios(trace.smooth, allowance.smooth, error, fmt)
    # Without a flip, an output rounded to nearest stays within half of what a faithful one may have.
    suspicious = (left["E3"].amax(-1) > 1 / 2) | (left["TN"] > 1) | (left["gain"] > 1)
    decodable = (suspicious & judged & (allowance.flips > 0).any(-1)).nonzero()[:, 0].tolist()
    with one_thread():
        for token in decodable:
            decoded = decode_flips(trace, allowance, token, error[token], ~excused[token])
            moved[token], undecided[token] = decoded.moved, decoded.undecided
    reference, slack, rest = trace.smooth + moved, allowance.smooth + undecided, error - moved
    if decodable:
        left = _ratios(reference, slack, rest, fmt)
    bound = element_bound(reference, slack, fmt)
    of_elements = torch.where(judged[:, None], left["E3"], 0.0)
    if not bool(judged.any()):
        return _Found(of_elements, of_elements.amax(-1), {}, {}, {}, rest, bound)
    rows = judged.nonzero()[:, 0]
    everything = Residuals.of(rest, reference, slack, fmt)
    residuals = everything.rows(rows)
    columns = torch.zeros_like(left["TN"])
    columns[rows] = columns_ratios(residuals, (len(rows), error.shape[1])).amax(-1)
    per_token = torch.stack([of_elements.amax(-1), left["TN"], left["gain"], columns])
    per_token = torch.where(judged, per_token, 0.0)
    largest = dict(zip(("E3", "TN", "gain", "columns"), per_token.amax(-1).tolist(), strict=True))
    together = gain_ratio(residuals.error[None], residuals.reference[None], residuals.slack[None], fmt)
    sums = case_sums(residuals)
    per_expert, of_experts = _by_expert(trace, everything, judged)
    largest |= {"gain_pooled": float(together), "bias": bias_ratio(sums)} | of_experts
    return _Found(of_elements, per_token.amax(0), per_expert, largest, as_floats(sums), rest, bound)


def _by_expert(trace: RecipeTrace, residuals: Residuals, judged: Tensor) -> tuple[dict[int, float], dict[str, float]]:
    """The larger ratio of each expert, by its id, and the largest of each statistic. `residuals` are (T, H)."""
    pairs, ids = experts_of_pairs(trace)
    here = ((pairs.token >= 0) & judged[pairs.token.clamp(min=0)]).nonzero()[:, 0]
    if not len(here):
        return {}, {}
    known, expert = torch.unique(ids[here], return_inverse=True)
    # A token may name an expert in several slots; it is one of its tokens all the same.
    place, slot = torch.unique(expert * len(judged) + pairs.token[here], return_inverse=True)
    result = residuals.error.new_zeros(len(place), residuals.error.shape[1])
    result.index_add_(0, slot, trace.second[here] * pairs.weight[here, None])
    token, expert = place % len(judged), place // len(judged)
    segment = expert.repeat_interleave(result.shape[1])
    norm, gain = expert_ratios(residuals.rows(token), segment, len(known), result.flatten())
    largest = torch.maximum(norm, gain).tolist()
    found = {"expert": float(norm.max()), "expert_gain": float(gain.max())}
    return dict(zip(known.tolist(), largest, strict=True)), found


def _ratios(reference: Tensor, allowance: Tensor, error: Tensor, fmt: FloatFormat) -> dict[str, Tensor]:
    return {
        "E3": element_ratio(error, reference, allowance, fmt),
        "TN": token_norm_ratio(error, reference, allowance, fmt),
        "gain": gain_ratio(error, reference, allowance, fmt),
    }


def _judgement(trace: RecipeTrace, allowance: Allowance, got: Tensor, error: Tensor, found: _Found) -> Judgement:
    statistics = found.statistics
    failed = [name for name, value in statistics.items() if not value <= 1]
    reason = "; ".join(f"{name} = {statistics[name]:.3g} > 1: {MEANINGS[name]}" for name in failed)
    if allowance.arithmetic == UNKNOWN:
        unit = allowance.arithmetic
        reason += ("; " if reason else "") + (
            f"arithmetic not declared: judged as a matrix unit of {unit.fraction_bits} fraction bits in groups of "
            f"{unit.group}, promoted every {unit.promote_every}"
        )
    token = int(found.per_token.argmax())
    column = int(found.ratio[token].argmax())
    per_expert = per_expert_maxima(trace, found.per_token)
    return Judgement(
        not failed,
        float(found.ratio.max()),
        reason,
        found.per_token,
        {expert: max(value, found.per_expert.get(expert, 0.0)) for expert, value in per_expert.items()},
        statistics,
        mismatch_at(trace, got, error, token, column, float(found.ratio[token, column]), found.error, found.bound),
        found.sums,
    )
