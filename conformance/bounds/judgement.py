"""The verdict on an output: within what the recipe allows, element by element, token by token, expert by expert."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from conformance.bounds.accumulation import UNKNOWN
from conformance.bounds.allowance import Allowance, allowance_for
from conformance.bounds.decode import decode_flips
from conformance.bounds.statistics import element_ratio, gain_ratio, token_norm_ratio
from conformance.bounds.suspect import mismatch_at, per_expert_maxima
from conformance.results import Mismatch
from fp8moe.recipe import Arithmetic
from fp8moe.reference.recipe import RecipeTrace
from fp8moe.reference.rounding import FloatFormat, spacing


@dataclass(frozen=True)
class Judgement:
    """What a comparison came to.

    Args:
        passed: every ratio is at most 1.
        error_over_bound: largest error/bound of an element; infinite where the output's form is wrong.
        reason: why it failed, or what a passed one was judged under, where that was not declared.
        per_token: (T,) largest ratio of each token, of its elements or of the token as a whole.
        per_expert: the largest of these over the tokens routed to an expert, by its id in `topk_ids`.
        statistics: every ratio with limit 1, the largest over the tokens.
        worst: of the token with the largest ratio the worst element; None where the form is wrong.
    """

    passed: bool
    error_over_bound: float
    reason: str
    per_token: Tensor
    per_expert: Mapping[int, float]
    statistics: Mapping[str, float]
    worst: Mismatch | None = None


MEANINGS = {
    "finite": "not finite where the recipe is, or finite where it is not",
    "E1": "an element is outside its bound, whichever way the intermediate was rounded",
    "E3": "an element is outside its bound, after allowing for the flips that fit best",
    "TN": "a token's errors are together larger than roundings explain",
    "gain": "a token's output is scaled",
    "gain_pooled": "the outputs are scaled",
}


def judge(trace: RecipeTrace, output: Tensor, arithmetic: Arithmetic | None) -> Judgement:
    """Judges T rows of an output, those of the trace's tokens, in their order.

    First E1, which allows for every flip that is possible. Then each token without any flip; then, for the tokens
    that need some, with those that can be read off the output (E3). TN and gain are of what is left after that.

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
    broken, excused = not_finite(trace.smooth, got, allowance.total, fmt)
    if bool(broken.any()):
        ratio = torch.where(broken, torch.inf, 0.0)
        return _judgement(trace, allowance, got, error, ratio, ratio.amax(-1), {"finite": torch.inf})
    # Overflow that the recipe shares; a token that it makes nothing of says nothing.
    error = torch.where(excused, 0.0, error)
    judged = torch.isfinite(trace.smooth).all(-1)
    ratio = torch.where(judged[:, None], element_ratio(error, trace.smooth, allowance.total, fmt), 0.0)
    per_token, statistics = ratio.amax(-1), {"E1": float(ratio.max())}
    if statistics["E1"] <= 1:
        ratio, per_token, found = _decoded(trace, allowance, error, judged)
        statistics |= found
    return _judgement(trace, allowance, got, error, ratio, per_token, statistics)


def form_of(output: Tensor, reference: Tensor, dtype: torch.dtype) -> str:
    """What is wrong with an output's shape or dtype; "" where nothing is."""
    if tuple(output.shape) != tuple(reference.shape):
        return f"shape {tuple(output.shape)}: expected (tokens, hidden) = {tuple(reference.shape)}"
    if output.dtype != dtype:
        return f"dtype {output.dtype}: expected that of the hidden states, {dtype}"
    return ""


def not_finite(reference: Tensor, got: Tensor, allowance: Tensor, fmt: FloatFormat) -> tuple[Tensor, Tensor]:
    """(wrong, excused), both (T, H) bool.

    Excused: an infinity of the right sign where the bound reaches past the format's largest number, or anything not
    finite where the recipe's own result is not. Wrong: any other NaN or infinity, and numbers in place of those.
    """
    strange, expected = ~torch.isfinite(got), ~torch.isfinite(reference)
    largest = torch.tensor(fmt.largest, dtype=torch.float64, device=got.device)
    overflow = reference.abs() + allowance >= largest + spacing(largest, fmt) / 2
    same_sign = torch.isinf(got) & (torch.sign(got) == torch.sign(reference))
    excused = strange & (expected | (overflow & same_sign))
    return (strange & ~excused) | (expected & ~strange), excused


def _decoded(
    trace: RecipeTrace, allowance: Allowance, error: Tensor, judged: Tensor
) -> tuple[Tensor, Tensor, dict[str, float]]:
    """(T, H) E3, (T,) the worst of E3, TN and gain, and each one's largest: with the flips that the output shows."""
    fmt = trace.problem.carrier
    moved, undecided = torch.zeros_like(error), torch.zeros_like(error)
    none = _ratios(trace.smooth, allowance.smooth, error, fmt)
    # Without a flip, an output rounded to nearest stays within half of what a faithful one may have.
    suspicious = (none["E3"].amax(-1) > 1 / 2) | (none["TN"] > 1) | (none["gain"] > 1)
    for token in (suspicious & judged & (allowance.flips > 0).any(-1)).nonzero()[:, 0].tolist():
        decoded = decode_flips(trace, allowance, token, error[token])
        moved[token], undecided[token] = decoded.moved, decoded.undecided
    left = _ratios(trace.smooth + moved, allowance.smooth + undecided, error - moved, fmt)
    per_token = torch.stack([left["E3"].amax(-1), left["TN"], left["gain"]])
    per_token = torch.where(judged, per_token, 0.0)
    together = (trace.smooth + moved, allowance.smooth + undecided, error - moved)
    reference, slack, rest = (values[judged].reshape(1, -1) for values in together)
    pooled = _ratios(reference, slack, rest, fmt)["gain"] if rest.numel() else torch.zeros(1)
    largest = dict(zip(("E3", "TN", "gain"), per_token.amax(-1).tolist(), strict=True))
    return torch.where(judged[:, None], left["E3"], 0.0), per_token.amax(0), largest | {"gain_pooled": float(pooled)}


def _ratios(reference: Tensor, allowance: Tensor, error: Tensor, fmt: FloatFormat) -> dict[str, Tensor]:
    return {
        "E3": element_ratio(error, reference, allowance, fmt),
        "TN": token_norm_ratio(error, reference, allowance, fmt),
        "gain": gain_ratio(error, reference, allowance, fmt),
    }


def _judgement(
    trace: RecipeTrace,
    allowance: Allowance,
    got: Tensor,
    error: Tensor,
    ratio: Tensor,
    per_token: Tensor,
    statistics: dict[str, float],
) -> Judgement:
    failed = [name for name, value in statistics.items() if not value <= 1]
    reason = "; ".join(f"{name} = {statistics[name]:.3g} > 1: {MEANINGS[name]}" for name in failed)
    if allowance.arithmetic == UNKNOWN:
        unit = allowance.arithmetic
        reason += ("; " if reason else "") + (
            f"arithmetic not declared: judged as a matrix unit of {unit.fraction_bits} fraction bits in groups of "
            f"{unit.group}, promoted every {unit.promote_every}"
        )
    token = int(per_token.argmax())
    column = int(ratio[token].argmax())
    return Judgement(
        not failed,
        float(ratio.max()),
        reason,
        per_token,
        per_expert_maxima(trace, per_token),
        statistics,
        mismatch_at(trace, got, error, token, column, float(ratio[token, column])),
    )
