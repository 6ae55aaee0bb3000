"""What surrounds a library's grouped GEMM, two steps in one kernel: bits as of the kernels of one step each."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp8moe.activations import GATED
from fp8moe.kernels.activation import activated_value
from fp8moe.kernels.fp8_cast import has_cast, scaled_to_e4m3
from fp8moe.kernels.quantize import amax_bits, program_of_groups, scale_of
from fp8moe.kernels.widths import to_float32

GROUP = 128


@triton.jit
def group_scale(bits, AMAX_FLOOR: tl.constexpr, POWER_OF_TWO: tl.constexpr):
    """As `scale_of`; or rounded up to a power of two, which is a normal number. NaN and infinity stay what they are."""
    scale = scale_of(bits, AMAX_FLOOR)
    if POWER_OF_TWO:
        # A mantissa that is not zero carries into the exponent. A scale has no sign, and NaN gets none.
        given = scale.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        up = tl.maximum(((given + 0x7FFFFF) >> 23) << 23, 0x800000)
        scale = tl.where(given < 0x7F800000, up, given).to(tl.float32, bitcast=True)
    return scale


@triton.jit
def scale_at(scales, row, group, rows_of_batch, stride_batch, stride_row, stride_group):
    """Where the scale of a row's group lies; rows are numbered through all batches."""
    batch = row // rows_of_batch
    return scales + batch * stride_batch + (row - batch * rows_of_batch) * stride_row + group * stride_group


