"""What an honest output may differ by from the recipe oracle's: B0, errors that add up, and F, flipped roundings.

Formulas 1 to 4 of spec/bounds.md, computed expert by expert from the case's own numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from conformance.bounds.accumulation import UNKNOWN, U, accumulation_error, grouped_products
from conformance.bounds.intermediate import Spread, groups_of, intermediate_spread
from fp8moe.recipe import FP32, Arithmetic
from fp8moe.reference.problem import MoEProblem, Pairs
from fp8moe.reference.recipe import RecipeTrace, combined, first_input
from fp8moe.reference.rounding import BFLOAT16, FloatFormat, spacing


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
    """hulp: half the distance of neighbouring numbers at each value, 2^(floor(log2 |v|) - precision), floor included."""
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
    spread = intermediate_spread(trace, error)
    smooth, flips = _second_gemm(trace, arithmetic, spread)
    return Allowance(arithmetic, *_combined(problem, trace, smooth, flips), spread)


def product_bits(problem: MoEProblem, quantised: bool) -> int:
    """Fraction bits of a product of two inputs of the matrix unit, an FP8 weight being widened to a 16-bit input's."""
    one = (problem.fp8 if quantised else problem.carrier).precision - 1
    return min(2 * one, 2 * (problem.carrier.precision - 1))


def first_gemm_error(trace: RecipeTrace, arithmetic: Arithmetic) -> Tensor:
    """(P, 2I or I): bound of the error of the first GEMM's result."""
    problem, pairs = trace.problem, trace.pairs
    inputs = first_input(problem, pairs)
    bits = product_bits(problem, problem.quant.a1.dtype is not None)
    error = torch.zeros_like(trace.first)
    for expert, rows in pairs.segments():
        for columns, weight in problem.weight_chunks("w13", expert):
            error[rows, columns] = accumulation_error(inputs[rows], weight, arithmetic, bits)
    return error + U * trace.first.abs()


def _second_gemm(trace: RecipeTrace, arithmetic: Arithmetic, spread: Spread) -> tuple[Tensor, Tensor]:
    """(P, H) each: eps_y + sum_g rho_g (|y_g| + sum U |W2|) and, where the intermediate jumps, sum U |W2|."""
    problem, pairs, values = trace.problem, trace.pairs, trace.intermediate
    bits = product_bits(problem, spread.group is not None)
    farthest = spread.farthest
    width = groups_of(spread, values.shape[1])
    widened = farthest * spread.relative.repeat_interleave(width, dim=1)[:, : values.shape[1]]
    smooth, flips = torch.zeros_like(trace.second), torch.zeros_like(trace.second)
    for expert, rows in pairs.segments():
        for columns, weight in problem.weight_chunks("w2", expert):
            magnitude = weight.abs().t()
            error = accumulation_error(values[rows], weight, arithmetic, bits)
            if spread.group is not None:
                parts = grouped_products(values[rows], weight, width).abs()
                error += (parts * spread.relative[rows].t()[:, :, None]).sum(0) + widened[rows] @ magnitude
            jumps = farthest[rows] @ magnitude
            if spread.flips:
                flips[rows, columns] = jumps
            else:
                error += jumps
            smooth[rows, columns] = error
    return smooth + U * trace.second.abs(), flips


def _combined(problem: MoEProblem, trace: RecipeTrace, smooth: Tensor, flips: Tensor) -> tuple[Tensor, Tensor]:
    """(T, H) each: over a token's slots, with one half spacing for every declared rounding on the way."""
    pairs, recipe, top_k = trace.pairs, problem.recipe, problem.topk_ids.shape[1]
    if recipe.gemm2_output == "input":
        smooth = smooth + half_spacing(trace.second.abs() + smooth + flips, problem.carrier)
    # Products with the routing weight, k additions, the conversion: (k + 2) u of every term.
    smooth = smooth + (top_k + 2) * U * trace.second.abs()
    weighted = _absolute_weights(pairs)
    base = combined(problem, weighted, smooth, "float32", "float32")
    jumps = combined(problem, weighted, flips, "float32", "float32")
    if recipe.combine == "input":
        running = torch.zeros_like(base)
        for slot in range(top_k):
            here = pairs.take((pairs.slot == slot).nonzero()[:, 0])
            term = combined(problem, here, trace.second[pairs.slot == slot], "float32", "float32")
            running += term
            present = torch.zeros(len(running), 1, dtype=torch.bool, device=running.device)
            present[here.token[here.token >= 0]] = True
            base = base + present * half_spacing(running.abs() + base + jumps, problem.carrier)
    return base, jumps


def _absolute_weights(pairs: Pairs) -> Pairs:
    return Pairs(pairs.row, pairs.token, pairs.slot, pairs.expert, pairs.weight.abs())


__all__ = ["BFLOAT16", "Allowance", "allowance_for", "first_gemm_error", "half_spacing", "widest_allowance"]
