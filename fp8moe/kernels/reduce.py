"""The weighted sum over a token's experts, in the order of its slots, rounded once."""

import triton
import triton.language as tl
from torch import Tensor

from fp8moe.kernels.widths import round_float32, to_float32

BLOCK_BYTES = 512
"""Of a row that one program reads, of one warp: 16 bytes a thread. Twice as many take a quarter longer for few tokens
in fp32, half as many in bf16 as much longer for many (an H200, reports/h200/2026-11-29-policy/tune.txt)."""
SLOTS = 8
"""Of a token that are read at a time, at most."""


@triton.jit(do_not_specialize=["top_k"])
def weighted_sum_kernel(
    y,
    weights,
    local_ids,
    output,
    top_k,
    columns,
    stride_y_row,
    stride_weights_row,
    stride_weights_slot,
    stride_output_row,
    stride_output_column,
    WEIGHTED: tl.constexpr,
    BY_ROW: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    blocks = (columns + BLOCK - 1) // BLOCK
    token = (tl.program_id(0) // blocks).to(tl.int64)
    column = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    in_range = column < columns
    total = tl.full((BLOCK,), 0.0, tl.float32)
    ones = tl.full((BLOCK,), 1.0, tl.float32)
    for first in range(0, top_k, SLOTS):
        # Without branches, so that no read of one slot waits for another's.
        for number in tl.static_range(SLOTS):
            slot = tl.minimum(first + number, top_k - 1)
            pair = token * top_k + slot
            # A pair without a local expert is not read: its row of y was never written.
            local = tl.where(first + number < top_k, tl.load(local_ids + pair), -1)
            there = local >= 0
            row = pair
            if BY_ROW:
                row = local.to(tl.int64)
            mask = column < tl.where(there, columns, 0)
            value = to_float32(tl.load(y + row * stride_y_row + column, mask=mask, other=0.0))
            if WEIGHTED:
                at = weights + token * stride_weights_row + slot * stride_weights_slot
                added = tl.fma(value, ones * tl.load(at), total)
            else:
                added = total + value
            total = tl.where(there, added, total)
    rounded = round_float32(total, output.dtype.element_ty)
    column = column.to(tl.int64)
    tl.store(output + token * stride_output_row + column * stride_output_column, rounded, mask=in_range)


def weighted_sum(y: Tensor, local_ids: Tensor, output: Tensor, weights: Tensor | None, *, by_row: bool = False) -> None:
    """output[token] = the sum over slots of weight * y[token * top_k + slot], into `output`.

    Recipe: from zero, in the order of the slots, total = fma(weight, y, total) in fp32 (total + y without weights);
    one rounding to the output's dtype at the end, to nearest even.

    Args:
        y: (M * top_k, H) fp32, bf16 or fp16, row-major.
        local_ids: (M * top_k,) int32; a pair where it is negative adds nothing, whatever y and the weight hold.
        output: (M, H) bf16, fp16 or fp32, any strides.
        weights: (M, top_k) fp32, any strides, or None for a plain sum.
        by_row: `y` has rows in another order, and a pair's number in `local_ids` is that of its row.
    """
    tokens, columns = output.shape
    if tokens == 0:
        return
    block = BLOCK_BYTES // y.element_size()
    # One program a token and a block of columns, columns fastest; the sum is one program's own, so its order is fixed.
    weighted_sum_kernel[(tokens * triton.cdiv(columns, block),)](
        y,
        weights,
        local_ids,
        output,
        local_ids.numel() // tokens,
        columns,
        y.stride(0),
        0 if weights is None else weights.stride(0),
        0 if weights is None else weights.stride(1),
        output.stride(0),
        output.stride(1),
        WEIGHTED=weights is not None,
        BY_ROW=by_row,
        SLOTS=min(triton.next_power_of_2(local_ids.numel() // tokens), SLOTS),
        BLOCK=block,
        num_warps=1,
        enable_fp_fusion=False,
    )
