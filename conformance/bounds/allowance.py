"""What an honest output may differ by from the recipe oracle's: B0, errors that add up, and F, flipped roundings.

Formulas 1 to 4 of the specification of error bounds, computed expert by expert from the case's own numbers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from conformance.bounds.accumulation import UNKNOWN, Operands, U, accumulation_error, grouped_products
from conformance.bounds.intermediate import Spread, intermediate_spread
from fp8moe.recipe import FP32, Arithmetic
from fp8moe.reference.problem import MoEProblem, Pairs
from fp8moe.reference.quantisation import columns_of, spread
from fp8moe.reference.recipe import RecipeTrace, combined, first_input, input_scale
from fp8moe.reference.rounding import FloatFormat, spacing


@dataclass(frozen=True, eq=False)
class Allowance:
    """How far |output - trace.smooth| may be before the output's own rounding.

    Args:
        arithmetic: what it was computed for; `UNKNOWN` where the backend declares nothing.
        smooth: (T, H) B0.
        flips: (T, H) F.
        spread: of the intermediate, for every pair of the trace.
    """

    arithmetic: Arithmetic
    smooth: Tensor
    flips: Tensor
    spread: Spread

    @property
    def total(self) -> Tensor:
        return self.smooth + self.flips


def half_spacing(values: Tensor, fmt: FloatFormat) -> Tensor:
    """hulp: half the distance of neighbours at each value, 2^(floor(log2 |v|) - precision), floor included."""
    return spacing(values, fmt) / 2


def allowance_for(trace: RecipeTrace, arithmetic: Arithmetic | None) -> Allowance:
    """The allowance for a backend of this arithmetic; None is judged as `UNKNOWN`. Kept with the trace."""
    arithmetic = UNKNOWN if arithmetic is None else arithmetic
    if arithmetic not in trace.kept:
        trace.kept[arithmetic] = _allowance(trace, arithmetic)
    found: Allowance = trace.kept[arithmetic]
    return found


def widest_allowance(trace: RecipeTrace) -> Allowance:
    """Of those computed with this trace so far the widest; that of fp32 where there is none."""
    known = [value for value in trace.kept.values() if isinstance(value, Allowance)]
    return max(known, key=lambda value: float(value.total.sum())) if known else allowance_for(trace, FP32)


def _allowance(trace: RecipeTrace, arithmetic: Arithmetic) -> Allowance:
    problem = trace.problem
    error = first_gemm_error(trace, arithmetic)
    around = intermediate_spread(trace, error)
    smooth, flips = _second_gemm(trace, arithmetic, around)
    return Allowance(arithmetic, *_combined(problem, trace, smooth, flips), around)


def first_gemm_error(trace: RecipeTrace, arithmetic: Arithmetic) -> Tensor:
    """(P, 2I or I): bound of the error of the first GEMM's result."""
    problem, pairs = trace.problem, trace.pairs
    inputs = first_input(problem, pairs)
    group = problem.activation_group(problem.a1)
    scale = None
    if group is not None and arithmetic.fraction_bits is not None:
        scale = spread(input_scale(problem, pairs), group, inputs.shape[1])
    error = torch.zeros_like(trace.first)
    for expert, rows in pairs.segments():
        for columns, weight in problem.weight_chunks("w13", expert):
            least = None if scale is None else scale[rows]
            operands = _operands(problem, "w13", expert, columns, inputs[rows], weight, least)
            found = accumulation_error(operands, arithmetic) + problem.underflow("w13", expert, columns)
            result = trace.first[rows, columns]
            error[rows, columns] = found + before_bias(problem, "w13", expert, columns, result, found)
    return error + U * trace.first.abs()


def before_bias(
    problem: MoEProblem, name: str, expert: int, columns: slice, result: Tensor, error: Tensor
) -> Tensor | float:
    """Half a spacing of a GEMM's result without the bias, where it is rounded before that is added.

    Args:
        result, error: with bias, and what it is known to.
    """
    bias = problem.bias(name, expert)
    if bias is None or problem.recipe.bias != "input":
        return 0.0
    return half_spacing((result - bias[columns]).abs() + error, problem.carrier)


