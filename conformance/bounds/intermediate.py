"""How far the intermediate of an honest backend may be from the recipe oracle's: intervals through every stage.

error of the first GEMM -> declared rounding -> activation -> declared rounding -> amax -> scale -> FP8 code.
Each stage is monotone, or its extremes are known, so an interval's ends suffice; given the first one all are sound.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from conformance.bounds.accumulation import U
from fp8moe.keys import GroupShape
from fp8moe.recipe import FirstOutput
from fp8moe.reference.activation import Activation
from fp8moe.reference.problem import MoEProblem, Pairs
from fp8moe.reference.quantisation import group_amax, spread
from fp8moe.reference.recipe import FIRST_GROUP, RecipeTrace, first_scales, keeps_float8
from fp8moe.reference.rounding import FloatFormat, round_to, to_float32, up_to_power_of_two

ACTIVATION_ROUNDINGS = 12
"""Roundings, in units of u, of an activation in fp32: exp through ex2.approx 4 (2^-22), its argument's product counted
apart, 1 + e 1, div.full 4 (2 ulp), times up 1, up + 1 or a second product 1, one to spare."""
UP_ROUNDINGS = 3
"""What of these comes after a gate's part that is rounded by itself: up + 1, the product, one to spare."""
ERF_ROUNDINGS = 7
"""x (1 + erf) / 2 errs by 2 u |x| where erf is within 2 ulp (its argument and the sum rounded, 4 u together, halved);
torch 2.13's own gelu on a CPU takes a shorter series for erf and errs by 6.25 u |x|, measured on 4,000,001 points of
[-8, 8]: the next integer."""
SCALE_ROUNDINGS = 3
"""amax / 448 against amax times its reciprocal, and either quotient within 2 ulp."""
QUOTIENT_ROUNDINGS = 2
"""x / s against x (1 / s)."""

Interval = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Spread:
    """Where the dequantised intermediate may lie around the nominal one; all float64.

    Args:
        below, above: (P, I) distances, not negative, at the nominal scale.
        flips: whether they are jumps between a few values (FP8 codes, bf16 numbers), or a continuous range.
        relative: (P, groups) relative width of the scale's interval.
        group: what shares a scale; None where nothing is quantised.
    """

    below: Tensor
    above: Tensor
    flips: bool
    relative: Tensor
    group: GroupShape | None

    @property
    def farthest(self) -> Tensor:
        """(P, I): U, the distance of the farther end."""
        return torch.maximum(self.below, self.above)


def intermediate_spread(trace: RecipeTrace, error: Tensor) -> Spread:
    """From the bound on the first GEMM's result, (P, 2I or I), to the spread of what the second GEMM multiplies."""
    problem = trace.problem
    recipe = problem.recipe
    first = _first_range(trace, error)
    gate = problem.carrier if recipe.gate_output == "input" else None
    low, high = _rounded(activation_range(trace.activation, first, gate), problem, recipe.activation_output)
    nominal = trace.intermediate
    group = problem.activation_group(problem.quant.a2) if recipe.requantize else None
    if group is None:
        flips = recipe.activation_output == "input" or recipe.gemm1_output == "input"
        none = torch.zeros_like(trace.scale)
        return Spread((nominal - low).clamp(min=0), (high - nominal).clamp(min=0), flips, none, None)
    scales = trace.scale, trace.scale
    if not problem.quant.a2.static:
        amaxes = [_amax(problem, trace.pairs, end, group) for end in _magnitudes(low, high)]
        scales = _scale_interval(problem, trace.scale, *amaxes)
    if recipe.scale_rounding == "power_of_two" and not problem.quant.a2.static:
        below, above = torch.zeros_like(nominal), torch.zeros_like(nominal)
        for scale in scales:  # both admissible scales, each exact
            bottom, top = _quantised(problem, (low, high), (scale, scale), scale, group)
            below, above = torch.maximum(below, nominal - bottom), torch.maximum(above, top - nominal)
        relative = torch.full_like(trace.scale, 2 * U)
    else:
        bottom, top = _quantised(problem, (low, high), scales, trace.scale, group)
        below, above = (nominal - bottom).clamp(min=0), (top - nominal).clamp(min=0)
        relative = torch.maximum(scales[1] - trace.scale, trace.scale - scales[0]) / trace.scale + 2 * U
    return Spread(below, above, True, relative, group)


def _rounded(interval: Interval, problem: MoEProblem, where: FirstOutput) -> Interval:
    return _to_format(interval, problem.carrier) if where == "input" else interval


def _to_format(interval: Interval, fmt: FloatFormat) -> Interval:
    low, high = (round_to(to_float32(end), fmt) for end in interval)
    return low, high


def _first_range(trace: RecipeTrace, error: Tensor) -> Interval:
    """Where the first GEMM's result may lie as the activation gets it."""
    problem = trace.problem
    interval = trace.first - error, trace.first + error
    if not keeps_float8(problem):
        return _rounded(interval, problem, problem.recipe.gemm1_output)
    parts = (values.chunk(problem.halves, dim=-1) for values in (*interval, to_float32(trace.first)))
    kept = [_kept_in_float8(problem, *ends) for ends in zip(*parts, strict=True)]
    return torch.cat([low for low, _ in kept], dim=-1), torch.cat([high for _, high in kept], dim=-1)


