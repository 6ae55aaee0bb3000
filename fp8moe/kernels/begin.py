"""What a call with few tokens begins with, by one launch: the pairs' tiles, and the tokens' codes.

Neither needs the other, and each takes about as long as its launch does.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp8moe.kernels.few import FewPlaced, few_arguments, place_few_pairs_kernel, programs_of
from fp8moe.kernels.fp8_cast import has_cast, scaled_to_e4m3
from fp8moe.kernels.interpreter import INTERPRETED
from fp8moe.kernels.quantize import amax_bits, scale_of
from fp8moe.kernels.widths import to_float32

GROUPS = 4
"""Groups of columns of one program: one for each warp."""
GROUPS_INTERPRETED = 256
"""The interpreter's time goes with the number of programs."""


@triton.jit(do_not_specialize=["pairs", "limit", "experts", "tiles", "pad", "placing", "rows"])
def begin_kernel(
    ids,
    expert_map,
    local_ids,
    pair_of_row,
    owners,
    count,
    pairs,
    limit,
    experts,
    tiles,
    pad,
    placing,
    x,
    codes,
    scales,
    rows,
    columns,
    stride_row,
    stride_column,
    HAS_MAP: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    PADDING: tl.constexpr,
    EXPERTS: tl.constexpr,
    OWN: tl.constexpr,
    CHUNK: tl.constexpr,
    HAS_CAST: tl.constexpr,
    AMAX_FLOOR: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """The first `placing` programs place, for they take longest; each of the others quantises some groups, columns
    fastest."""
    if tl.program_id(0) < placing:
        place_few_pairs_kernel(
            ids,
            expert_map,
            None,
            local_ids,
            None,
            pair_of_row,
            owners,
            count,
            pairs,
            limit,
            experts,
            tiles,
            pad,
            HAS_MAP,
            False,
            TILE_ROWS,
            PADDING,
            EXPERTS,
            OWN,
            CHUNK,
        )
    else:
        groups = (columns + GROUP - 1) // GROUP
        number = (tl.program_id(0) - placing) * GROUPS + tl.arange(0, GROUPS)
        row = (number // groups).to(tl.int64)
        there = row < rows
        column = ((number % groups) * GROUP)[:, None] + tl.arange(0, GROUP)[None, :]
        mask = there[:, None] & (column < columns)
        column = column.to(tl.int64)
        value = to_float32(tl.load(x + row[:, None] * stride_row + column * stride_column, mask=mask, other=0.0))
        scale = scale_of(amax_bits(value), AMAX_FLOOR)
        tl.store(codes + row[:, None] * columns + column, scaled_to_e4m3(value, scale, HAS_CAST), mask=mask)
        tl.store(scales + number, scale, mask=there)


def begin(
    x: Tensor,
    topk_ids: Tensor,
    experts: int,
    tiles: int,
    tile_rows: int,
    expert_map: Tensor | None = None,
    *,
    group: int = 128,
    amax_floor: float = 1e-10,
) -> tuple[FewPlaced, Tensor, Tensor]:
    """`few.place_few_pairs` without weights, and `quantize.quantize_per_token_group`: the same numbers, to the bit.

    Args:
        x: (M, columns) bf16, fp16 or fp32, M at least 1; any strides.
        topk_ids: (M, top_k); they and what follows: `few.place_few_pairs`.
        group: columns that share a scale, a power of two.
        amax_floor: a scale's least amax.

    Returns:
        The tiles, the codes (M, columns) float8_e4m3fn, and their scales (M, ceil(columns / group)) fp32, both
        row-major.
    """
    rows, columns = x.shape
    groups = triton.cdiv(columns, group)
    codes = torch.empty((rows, columns), dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty((rows, groups), dtype=torch.float32, device=x.device)
    placed, arguments = few_arguments(topk_ids, experts, tiles, tile_rows, expert_map, pad=-1)
    each = GROUPS_INTERPRETED if INTERPRETED else GROUPS
    placing = programs_of(topk_ids.numel(), experts)
    begin_kernel[(placing + triton.cdiv(rows * groups, each),)](
        placing=placing,
        x=x,
        codes=codes.view(torch.uint8),
        scales=scales,
        rows=rows,
        columns=columns,
        stride_row=x.stride(0),
        stride_column=x.stride(1),
        HAS_CAST=has_cast(x.device),
        AMAX_FLOOR=amax_floor,
        GROUP=group,
        GROUPS=each,
        enable_fp_fusion=False,
        **arguments,
    )
    return placed, codes, scales
