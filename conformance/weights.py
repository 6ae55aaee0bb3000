"""A layer's weights, drawn as FP8 codes and fp32 scales in the checkpoint's layout; 16 bit where unquantised."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from conformance.codes import LARGEST_CODE, SIGN, decoded
from conformance.draw import Draw
from conformance.regimes import GROUP, WIDE_BINADES, Regime, power_of_two, wide_channel
from fp8moe.config import FusedMoEConfig
from fp8moe.keys import GroupShape
from fp8moe.validation import scale_shape, weight_rows

BLOCK = GroupShape(GROUP, GROUP)
PRE_ACTIVATION = 1.5
"""Typical size of the first GEMM's results, and of the second's."""
BIAS_SIZE = 0.5
ZERO_BLOCK_ONE_IN = 8
ZERO_BLOCK_SCALES = (0.0, 2.0**-76, 1.0)  # of no use, the size that dead experts have in checkpoints, any
UP_SHIFT = 32  # codes: four binades
CODES_OF_BINADE = 8
WIDE_HALF = WIDE_BINADES // 2


@dataclass(frozen=True)
class Projection:
    """One of the two weights of a layer: (experts, rows, columns), rows in `halves` parts that are blocked apart."""

    name: str
    experts: int
    rows: int
    columns: int
    halves: int

    def grid(self, group: GroupShape) -> tuple[int, ...]:
        """Shape of the scales."""
        return scale_shape(group, self.experts, self.rows, self.columns, self.halves)


def projections(config: FusedMoEConfig) -> tuple[Projection, Projection]:
    """w13 and w2 of a layer."""
    experts, hidden, inter = config.num_local_experts, config.hidden_dim, config.intermediate_size_per_partition
    return (
        Projection("w13", experts, weight_rows(config), hidden, 2 if config.is_act_and_mul else 1),
        Projection("w2", experts, hidden, inter, 1),
    )


def draw_weight(
    draw: Draw, regime: Regime, projection: Projection, group: GroupShape, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Codes as bytes (E, rows, columns), and scales of the group's shape; with a dtype, the codes' numbers in it."""
    table = regime.table() if dtype is None else decoded()[regime.table().long()].to(dtype)
    codes = draw.gather(projection.name, (projection.experts, projection.rows, projection.columns), table)
    scale = regime.scales(draw, f"{projection.name}_scale", projection.grid(group))
    scale = scale * common_scale(regime, projection)
    if projection.halves == 2 and regime.gate_over_up != 1.0:
        _part_gate_and_up(codes, scale, regime.gate_over_up, group)
    if regime.anchors and projection.name == "w13":
        codes[:, :, ::GROUP] = 0
    if regime.wide:
        _widen(codes, projection)
    if regime.one_in > 1:
        _thin_out(codes, regime.one_in)
    if regime.zero_blocks:
        _zero_blocks(draw, projection, codes, scale, group)
    return codes, scale


def common_scale(regime: Regime, projection: Projection) -> float:
    """What makes the projection's results of the size `PRE_ACTIVATION`."""
    first = projection.name == "w13"
    reach = "root" if regime.reach in ("one", "group") and not first else regime.reach
    growth = {
        "root": math.sqrt(projection.columns),
        "all": float(projection.columns),
        "one": 1.0,
        "group": math.sqrt(min(projection.columns, GROUP)),
    }[reach]
    inputs = regime.hidden_size if first else 1.0
    scale = PRE_ACTIVATION / (inputs * regime.code_size * regime.scale_size * growth)
    return 2.0 ** math.frexp(scale)[1] if regime.powers_of_two else scale