def _operands(
    problem: MoEProblem, name: str, expert: int, columns: slice, a: Tensor, weight: Tensor, scale: Tensor | None
) -> Operands:
    """The two sides of a GEMM with rows `columns` of an expert's matrix.

    `scale` is that of each element of `a`; None where exponents do not matter, or where `a` holds 16-bit numbers, to
    which FP8 weights are widened.
    """
    nothing = torch.zeros(1, 1, dtype=torch.float64, device=a.device)
    if scale is None:
        return Operands(a, weight, nothing, nothing, 2 * (problem.carrier.precision - 1))
    smallest = 2.0**problem.fp8.min_exponent
    known = problem.weight_scale(name, expert, torch.arange(columns.start, columns.stop, device=a.device))
    assert known is not None
    group = problem.quant.w1.shape
    width = group.col if group is not None and group.is_block() else weight.shape[1]
    least_weight = smallest * known.repeat_interleave(width, dim=1)[:, : weight.shape[1]]
    return Operands(a, weight, smallest * scale, least_weight, 2 * (problem.fp8.precision - 1))


def _second_gemm(trace: RecipeTrace, arithmetic: Arithmetic, around: Spread) -> tuple[Tensor, Tensor]:
    """(P, H) each: eps_y + sum_g rho_g (|y_g| + sum U |W2|) and, where the intermediate jumps, sum U |W2|."""
    problem, pairs, values = trace.problem, trace.pairs, trace.intermediate
    farthest = around.farthest
    group, inter = around.group, values.shape[1]
    scale = None if group is None or arithmetic.fraction_bits is None else spread(trace.scale, group, inter)
    smooth, flips = torch.zeros_like(trace.second), torch.zeros_like(trace.second)
    for expert, rows in pairs.segments():
        for columns, weight in problem.weight_chunks("w2", expert):
            magnitude = weight.abs().t()
            least = None if scale is None else scale[rows]
            operands = _operands(problem, "w2", expert, columns, values[rows], weight, least)
            error = accumulation_error(operands, arithmetic) + problem.underflow("w2", expert, columns)
            if group is not None:
                relative = around.relative[rows]
                parts = grouped_products(values[rows], weight, columns_of(group, inter)).abs()
                widened = farthest[rows] * spread(relative, group, inter)
                error += (parts * relative.t()[:, :, None]).sum(0) + widened @ magnitude
            jumps = farthest[rows] @ magnitude
            if around.flips:
                flips[rows, columns] = jumps
            else:
                error += jumps
            result = trace.second[rows, columns]
            smooth[rows, columns] = error + before_bias(problem, "w2", expert, columns, result, error)
    return smooth + U * trace.second.abs(), flips


def _combined(problem: MoEProblem, trace: RecipeTrace, smooth: Tensor, flips: Tensor) -> tuple[Tensor, Tensor]:
    """(T, H) each: over a token's slots, with one half spacing for every declared rounding on the way."""
    pairs, recipe, top_k = trace.pairs, problem.recipe, problem.topk_ids.shape[1]
    if recipe.gemm2_output == "input":
        smooth = smooth + half_spacing(trace.second.abs() + smooth + flips, problem.carrier)
    # Products with the routing weight, k additions, the conversion: (k + 2) u of every term.
    smooth = smooth + (top_k + 2) * U * trace.second.abs()
    weighted = _absolute_weights(pairs)
    base = combined(problem, weighted, smooth)
    jumps = combined(problem, weighted, flips)
    if recipe.weighted == "input":
        terms = weighted.weight[:, None] * (trace.second.abs() + smooth + flips)
        alone = replace(pairs, weight=torch.ones_like(pairs.weight))
        base = base + combined(problem, alone, half_spacing(terms, problem.carrier))
    if recipe.combine == "input":
        running = torch.zeros_like(base)
        for slot in range(top_k):
            here = pairs.take((pairs.slot == slot).nonzero()[:, 0])
            term = combined(problem, here, trace.second[pairs.slot == slot])
            running += term
            present = torch.zeros(len(running), 1, dtype=torch.bool, device=running.device)
            present[here.token[here.token >= 0]] = True
            base = base + present * half_spacing(running.abs() + base + jumps, problem.carrier)
    return base, jumps


def _absolute_weights(pairs: Pairs) -> Pairs:
    return Pairs(pairs.row, pairs.token, pairs.slot, pairs.expert, pairs.weight.abs())
