"""Dynamic FP8 quantisation of rows in groups of columns: one fp32 scale for each row and group."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp8moe.kernels.fp8_cast import float32_to_e4m3
from fp8moe.kernels.widths import to_float32

ROWS = 16
"""Rows of one program: enough of them to keep a warp busy on 128 columns, and few programs for the interpreter."""


@triton.jit
def quantize_groups(x, AMAX_FLOOR: tl.constexpr):
    """(rows, group) fp32 to uint8 codes of the same shape and (rows,) fp32 scales.

    The amax is the maximum of the bits without the sign, which order as the magnitudes do with NaN above infinity:
    so a NaN makes its group's scale NaN, on every device.
    """
    bits = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)
    amax = bits.to(tl.float32, bitcast=True)
    amax = tl.where(amax < AMAX_FLOOR, AMAX_FLOOR, amax)
    scale = tl.div_rn(amax, tl.full(amax.shape, 448.0, tl.float32))
    quotient = tl.div_rn(x, tl.broadcast_to(scale[:, None], x.shape))
    return float32_to_e4m3(quotient), scale


@triton.jit(do_not_specialize=["rows"])
def quantize_kernel(
    x,
    codes,
    scales,
    rows,
    columns,
    stride_row,
    stride_column,
    AMAX_FLOOR: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
):
    groups = tl.cdiv(columns, GROUP)
    group = tl.program_id(0) % groups
    row = ((tl.program_id(0) // groups) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = group * GROUP + tl.arange(0, GROUP)
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    offsets = row[:, None] * stride_row + column.to(tl.int64)[None, :] * stride_column
    value, scale = quantize_groups(to_float32(tl.load(x + offsets, mask=mask, other=0.0)), AMAX_FLOOR)
    tl.store(codes + row[:, None] * columns + column[None, :], value, mask=mask)
    tl.store(scales + row * groups + group, scale, mask=row < rows)


def quantize_per_token_group(x: Tensor, *, group: int = 128, amax_floor: float = 1e-10) -> tuple[Tensor, Tensor]:
    """Quantises each row's groups of `group` columns to e4m3fn.

    Recipe: scale = max(amax, amax_floor) / 448 and code = x / scale, both IEEE divisions in fp32, then to nearest,
    ties to even, saturating. The last group may be partial. A NaN makes its whole group NaN.

    Args:
        x: (rows, columns) bf16, fp16 or fp32; any strides, no alignment needed.
        group: a power of two.

    Returns:
        (rows, columns) float8_e4m3fn and (rows, ceil(columns / group)) fp32, both row-major.
    """
    rows, columns = x.shape
    groups = triton.cdiv(columns, group)
    codes = torch.empty((rows, columns), dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty((rows, groups), dtype=torch.float32, device=x.device)
    if rows:
        # One program a block of rows and a group, groups fastest: neighbours read neighbouring columns.
        quantize_kernel[(triton.cdiv(rows, ROWS) * groups,)](
            x,
            codes.view(torch.uint8),
            scales,
            rows,
            columns,
            x.stride(0),
            x.stride(1),
            AMAX_FLOOR=amax_floor,
            GROUP=group,
            ROWS=ROWS,
            num_warps=4,
            enable_fp_fusion=False,
        )
    return codes, scales