@triton.jit(do_not_specialize=["tokens", "top_k", "rows_of_batch"])
def quantize_to_places_kernel(
    x,
    places,
    codes,
    scales,
    tokens,
    top_k,
    rows_of_batch,
    columns,
    stride_row,
    stride_column,
    stride_scale_batch,
    stride_scale_row,
    stride_scale_group,
    HAS_CAST: tl.constexpr,
    AMAX_FLOOR: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
    SLOTS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
):
    groups = (columns + GROUP - 1) // GROUP
    group = tl.program_id(0) % groups
    row = (tl.program_id(0) // groups).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = (group * GROUP + tl.arange(0, GROUP)).to(tl.int64)
    in_range = (column < columns)[None, :]
    value = tl.load(
        x + row[:, None] * stride_row + column[None, :] * stride_column,
        mask=(row < tokens)[:, None] & in_range,
        other=0.0,
    )
    value = to_float32(value)
    # All of them at once and early: a read between two writes would wait for its turn.
    slots = tl.arange(0, SLOTS)[None, :]
    all_places = tl.load(
        places + row[:, None] * top_k + slots, mask=(row < tokens)[:, None] & (slots < top_k), other=-1
    )
    scale = group_scale(amax_bits(value), AMAX_FLOOR, POWER_OF_TWO)
    code = scaled_to_e4m3(value, scale, HAS_CAST)
    for slot in range(0, top_k):
        place = tl.sum(tl.where(slots == slot, all_places, 0), axis=1).to(tl.int64)
        there = place >= 0
        tl.store(codes + place[:, None] * columns + column[None, :], code, mask=there[:, None] & in_range)
        at = scale_at(scales, place, group, rows_of_batch, stride_scale_batch, stride_scale_row, stride_scale_group)
        tl.store(at, scale, mask=there)


@triton.jit(do_not_specialize=["given", "rows_of_batch"])
def activate_quantize_kernel(
    gate_up,
    places,
    codes,
    scales,
    given,
    rows_of_batch,
    columns,
    stride_row,
    stride_scale_batch,
    stride_scale_row,
    stride_scale_group,
    NAME: tl.constexpr,
    IS_GATED: tl.constexpr,
    HAS_CAST: tl.constexpr,
    AMAX_FLOOR: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
    IN_ORDER: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
):
    groups = (columns + GROUP - 1) // GROUP
    group = tl.program_id(0) % groups
    row = (tl.program_id(0) // groups).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    named = tl.load(places + row, mask=row < given, other=-1).to(tl.int64)
    local = named >= 0
    if not IN_ORDER:
        row = named
    column = group * GROUP + tl.arange(0, GROUP)
    mask = local[:, None] & (column < columns)[None, :]
    gate_at = gate_up + row[:, None] * stride_row + column[None, :]
    gate = to_float32(tl.load(gate_at, mask=mask, other=0.0))
    up = gate
    if IS_GATED:
        up = to_float32(tl.load(gate_at + columns, mask=mask, other=0.0))
    value = tl.where(mask, activated_value(gate, up, NAME), 0.0)
    scale = group_scale(amax_bits(value), AMAX_FLOOR, POWER_OF_TWO)
    code = scaled_to_e4m3(value, scale, HAS_CAST)
    tl.store(codes + row[:, None] * columns + column[None, :], code, mask=mask)
    at = scale_at(scales, row, group, rows_of_batch, stride_scale_batch, stride_scale_row, stride_scale_group)
    tl.store(at, scale, mask=local)


def quantize_to_places(
    x: Tensor,
    places: Tensor,
    codes: Tensor,
    scales: Tensor,
    *,
    amax_floor: float = 1e-10,
    power_of_two: bool = False,
) -> None:
    """Quantises each token's groups of 128 columns to e4m3fn, once, and writes them to the row of each of its pairs.

    Recipe: as `fp8moe.kernels.quantize.quantize_per_token_group`; with `power_of_two` each scale is rounded up to a
    power of two, a normal number of fp32, before codes are divided by it.

    Args:
        x: (M, columns) bf16, fp16 or fp32; any strides.
        places: (M * top_k,) int32, the row of each pair; a pair where it is negative has none.
        codes: (rows, columns) float8_e4m3fn, row-major, written to; rows of no pair are left alone.
        scales: (rows, ceil(columns / 128)) fp32, or (batches, rows of each, ceil(columns / 128)); any
            strides, written to as `codes`.
    """
    tokens, columns = x.shape
    groups = triton.cdiv(columns, GROUP)
    program = program_of_groups(tokens, groups)
    grid = triton.cdiv(tokens, program["ROWS"]) * groups
    batches = scales if scales.dim() == 3 else scales[None]
    if grid:
        quantize_to_places_kernel[(grid,)](
            x,
            places,
            codes.view(torch.uint8),
            scales,
            tokens,
            places.numel() // tokens,
            batches.shape[1],
            columns,
            *x.stride(),
            *batches.stride(),
            HAS_CAST=has_cast(codes.device),
            AMAX_FLOOR=amax_floor,
            SLOTS=triton.next_power_of_2(places.numel() // tokens),
            POWER_OF_TWO=power_of_two,
            GROUP=GROUP,
            **program,
        )


def activate_quantize(
    gate_up: Tensor,
    name: str,
    places: Tensor,
    codes: Tensor,
    scales: Tensor,
    *,
    amax_floor: float = 1e-10,
    power_of_two: bool = False,
    in_order: bool = False,
) -> None:
    """The activation in fp32, and its groups of 128 columns quantised to e4m3fn.

    Recipe: as `fp8moe.kernels.activation.activate` to fp32, then as `quantize_to_places`.

    Args:
        gate_up: (rows, 2I) fp32, bf16 or fp16, or (rows, I) without a gate; a row's columns are contiguous.
        name: of the activation.
        places: any number of int32: the rows that are there, each once, among negative ones; no other row is read or
            written.
        codes: (rows, I) float8_e4m3fn, row-major, written to.
        scales: (rows, ceil(I / 128)) fp32, or (batches, rows of each, ceil(I / 128)); any strides; written to.
        in_order: `places` has a number for each row, which is there where that is not negative.
    """
    given, columns = places.numel(), codes.shape[1]
    groups = triton.cdiv(columns, GROUP)
    program = program_of_groups(given, groups)
    grid = triton.cdiv(given, program["ROWS"]) * groups
    batches = scales if scales.dim() == 3 else scales[None]
    if grid:
        activate_quantize_kernel[(grid,)](
            gate_up,
            places,
            codes.view(torch.uint8),
            scales,
            given,
            batches.shape[1],
            columns,
            gate_up.stride(0),
            *batches.stride(),
            NAME=name,
            IS_GATED=name in GATED,
            HAS_CAST=has_cast(codes.device),
            AMAX_FLOOR=amax_floor,
            POWER_OF_TWO=power_of_two,
            IN_ORDER=in_order,
            GROUP=GROUP,
            **program,
        )
