"""As `fp8moe.kernels.fused`, with one scale for a whole row, or one that is given."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp8moe.activations import GATED
from fp8moe.kernels.activation import activated_value
from fp8moe.kernels.fp8_cast import has_cast, scaled_to_e4m3
from fp8moe.kernels.interpreter import rows_of_program
from fp8moe.kernels.quantize import amax_bits, block_of_row, scale_of, warps_of_row
from fp8moe.kernels.widths import to_float32


@triton.jit
def row_values(at, column, columns, there, NAME: tl.constexpr, IS_GATED: tl.constexpr):
    """Some columns of rows in fp32: as they are, or the activation of gate and up; 0 where there is nothing."""
    mask = there[:, None] & (column < columns)[None, :]
    value = to_float32(tl.load(at, mask=mask, other=0.0))
    if NAME != "":
        up = value
        if IS_GATED:
            up = to_float32(tl.load(at + columns, mask=mask, other=0.0))
        value = tl.where(mask, activated_value(value, up, NAME), 0.0)
    return value


@triton.jit(do_not_specialize=["rows", "top_k", "rows_of_scale"])
def quantize_rows_kernel(
    x,
    given,
    places,
    codes,
    scales,
    rows,
    top_k,
    rows_of_scale,
    columns,
    stride_row,
    stride_column,
    NAME: tl.constexpr,
    IS_GATED: tl.constexpr,
    IS_GIVEN: tl.constexpr,
    IN_PLACE: tl.constexpr,
    IN_ORDER: tl.constexpr,
    ONE_STEP: tl.constexpr,
    HAS_CAST: tl.constexpr,
    AMAX_FLOOR: tl.constexpr,
    SLOTS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Rows 0 to `rows`, written to the places of their pairs; or in place: the rows that `places` names, or in order
    those that have a place."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = row < rows
    if IN_PLACE:
        named = tl.load(places + row, mask=there, other=-1).to(tl.int64)
        there = named >= 0
        if not IN_ORDER:
            row = named
    else:
        # All of them at once and early: a read between two writes would wait for its turn.
        slots = tl.arange(0, SLOTS)[None, :]
        at = places + row[:, None] * top_k + slots
        all_places = tl.load(at, mask=there[:, None] & (slots < top_k), other=-1)
    column = tl.arange(0, BLOCK).to(tl.int64)
    x_block = x + row[:, None] * stride_row + column[None, :] * stride_column
    step = tl.full((), BLOCK, tl.int64) * stride_column
    if ONE_STEP:
        value = row_values(x_block, column, columns, there, NAME, IS_GATED)
    if IS_GIVEN:
        scale = tl.load(given + row // rows_of_scale, mask=there, other=1.0)
    elif ONE_STEP:
        scale = scale_of(amax_bits(value), AMAX_FLOOR)
    else:
        bits = tl.full((ROWS,), 0, tl.int32)
        at = x_block
        for start in range(0, columns, BLOCK):
            bits = tl.maximum(bits, amax_bits(row_values(at, column + start, columns, there, NAME, IS_GATED)))
            at += step
        scale = scale_of(bits, AMAX_FLOOR)

    # A row of several steps again: by now it lies in the cache.
    at = x_block
    for start in range(0, columns, BLOCK):
        if not ONE_STEP:
            value = row_values(at, column + start, columns, there, NAME, IS_GATED)
        code = scaled_to_e4m3(value, scale, HAS_CAST)
        in_range = (column + start < columns)[None, :]
        for slot in range(0, top_k):
            place = row
            if not IN_PLACE:
                place = tl.sum(tl.where(slots == slot, all_places, 0), axis=1).to(tl.int64)
            held = there & (place >= 0)
            code_at = codes + place[:, None] * columns + (column + start)[None, :]
            tl.store(code_at, code, mask=held[:, None] & in_range)
            if start == 0:
                tl.store(scales + place, scale, mask=held)
        at += step


def quantize_rows_to_places(
    x: Tensor,
    places: Tensor,
    codes: Tensor,
    scales: Tensor,
    given: Tensor | None = None,
    *,
    amax_floor: float = 1e-10,
) -> None:
    """Quantises each token's row to e4m3fn, once, and writes it to the row of each of its pairs.

    Recipe: as `fp8moe.kernels.quantize.quantize_per_token`, or with given scales as `quantize_per_tensor`.

    Args:
        x: (M, columns) bf16, fp16 or fp32; any strides.
        places: (M * top_k,) int32, the row of each pair; a pair where it is negative has none.
        codes: (rows, columns) float8_e4m3fn, row-major, written to; rows of no pair are left alone.
        scales: (rows,) fp32, contiguous, as `codes`.
        given: (n,) fp32 on the same device: the scale of the first M / n tokens, of the next M / n, and so on.
    """
    tokens = len(x)
    if tokens:
        _launch(x, given, places, codes, scales, tokens, places.numel() // tokens, tokens, "", False, False, amax_floor)


def activate_quantize_rows(
    gate_up: Tensor,
    name: str,
    places: Tensor,
    codes: Tensor,
    scales: Tensor,
    given: Tensor | None = None,
    *,
    amax_floor: float = 1e-10,
    in_order: bool = False,
) -> None:
    """The activation in fp32, each row of it quantised to e4m3fn.

    Recipe: as `fp8moe.kernels.activation.activate` to fp32, then as `quantize_rows_to_places`.

    Args:
        gate_up: (rows, 2I) fp32, bf16 or fp16, or (rows, I) without a gate; a row's columns are contiguous.
        name: of the activation.
        places: any number of int32: the rows that are there, each once, among negative ones; no other row is read or
            written.
        codes: (rows, I) float8_e4m3fn, row-major, written to.
        scales: (rows,) fp32, contiguous, written to.
        given: (n,) fp32 on the same device: the scale of the first rows / n rows, and so on.
        in_order: `places` has a number for each row, which is there where that is not negative.
    """
    _launch(gate_up, given, places, codes, scales, places.numel(), 1, len(gate_up), name, True, in_order, amax_floor)


def _launch(
    x: Tensor,
    given: Tensor | None,
    places: Tensor,
    codes: Tensor,
    scales: Tensor,
    rows: int,
    top_k: int,
    scaled: int,
    name: str,
    in_place: bool,
    in_order: bool,
    amax_floor: float,
) -> None:
    columns = codes.shape[1]
    rows_each = rows_of_program(rows, 1)
    block = block_of_row(columns)
    if rows and columns:
        quantize_rows_kernel[(triton.cdiv(rows, rows_each),)](
            x,
            given,
            places,
            codes.view(torch.uint8),
            scales,
            rows,
            top_k,
            1 if given is None else scaled // given.numel(),
            columns,
            *x.stride(),
            NAME=name,
            IS_GATED=name in GATED,
            IS_GIVEN=given is not None,
            IN_PLACE=in_place,
            IN_ORDER=in_order,
            ONE_STEP=columns <= block,
            HAS_CAST=has_cast(codes.device),
            AMAX_FLOOR=amax_floor,
            SLOTS=triton.next_power_of_2(top_k),
            ROWS=rows_each,
            BLOCK=block,
            num_warps=warps_of_row(block),
            enable_fp_fusion=False,
        )
