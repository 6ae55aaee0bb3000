"""The declared quantisation of activations: amax, scale, rounding; bit for bit, in float64 that holds float32."""

from __future__ import annotations

import torch
from torch import Tensor

from fp8moe.approximate_reciprocal import approximate_reciprocal
from fp8moe.keys import GroupShape
from fp8moe.recipe import Recipe
from fp8moe.reference.rounding import FloatFormat, round_to, to_float32, up_to_power_of_two


def columns_of(group: GroupShape, columns: int) -> int:
    """Columns of a row that share a scale."""
    return min(group.col, columns) if group.is_per_group() else columns


def group_amax(values: Tensor, group: GroupShape) -> Tensor:
    """Largest magnitude of each row's groups of columns, the last one partial: (P, K) to (P, groups)."""
    width = columns_of(group, values.shape[1])
    magnitude = torch.nn.functional.pad(values.abs(), (0, -values.shape[1] % width))
    return magnitude.view(values.shape[0], magnitude.shape[1] // width, width).amax(-1)


def spread(per_group: Tensor, group: GroupShape, columns: int) -> Tensor:
    """One value for each column, from one for each group: (P, groups) to (P, columns)."""
    width = columns_of(group, columns)
    return per_group if width == columns else per_group.repeat_interleave(width, dim=1)[:, :columns]


def scale_of(amax: Tensor, fmt: FloatFormat, recipe: Recipe) -> Tensor:
    """fp32(amax / largest), or fp32(amax * fp32(1 / largest)) or the reciprocal of `factor_of` where declared, with the
    floor under the amax; rounded up to a power of two where declared."""
    if recipe.by_factor:
        return to_float32(1.0 / factor_of(amax, fmt, recipe))
    floor = float(torch.tensor(recipe.amax_floor, dtype=torch.float32))
    # Operands are float32 numbers, so a float64 quotient rounded to float32 is the IEEE quotient (53 >= 2*24 + 2), and
    # a float64 product is exact (48 bits).
    amax = amax.clamp(min=floor)
    if recipe.scale_division == "divide":
        scale = to_float32(amax / fmt.largest)
    else:
        scale = to_float32(amax * float(torch.tensor(1.0 / fmt.largest, dtype=torch.float32)))
    return up_to_power_of_two(scale) if recipe.scale_rounding == "power_of_two" else scale


def factor_of(amax: Tensor, fmt: FloatFormat, recipe: Recipe) -> Tensor:
    """fp32(largest * fp32(1 / amax)), with the floor under the amax: what "inverse" multiplies values with; of an
    approximate reciprocal where declared."""
    amax = amax.clamp(min=float(torch.tensor(recipe.amax_floor, dtype=torch.float32)))
    if recipe.scale_division == "approximate_inverse":
        return to_float32(fmt.largest * approximate_reciprocal(amax.float()).to(amax.dtype))
    return to_float32(fmt.largest * to_float32(1.0 / amax))


def scaled(values: Tensor, scale: Tensor, recipe: Recipe, factor: Tensor | None = None) -> Tensor:
    """What is rounded to FP8: value / scale in float32, or value * fp32(1 / scale), or value * factor."""
    if factor is not None:
        return to_float32(values * factor)
    if recipe.scaling == "divide":
        return to_float32(values / scale)
    return to_float32(values * to_float32(1.0 / scale))


def quantised(
    values: Tensor, scale: Tensor, fmt: FloatFormat, recipe: Recipe, group: GroupShape | None = None
) -> Tensor:
    """Quantised and dequantised; `values` are float32 numbers and `scale` broadcasts to them.

    `group`: what shares a scale; None, or a tensor, where `scale` alone says how.
    """
    factor = None
    if recipe.by_factor and group is not None and not group.is_per_tensor():
        factor = spread(factor_of(group_amax(values, group), fmt, recipe), group, values.shape[1])
    return round_to(scaled(values, scale, recipe, factor), fmt) * scale
