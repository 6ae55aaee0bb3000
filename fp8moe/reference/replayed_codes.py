"""The replay's quantisation, of activations and of weights: in fp32, by its bits."""

from __future__ import annotations

import torch
from torch import Tensor

from fp8moe.keys import GroupShape
from fp8moe.recipe import REQUANTISED_FLOOR, Recipe
from fp8moe.reference.rounding import FloatFormat

BLOCK = 128
REQUANTISING = Recipe(scale_rounding="power_of_two", amax_floor=REQUANTISED_FLOOR)
"""How weights are quantised anew."""


def rounded_to_fp8(values: Tensor, fmt: FloatFormat) -> Tensor:
    """fp32 to the nearest number of an FP8 format, ties to even, saturating; NaN stays NaN. By the bits of fp32."""
    exponent = (values.view(torch.int32) >> 23 & 0xFF) - 127
    step = _power_of_two(exponent.clamp(min=fmt.min_exponent, max=100) - (fmt.precision - 1))
    return (torch.round(values / step) * step).clamp(-fmt.largest, fmt.largest)


def _power_of_two(exponent: Tensor) -> Tensor:
    return ((exponent + 127) << 23).view(torch.float32)


def scale_from(amax: Tensor, fmt: FloatFormat, recipe: Recipe) -> Tensor:
    """fp32 scales: max(amax, floor) / largest, one IEEE division, or times the reciprocal of largest; rounded up to a
    power of two where declared, a normal number."""
    amax, largest = amax.clamp(min=recipe.amax_floor), torch.full_like(amax, fmt.largest)
    scale = amax / largest if recipe.scale_division == "divide" else amax * (torch.ones_like(largest) / largest)
    if recipe.scale_rounding == "continuous":
        return scale
    bits = scale.view(torch.int32)
    up = ((bits + 0x7FFFFF) >> 23 << 23).clamp(min=1 << 23).view(torch.float32)
    return torch.where(torch.isfinite(scale), up, scale)


def codes_of(values: Tensor, scale: Tensor, fmt: FloatFormat, recipe: Recipe) -> Tensor:
    """(rows, K) fp32, its scales (rows, groups) or (rows, 1): the values of the FP8 codes, in fp32."""
    wide = scale if scale.shape[1] == 1 else scale.repeat_interleave(BLOCK, dim=1)[:, : values.shape[1]]
    scaled = values / wide if recipe.scaling == "divide" else values * (torch.ones_like(wide) / wide)
    return rounded_to_fp8(scaled, fmt)


def amaxes(values: Tensor, group: GroupShape) -> Tensor:
    """(rows, groups): of each group of columns, or of the whole row. NaN in a group makes its amax NaN."""
    if not group.is_per_group():
        return values.abs().amax(-1, keepdim=True)
    padded = torch.nn.functional.pad(values.abs(), (0, -values.shape[1] % BLOCK))
    return padded.view(len(values), padded.shape[1] // BLOCK, BLOCK).amax(-1)


def requantised(codes: Tensor, scale: Tensor, group: GroupShape, parts: int, fmt: FloatFormat) -> tuple[Tensor, Tensor]:
    """A layer's weights quantised anew with scales that are powers of two, expert by expert: codes and scales of the
    same shapes.

    Args:
        codes: (E, N, K).
        scale: by the groups of the scheme.
        parts: of N, whose blocks are apart.
    """
    parts = parts if group.is_block() else 1
    rows, columns = codes.shape[1] // parts, codes.shape[2]
    high, wide = (BLOCK, BLOCK) if group.is_block() else (1 if group.is_per_channel() else rows, columns)
    grid = (parts, -(-rows // high), -(-columns // wide))

    def over(per_tile: Tensor) -> Tensor:
        return per_tile.repeat_interleave(high, 1)[:, :rows].repeat_interleave(wide, 2)[:, :, :columns]

    found, scales = torch.empty_like(codes), torch.empty_like(scale)
    for expert in range(len(codes)):
        values = codes[expert].float().view(parts, rows, columns) * over(scale[expert].reshape(grid))
        padded = torch.nn.functional.pad(values.abs(), (0, -columns % wide, 0, -rows % high))
        amax = padded.view(*grid[:2], high, grid[2], wide).amax((2, 4))
        powers = scale_from(amax, fmt, REQUANTISING)
        found[expert] = rounded_to_fp8(values / over(powers), fmt).view(-1, columns).to(codes.dtype)
        scales[expert] = powers.view(scale.shape[1:])
    return found, scales
