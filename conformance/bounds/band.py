"""The wide band around the ideal oracle: what quantising the activations may cost a token, from the case's numbers.

The band does not look at the recipe oracle's result, so that a mistake in that oracle shows as a token outside it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from conformance.bounds.allowance import allowance_for, half_spacing, widest_allowance
from conformance.bounds.intermediate import activation_range
from conformance.bounds.judgement import Judgement, form_of, may_overflow, not_finite
from conformance.bounds.suspect import mismatch_at, per_expert_maxima
from fp8moe.keys import GroupShape
from fp8moe.quant import FusedMoEQuantDesc
from fp8moe.recipe import Arithmetic, Recipe
from fp8moe.reference.activation import activated
from fp8moe.reference.problem import MoEProblem
from fp8moe.reference.quantisation import group_amax, scale_of, spread
from fp8moe.reference.recipe import FIRST_GROUP, RecipeTrace, first_scale, keeps_float8
from fp8moe.reference.rounding import round_to


def judge_ideal(ideal: Tensor, output: Tensor, trace: RecipeTrace, arithmetic: Arithmetic | None = None) -> Judgement:
    """Judges each token's error norm against the band of the ideal oracle.

    Args:
        ideal: (T, H) float64, `ideal_moe` on the trace's tokens.
        output: (T, H), the dtype of the hidden states.
        trace: of the same call; of its results only the scale that a whole batch shares is used.
        arithmetic: the backend's; None: the widest of those that this trace was judged for, or fp32.
    """
    wrong = form_of(output, ideal, trace.problem.hidden_states.dtype)
    if wrong:
        return Judgement(False, torch.inf, wrong, torch.full((len(ideal),), torch.inf), {}, {})
    if not output.numel():
        return Judgement(True, 0.0, "", torch.zeros(len(ideal)), {}, {})
    allowance = widest_allowance(trace) if arithmetic is None else allowance_for(trace, arithmetic)
    got, fmt = output.to(ideal.device).double(), trace.problem.carrier
    before = ideal_band(trace) + allowance.total
    elements = before + 2 * half_spacing(ideal.abs() + before, fmt)
    broken, excused = not_finite(trace, got, elements)
    judged = torch.isfinite(trace.smooth).all(-1) & torch.isfinite(elements).all(-1) & ~may_overflow(trace)
    error = torch.where(excused | broken | ~judged[:, None], 0.0, got - ideal)
    distance = error.norm(dim=-1)
    nothing = ((ideal == 0) & (before == 0)).all(-1)
    ratio = torch.where(nothing, torch.where(distance == 0, 0.0, torch.inf), distance / elements.norm(dim=-1))
    ratio = torch.where(broken.any(-1), torch.inf, torch.where(judged, ratio, 0.0))
    token = int(ratio.argmax())
    # The element to show is the one with the largest part in its token's error.
    column = int(torch.where(broken[token], torch.inf, error[token].abs()).argmax())
    largest = float(ratio[token])
    return Judgement(
        largest <= 1,
        largest,
        "" if largest <= 1 else f"ideal = {largest:.3g} > 1: a token is farther off than quantisation explains",
        ratio,
        per_expert_maxima(trace, ratio),
        {"ideal": largest},
        mismatch_at(trace, got, error, token, column, largest, error, elements),
    )


def ideal_band(trace: RecipeTrace) -> Tensor:
    """(T, H) float64: how far quantisation may move an output, from the largest error of each element.

    An FP8 number errs by at most 2^-4 of itself, or half a subnormal spacing, or what saturation cuts off. Through a
    product with a weight, errors e of terms p add up to about r |z| + sqrt(sum e^2), r^2 = sum e^2 / sum p^2: the
    first is what equal relative errors come to, the second is what independent ones stay below (their root mean
    square is 0.4 of the largest error taken here). Through the activation the interval's ends are taken.
    Kept with the trace.
    """
    if "ideal" not in trace.kept:
        trace.kept["ideal"] = _ideal_band(trace)
    band: Tensor = trace.kept["ideal"]
    return band


def _ideal_band(trace: RecipeTrace) -> Tensor:
    problem, pairs = trace.problem, trace.pairs
    recipe, fmt = problem.recipe, problem.carrier
    total = torch.zeros_like(trace.R)
    shared_first = first_scale(problem)
    for expert, rows in pairs.segments():
        here = pairs.take(torch.arange(rows.start, rows.stop, device=problem.device))
        here = here.take((here.token >= 0).nonzero()[:, 0])
        if not len(here):
            continue
        values = problem.hidden_states[here.row].double()
        error = torch.zeros_like(values)
        if problem.apply_router_weight_on_input:
            weight = problem.topk_weights[here.row, here.slot, None].double()
            if recipe.input_weights == "input":
                error = (values * (round_to(weight, fmt) - weight)).abs()
            values = values * weight
            error = error + half_spacing(values.abs() + error, fmt)
        shared = None if shared_first is None else shared_first[expert]
        error = error + _quantisation_error(problem, problem.a1, recipe, values, error, shared)
        values, error = _through(problem, "w13", expert, values, error)
        if recipe.gemm1_output == "input":
            error = error + half_spacing(values.abs() + error, fmt)
        if keeps_float8(problem):
            parts = zip(*(part.chunk(problem.halves, dim=-1) for part in (values, error)), strict=True)
            first = [_group_error(problem, FIRST_GROUP, recipe.of_intermediate, *part) for part in parts]
            error = error + torch.cat(first, dim=-1)
        values, error = _through_activation(trace, values, error)
        if recipe.activation_output == "input":
            error = error + half_spacing(values.abs() + error, fmt)
        if recipe.requantize:
            of_pairs = trace.scale[rows.start, 0]
            error = error + _quantisation_error(
                problem, problem.quant.a2, recipe.of_intermediate, values, error, of_pairs
            )
        values, error = _through(problem, "w2", expert, values, error)
        found = error * here.weight.abs()[:, None]
        if recipe.routing_weights == "input" and not problem.apply_router_weight_on_input:
            off = (here.weight - problem.topk_weights[here.row, here.slot].double()).abs()
            found = found + (values.abs() + error) * off[:, None]
        total.index_add_(0, here.token, found)
    return total


def _quantisation_error(
    problem: MoEProblem,
    desc: FusedMoEQuantDesc,
    recipe: Recipe,
    values: Tensor,
    error: Tensor,
    shared: Tensor | None,
) -> Tensor:
    """(P, K): largest error of quantising `values`, themselves known to `error`; `shared` is a per-tensor scale."""
    group = problem.activation_group(desc)
    if group is None:
        return torch.zeros_like(values)
    if not group.is_per_tensor():
        return _group_error(problem, group, recipe, values, error)
    assert shared is not None
    return _largest_error(problem, values.abs() + error, shared.expand_as(values))


def _group_error(problem: MoEProblem, group: GroupShape, recipe: Recipe, values: Tensor, error: Tensor) -> Tensor:
    """(P, K), the same with a dynamic scale for each group of columns, or for each row."""
    largest = values.abs() + error
    scale = spread(scale_of(group_amax(largest, group), problem.fp8, recipe), group, values.shape[1])
    return _largest_error(problem, largest, scale)


def _largest_error(problem: MoEProblem, largest: Tensor, scale: Tensor) -> Tensor:
    """(P, K): half a spacing of the codes, or what saturation cuts off."""
    return torch.maximum(half_spacing(largest / scale, problem.fp8) * scale, largest - problem.fp8.largest * scale)


def _through(problem: MoEProblem, name: str, expert: int, values: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
    """(P, K) values and errors through one expert's matrix: (P, N) results and errors."""
    results, errors = [], []
    for rows, weight in problem.weight_chunks(name, expert):
        square = weight.square().t()
        moved, energy = error.square() @ square, values.square() @ square
        result = values @ weight.t()
        coherent = torch.where(energy > 0, moved / energy, 0.0).sqrt() * result.abs()
        results.append(result)
        deviation = problem.weight_deviation(name, expert, rows)
        rounded: Tensor | float = 0.0
        if deviation is not None:
            rounded = (values @ deviation.t()).abs() + error @ deviation.abs().t()
        errors.append(coherent + moved.sqrt() + rounded)
    bias = problem.bias(name, expert)
    result = torch.cat(results, dim=1)
    return result if bias is None else result + bias, torch.cat(errors, dim=1)


def _through_activation(trace: RecipeTrace, values: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
    centre = activated(trace.activation, values)
    gate = trace.problem.carrier if trace.problem.recipe.gate_output == "input" else None
    low, high = activation_range(trace.activation, (values - error, values + error), gate)
    return centre, torch.maximum(high - centre, centre - low)
