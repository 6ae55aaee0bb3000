"""Whether any number is out of range, told on the device; one kernel, and nothing waits."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit(do_not_specialize=["count", "columns", "limit"])
def mark_out_of_range_kernel(x, mark, count, columns, limit, stride_row, stride_column, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row, column = (at // columns).to(tl.int64), at % columns
    value = tl.load(x + row * stride_row + column * stride_column, mask=at < count, other=0).to(tl.int64)
    wrong = tl.max(((at < count) & ((value < -1) | (value >= limit))).to(tl.int32), axis=0)
    # Every program that finds one writes the same.
    tl.store(mark, wrong.to(tl.uint8), mask=wrong > 0)


def mark_out_of_range(x: Tensor, limit: int, mark: Tensor) -> None:
    """Sets `mark` where a number is neither -1 nor from 0 to `limit` - 1; else leaves it as it is.

    Args:
        x: (rows, columns) or (n,) integers, any strides.
        mark: () bool on the same device.
    """
    rows = x if x.dim() == 2 else x[None]
    if rows.numel():
        mark_out_of_range_kernel[(triton.cdiv(rows.numel(), BLOCK),)](
            rows, mark.view(torch.uint8), rows.numel(), rows.shape[1], limit, *rows.stride(), BLOCK=BLOCK, num_warps=4
        )