def _kept_in_float8(problem: MoEProblem, low: Tensor, high: Tensor, nominal: Tensor) -> Interval:
    """A gate's or an up's part: range of the codes times their scale, whose product is rounded to fp32."""
    smallest, largest = (group_amax(end, FIRST_GROUP) for end in _magnitudes(low, high))
    small, large = _scale_interval(problem, first_scales(problem, nominal), smallest, largest)
    if problem.recipe.scale_rounding == "power_of_two":
        ends = [_quantised(problem, (low, high), (scale, scale), scale, FIRST_GROUP) for scale in (small, large)]
        bottom, top = torch.minimum(ends[0][0], ends[1][0]), torch.maximum(ends[0][1], ends[1][1])
    else:
        ones = torch.ones_like(small)
        bottom, top = _quantised(problem, (low, high), (small, large), ones, FIRST_GROUP)
        small, large = (spread(scale, FIRST_GROUP, low.shape[1]) for scale in (small, large))
        bottom, top = bottom * torch.where(bottom < 0, large, small), top * torch.where(top < 0, small, large)
    return bottom - U * bottom.abs(), top + U * top.abs()


def activation_range(activation: Activation, first: Interval, gate: FloatFormat | None = None) -> Interval:
    """Range of the activation over the box of gate and up, and the errors of evaluating it in fp32.

    `gate`: what the gate's part is rounded to before the product, which then has all of its errors but the last ones.
    """
    if activation.linear is None:
        low, high = _curve_range(activation, first)
        return _widened(activation, low, high, first, torch.ones_like(low))
    (gate_low, up_low), (gate_high, up_high) = first[0].chunk(2, dim=-1), first[1].chunk(2, dim=-1)
    arguments = gate_low, gate_high
    curve = _curve_range(activation, arguments)
    if gate is not None:
        curve = _to_format(_widened(activation, *curve, arguments, torch.ones_like(gate_low)), gate)
    linear = activation.linear(up_low), activation.linear(up_high)
    corners = torch.stack([left * right for left in curve for right in linear])
    low, high = corners.amin(0), corners.amax(0)
    if gate is not None:
        wider = UP_ROUNDINGS * U * torch.maximum(low.abs(), high.abs())
        return low - wider, high + wider
    magnitude = torch.maximum(linear[0].abs(), linear[1].abs())
    return _widened(activation, low, high, arguments, magnitude)


def _curve_range(activation: Activation, values: Interval) -> Interval:
    ends = [activation.curve(end) for end in values]
    low, high = torch.minimum(*ends), torch.maximum(*ends)
    if activation.minimum is not None:
        inside = (values[0] < activation.minimum) & (values[1] > activation.minimum)
        lowest = activation.curve(torch.full_like(low, activation.minimum))
        low = torch.where(inside, lowest, low)
    return low, high


def _widened(activation: Activation, low: Tensor, high: Tensor, gate: Interval, linear: Tensor) -> Interval:
    argument = torch.maximum(gate[0].abs(), gate[1].abs())
    relative = (ACTIVATION_ROUNDINGS + activation.exponential_slope * argument) * U
    wider = relative * torch.maximum(low.abs(), high.abs())
    if activation.erf:
        wider = wider + ERF_ROUNDINGS * U * argument * linear
    return low - wider, high + wider


def _magnitudes(low: Tensor, high: Tensor) -> Interval:
    """Smallest and largest magnitude in each interval."""
    smallest = torch.where((low <= 0) & (high >= 0), 0.0, torch.minimum(low.abs(), high.abs()))
    return smallest, torch.maximum(low.abs(), high.abs())


def _amax(problem: MoEProblem, pairs: Pairs, values: Tensor, group: GroupShape) -> Tensor:
    """(P, groups), of whatever shares a dynamic scale."""
    amax = group_amax(values, group)
    return _shared(problem, pairs, amax) if group.is_per_tensor() else amax


def _scale_interval(problem: MoEProblem, nominal: Tensor, smallest: Tensor, largest: Tensor) -> Interval:
    """(P, groups) smallest and largest admissible dynamic scale, from those of its amax."""
    ends = []
    for amax, rounding in ((smallest, 1 - SCALE_ROUNDINGS * U), (largest, 1 + SCALE_ROUNDINGS * U)):
        scale = amax.clamp(min=problem.recipe.of_intermediate.amax_floor) / problem.fp8.largest * rounding
        ends.append(up_to_power_of_two(scale) if problem.recipe.scale_rounding == "power_of_two" else scale)
    return torch.minimum(ends[0], nominal), torch.maximum(ends[1], nominal)


def _shared(problem: MoEProblem, pairs: Pairs, amax: Tensor) -> Tensor:
    """The amax of all that shares a per-tensor scale, among the pairs that are kept (`WITNESS_MARGIN`)."""
    if problem.recipe.dynamic_tensor_scope == "batch":
        return amax.amax().expand_as(amax) if amax.numel() else amax
    per_expert = amax.new_zeros(problem.config.num_local_experts)
    return per_expert.scatter_reduce(0, pairs.expert, amax[:, 0], "amax")[pairs.expert, None]


def _quantised(problem: MoEProblem, values: Interval, scales: Interval, unit: Tensor, group: GroupShape) -> Interval:
    """Range of the dequantised codes, in units of the scale `unit`."""
    columns = values[0].shape[1]
    small, large, factor = (spread(scale, group, columns) for scale in (*scales, unit))
    wide, narrow = 1 + QUOTIENT_ROUNDINGS * U, 1 - QUOTIENT_ROUNDINGS * U
    low, high = values
    bottom = torch.where(low < 0, low / small * wide, low / large * narrow)
    top = torch.where(high < 0, high / large * narrow, high / small * wide)
    return round_to(bottom, problem.fp8) * factor, round_to(top, problem.fp8) * factor
