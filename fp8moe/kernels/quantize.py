"""FP8 quantisation with one fp32 scale for a group of columns, a row or a tensor; the amax is computed here too."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp8moe.kernels.fp8_cast import has_cast, scaled_to_e4m3
from fp8moe.kernels.interpreter import INTERPRETED, rows_of_program
from fp8moe.kernels.widths import to_float32

ROWS = 16
"""Rows of one program for groups: enough of them to keep a warp busy on 128 columns, few programs to interpret."""
FEW_GROUPS = 1024
"""So many groups of so many rows at most get a program of one warp each: there is nothing to hide a program's steps
behind. The activation of 8 rows then takes 1.9 us instead of 4.2 (an H200)."""
LONG_ROWS = 4
LONG_BLOCK = 1024
"""Rows and columns of one program for tensors: as many elements to a thread, in long reads."""
MOST_COLUMNS = 8192
"""Of a row in one step; a longer one takes several, and is read twice."""
COLUMNS_OF_WARP = 512
MOST_WARPS = 16
_OPTIONS: dict[str, Any] = {"num_warps": 4, "enable_fp_fusion": False}


def program_of_groups(rows: int, groups: int) -> dict[str, Any]:
    """Of a kernel with a program for some rows and a group of columns: rows, warps. No bit depends on them."""
    few = rows * groups <= FEW_GROUPS and not INTERPRETED
    return {**_OPTIONS, "ROWS": 1, "num_warps": 1} if few else {**_OPTIONS, "ROWS": rows_of_program(rows, ROWS)}


def block_of_row(columns: int) -> int:
    """Columns of one step of a program that has a whole row."""
    most: int = triton.next_power_of_2(columns)
    return min(most, MOST_COLUMNS)


def warps_of_row(block: int) -> int:
    return min(max(block // COLUMNS_OF_WARP, 1), MOST_WARPS)


@triton.jit
def amax_bits(x):
    """(rows, columns) fp32 to the bits of each row's amax, (rows,) int32.

    Without the sign, bits order as the magnitudes do with NaN above infinity: so a NaN is the amax, on every device.
    """
    return tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)


@triton.jit
def scale_of(bits, AMAX_FLOOR: tl.constexpr):
    """The bits of an amax to its scale: max(amax, AMAX_FLOOR) / 448, IEEE; NaN stays NaN."""
    amax = bits.to(tl.float32, bitcast=True)
    amax = tl.where(amax < AMAX_FLOOR, AMAX_FLOOR, amax)
    return tl.div_rn(amax, tl.full(amax.shape, 448.0, tl.float32))


@triton.jit(do_not_specialize=["rows"])
def quantize_group_kernel(
    x,
    present,
    codes,
    scales,
    rows,
    columns,
    stride_row,
    stride_column,
    HAS_PRESENT: tl.constexpr,
    HAS_CAST: tl.constexpr,
    AMAX_FLOOR: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
):
    groups = (columns + GROUP - 1) // GROUP
    group = tl.program_id(0) % groups
    row = (tl.program_id(0) // groups).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    local = row < rows
    if HAS_PRESENT:
        local = tl.load(present + row, mask=local, other=-1) >= 0
    column = (group * GROUP + tl.arange(0, GROUP)).to(tl.int64)
    mask = local[:, None] & (column < columns)[None, :]
    value = tl.load(x + row[:, None] * stride_row + column[None, :] * stride_column, mask=mask, other=0.0)
    value = to_float32(value)
    scale = scale_of(amax_bits(value), AMAX_FLOOR)
    code = scaled_to_e4m3(value, scale, HAS_CAST)
    tl.store(codes + row[:, None] * columns + column[None, :], code, mask=mask)
    tl.store(scales + row * groups + group, scale, mask=local)


@triton.jit(do_not_specialize=["rows"])
def quantize_token_kernel(
    x,
    present,
    codes,
    scales,
    rows,
    columns,
    stride_row,
    stride_column,
    HAS_PRESENT: tl.constexpr,
    HAS_CAST: tl.constexpr,
    ONE_STEP: tl.constexpr,
    AMAX_FLOOR: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    local = row < rows
    if HAS_PRESENT:
        local = tl.load(present + row, mask=local, other=-1) >= 0
    column = tl.arange(0, BLOCK).to(tl.int64)
    x_block = x + row[:, None] * stride_row + column[None, :] * stride_column
    code_block = codes + row[:, None] * columns + column[None, :]
    if ONE_STEP:
        mask = local[:, None] & (column < columns)[None, :]
        value = to_float32(tl.load(x_block, mask=mask, other=0.0))
        scale = scale_of(amax_bits(value), AMAX_FLOOR)
        tl.store(code_block, scaled_to_e4m3(value, scale, HAS_CAST), mask=mask)
    else:
        step = tl.full((), BLOCK, tl.int64) * stride_column
        bits = tl.full((ROWS,), 0, tl.int32)
        at = x_block
        for start in range(0, columns, BLOCK):
            mask = local[:, None] & (column < columns - start)[None, :]
            bits = tl.maximum(bits, amax_bits(to_float32(tl.load(at, mask=mask, other=0.0))))
            at += step
        scale = scale_of(bits, AMAX_FLOOR)
        # The row again: by now it lies in the cache.
        at = x_block
        for start in range(0, columns, BLOCK):
            mask = local[:, None] & (column < columns - start)[None, :]
            value = to_float32(tl.load(at, mask=mask, other=0.0))
            tl.store(code_block, scaled_to_e4m3(value, scale, HAS_CAST), mask=mask)
            at += step
            code_block += BLOCK
    tl.store(scales + row, scale, mask=local)


@triton.jit(do_not_specialize=["rows"])
def quantize_tensor_kernel(
    x,
    scale,
    present,
    codes,
    rows,
    columns,
    stride_row,
    stride_column,
    stride_scale,
    HAS_PRESENT: tl.constexpr,
    HAS_CAST: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    blocks = (columns + BLOCK - 1) // BLOCK
    row = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    local = row < rows
    if HAS_PRESENT:
        local = tl.load(present + row, mask=local, other=-1) >= 0
    column = ((tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    mask = local[:, None] & (column < columns)[None, :]
    value = tl.load(x + row[:, None] * stride_row + column[None, :] * stride_column, mask=mask, other=0.0)
    value = to_float32(value)
    row_scale = tl.load(scale + row * stride_scale, mask=local, other=1.0)
    code = scaled_to_e4m3(value, row_scale, HAS_CAST)
    tl.store(codes + row[:, None] * columns + column[None, :], code, mask=mask)


@triton.jit(do_not_specialize=["rows"])
def tensor_amax_kernel(
    x,
    present,
    bits,
    rows,
    columns,
    stride_row,
    stride_column,
    HAS_PRESENT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    blocks = (columns + BLOCK - 1) // BLOCK
    row = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    local = row < rows
    if HAS_PRESENT:
        local = tl.load(present + row, mask=local, other=-1) >= 0
    column = ((tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    mask = local[:, None] & (column < columns)[None, :]
    value = tl.load(x + row[:, None] * stride_row + column[None, :] * stride_column, mask=mask, other=0.0)
    # A maximum of integers: the order in which the programs come does not show.
    tl.atomic_max(bits, tl.max(amax_bits(to_float32(value)), axis=0), sem="relaxed")


@triton.jit
def tensor_scale_kernel(bits, scale, AMAX_FLOOR: tl.constexpr):
    at = tl.arange(0, 1)
    tl.store(scale + at, scale_of(tl.load(bits + at), AMAX_FLOOR))


def quantize_per_token_group(
    x: Tensor, *, group: int = 128, amax_floor: float = 1e-10, present: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Quantises each row's groups of `group` columns to e4m3fn.

    Recipe: scale = max(amax, amax_floor) / 448 and code = x / scale, both IEEE divisions in fp32, then to nearest,
    ties to even, saturating. The last group may be partial. A NaN makes its whole group NaN.

    Args:
        x: (rows, columns) bf16, fp16 or fp32; any strides, no alignment needed.
        group: a power of two.
        present: (rows,) int32; rows where it is negative are neither read nor written. None: all are present.

    Returns:
        (rows, columns) float8_e4m3fn and (rows, ceil(columns / group)) fp32, both row-major.
    """
    rows, columns = x.shape
    groups = triton.cdiv(columns, group)
    codes = torch.empty((rows, columns), dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty((rows, groups), dtype=torch.float32, device=x.device)
    # One program a block of rows and a group, groups fastest: neighbours read neighbouring columns.
    program = program_of_groups(rows, groups)
    grid = triton.cdiv(rows, program["ROWS"]) * groups
    if grid:
        quantize_group_kernel[(grid,)](
            x,
            present,
            codes.view(torch.uint8),
            scales,
            *_sizes(x),
            HAS_PRESENT=present is not None,
            HAS_CAST=has_cast(x.device),
            AMAX_FLOOR=amax_floor,
            GROUP=group,
            **program,
        )
    return codes, scales


def quantize_per_token(x: Tensor, *, amax_floor: float = 1e-10, present: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Quantises each row to e4m3fn with one scale.

    Recipe: as `quantize_per_token_group`, the amax over the whole row. A NaN makes its whole row NaN.

    Args:
        x: (rows, columns) bf16, fp16 or fp32; any strides, no alignment needed.
        present: (rows,) int32; rows where it is negative are neither read nor written. None: all are present.

    Returns:
        (rows, columns) float8_e4m3fn and (rows, 1) fp32, both row-major.
    """
    rows, columns = x.shape
    codes = torch.empty((rows, columns), dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty((rows, 1), dtype=torch.float32, device=x.device)
    if rows:
        # One program a row, which it holds; or which it walks twice, for the amax and for the codes.
        rows_each, block = rows_of_program(rows, 1), block_of_row(columns)
        quantize_token_kernel[(triton.cdiv(rows, rows_each),)](
            x,
            present,
            codes.view(torch.uint8),
            scales,
            *_sizes(x),
            HAS_PRESENT=present is not None,
            HAS_CAST=has_cast(x.device),
            ONE_STEP=columns <= block,
            AMAX_FLOOR=amax_floor,
            ROWS=rows_each,
            BLOCK=block,
            num_warps=warps_of_row(block),
            enable_fp_fusion=False,
        )
    return codes, scales


def quantize_per_tensor(x: Tensor, scale: Tensor, *, present: Tensor | None = None) -> Tensor:
    """Quantises to e4m3fn with a given scale, or one for each row.

    Recipe: code = x / scale, an IEEE division in fp32, then to nearest, ties to even, saturating (infinities too);
    NaN is NaN.

    Args:
        x: (rows, columns) bf16, fp16 or fp32; any strides, no alignment needed.
        scale: (1,) or () fp32 on the same device, or (rows,); it is read there, when the kernel runs.
        present: (rows,) int32; rows where it is negative are neither read nor written. None: all are present.

    Returns:
        (rows, columns) float8_e4m3fn, row-major.
    """
    codes = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    # One program a block of rows and of columns, columns fastest: neighbours read neighbouring columns.
    rows_each = rows_of_program(x.shape[0], LONG_ROWS)
    grid = triton.cdiv(x.shape[0], rows_each) * triton.cdiv(x.shape[1], LONG_BLOCK)
    if grid:
        quantize_tensor_kernel[(grid,)](
            x,
            scale,
            present,
            codes.view(torch.uint8),
            *_sizes(x),
            scale.stride(0) if scale.numel() > 1 else 0,
            HAS_PRESENT=present is not None,
            HAS_CAST=has_cast(x.device),
            ROWS=rows_each,
            BLOCK=LONG_BLOCK,
            **_OPTIONS,
        )
    return codes


def tensor_scale(x: Tensor, *, amax_floor: float = 1e-10, present: Tensor | None = None) -> Tensor:
    """The scale of all present rows together.

    Recipe: max(amax, amax_floor) / 448, an IEEE division in fp32; a NaN makes it NaN. Without a present row,
    amax_floor / 448.

    Args:
        x: (rows, columns) bf16, fp16 or fp32; any strides, no alignment needed.
        present: (rows,) int32; rows where it is negative are not read. None: all are present.

    Returns:
        (1,) fp32 on the device of x.
    """
    bits = torch.zeros(1, dtype=torch.int32, device=x.device)
    scale = torch.empty(1, dtype=torch.float32, device=x.device)
    # One program a block of rows and of columns, columns fastest: neighbours read neighbouring columns.
    rows_each = rows_of_program(x.shape[0], LONG_ROWS)
    grid = triton.cdiv(x.shape[0], rows_each) * triton.cdiv(x.shape[1], LONG_BLOCK)
    if grid:
        tensor_amax_kernel[(grid,)](
            x,
            present,
            bits,
            *_sizes(x),
            HAS_PRESENT=present is not None,
            ROWS=rows_each,
            BLOCK=LONG_BLOCK,
            **_OPTIONS,
        )
    # A launch of its own: torch may divide by a constant by multiplying with its reciprocal.
    tensor_scale_kernel[(1,)](bits, scale, AMAX_FLOOR=amax_floor, num_warps=1, enable_fp_fusion=False)
    return scale


def _sizes(x: Tensor) -> tuple[int, int, int, int]:
    """The kernels' arguments rows, columns, stride_row and stride_column."""
    return (*x.shape, *x.stride())