def _part_gate_and_up(codes: Tensor, scale: Tensor, ratio: float, group: GroupShape) -> None:
    """Gate larger, up smaller; by their scales where they have their own, else by their codes."""
    larger = math.sqrt(ratio)
    if not group.is_per_tensor():
        half = scale.shape[1] // 2
        scale[:, :half] *= larger
        scale[:, half:] /= larger
        return
    scale *= larger
    for start in range(codes.shape[1] // 2, codes.shape[1], GROUP):
        _divide(codes[:, start : start + GROUP], UP_SHIFT)


def _divide(codes: Tensor, shift: Tensor | int) -> None:
    """Codes by 2^(shift / 8), in place; what falls below the smallest normal number loses bits."""
    sign = codes & SIGN
    magnitude = codes & (LARGEST_CODE + 1)
    codes.copy_((torch.maximum(magnitude, magnitude.new_zeros(()) + shift) - shift) | sign)


def _widen(codes: Tensor, projection: Projection) -> None:
    """Gate and up rows over six binades each, so the intermediate over twelve, and w2's columns against it; w13's
    columns are louder by half of what the channels are quieter by.

    FP8 numbers have 15 binades; the quietest rows meet the loudest channels with weights that are partly subnormal.
    """
    rows = torch.zeros(projection.rows, dtype=torch.int64, device=codes.device)
    if projection.name == "w13":
        in_half = torch.arange(projection.rows // projection.halves, device=codes.device)
        rows = (in_half % (WIDE_HALF + 1)).repeat(projection.halves)
        columns = (WIDE_BINADES - wide_channel(projection.columns, codes.device)) // 2
    else:
        element = torch.arange(projection.columns, device=codes.device)
        columns = 2 * (WIDE_HALF - element % (WIDE_HALF + 1))
    if codes.dtype != torch.uint8:
        codes.mul_(power_of_two(-rows)[:, None]).mul_(power_of_two(-columns))
        return
    shift = (rows * CODES_OF_BINADE).to(torch.uint8)[:, None] + (columns * CODES_OF_BINADE).to(torch.uint8)
    for expert in codes:
        _divide(expert, shift)


def _thin_out(codes: Tensor, one_in: int) -> None:
    """Zeroes all columns of a row but every so many, starting elsewhere in each row; in place."""
    row, column = (torch.arange(size, device=codes.device) for size in codes.shape[1:])
    codes.masked_fill_((row[:, None] + column) % one_in != 0, 0)


def _zero_blocks(draw: Draw, projection: Projection, codes: Tensor, scale: Tensor, group: GroupShape) -> None:
    """Zeroes blocks of every expert, and the first expert of several; their scales become degenerate."""
    grid = projection.grid(BLOCK)
    name = f"{projection.name}_zero"
    zero = draw.integers(name, grid, ZERO_BLOCK_ONE_IN) == 0
    blocks = grid[1] * grid[2]
    if blocks > 1:
        zero.view(grid[0], blocks)[:, int(draw.integers(f"{name}/one", (1,), blocks))] = True
    else:
        zero[:] = False
    if projection.experts > 1:
        zero[0] = True
    for rows, block in _row_blocks(projection):
        kept = (~zero[:, block]).to(torch.uint8).repeat_interleave(GROUP, dim=1)[:, None, : projection.columns]
        codes[:, rows] *= kept
    degenerate = torch.tensor(ZERO_BLOCK_SCALES, device=draw.device)
    if group == BLOCK:
        chosen = draw.integers(f"{name}/scale", grid, len(ZERO_BLOCK_SCALES))
        scale.copy_(torch.where(zero, scale * degenerate[chosen], scale))
    elif projection.experts > 1:
        scale[0] *= degenerate[draw.integers(f"{name}/scale", tuple(scale[0].shape), len(ZERO_BLOCK_SCALES))]


def _row_blocks(projection: Projection) -> list[tuple[slice, int]]:
    """Rows of each block row, and its place among the scales."""
    half = projection.rows // projection.halves
    found: list[tuple[slice, int]] = []
    for part in range(projection.halves):
        for start in range(0, half, GROUP):
            first = part * half
            found.append((slice(first + start, first + min(start + GROUP, half)), len(found)))
    return found


def scaled(projection: Projection, values: Tensor, scale: Tensor) -> Tensor:
    """Values times their block's scales, in place; one rounding to their own dtype."""
    for rows, block in _row_blocks(projection):
        by_column = scale[:, block].repeat_interleave(GROUP, dim=1)[:, None, : projection.columns]
        values[:, rows] = values[:, rows].to(torch.float32).mul_(by_column)
    return values


def as_fn(codes: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Bytes as e4m3fn."""
    return codes.view(torch.float8_e4m3fn), scale


def as_fnuz(codes: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The same numbers in e4m3fnuz (specification section 4): a code stands for half, so scales double; no -0."""
    return codes.masked_fill_(codes == SIGN, 0).view(torch.float8_e4m3fnuz), scale * 2.0


def draw_bias(draw: Draw, projection: Projection, dtype: torch.dtype) -> Tensor:
    """(E, rows)."""
    values = draw.normal(f"{projection.name}_bias", (projection.experts, projection.rows))
    return (BIAS_SIZE * values).to(dtype)
