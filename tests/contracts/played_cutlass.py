"""vLLM's CUTLASS operators by their definitions, on whatever device the tensors are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def sizes(offsets: Tensor, first: Tensor, second: Tensor, n: int, k: int, swapped: bool) -> None:
    counts = offsets.diff().to(torch.int32)
    for table, columns, terms in ((first, 2 * n, k), (second, k, n)):
        table[:, 0], table[:, 1], table[:, 2] = (columns, counts, terms) if swapped else (counts, columns, terms)


def gemm(*given: Any) -> None:
    out, a, b, a_scale, b_scale, offsets, table, a_strides, b_strides, c_strides, per_token, per_channel = given
    assert offsets.dtype == torch.int64
    # The kernel is told twice: by the flags how scales are read, by their numbers where an expert's begin.
    assert per_token == (a_scale.numel() != 1) or len(a) == 1
    assert per_channel == (b_scale.numel() != len(b))
    assert a_scale.numel() == (len(a) if per_token else 1)
    assert b_scale.numel() == len(b) * (b.shape[1] if per_channel else 1)
    assert all(scale.dtype == torch.float32 and scale.is_contiguous() for scale in (a_scale, b_scale))
    assert all(stride.tolist() == [a.shape[1]] * len(b) for stride in (a_strides, b_strides))
    assert c_strides.tolist() == [out.shape[1]] * len(b)
    for expert in range(len(b)):
        m, n, k = table[expert].tolist()
        if len(a) <= 64:  # what the kernel does by itself; sizes that are the other way round go unnoticed
            m, n = n, m
        assert (n, k) == tuple(b.shape[1:])
        rows = slice(int(offsets[expert]), int(offsets[expert]) + m)
        scale = a_scale[rows] if per_token else a_scale
        matrix = b[expert].float() * b_scale[expert].reshape(-1, 1)
        out[rows] = ((a[rows].float() * scale) @ matrix.t()).to(out.dtype)


def batched_sizes(
    offsets: Tensor, first: Tensor, second: Tensor, counts: Tensor, experts: int, longest: int, n: int, k: int
) -> None:
    assert (offsets.dtype, len(counts)) == (torch.int32, experts)
    offsets.copy_(torch.arange(experts) * longest)
    swapped = experts * longest <= 64
    for table, columns, terms in ((first, 2 * n, k), (second, k, n)):
        table[:, 0], table[:, 1], table[:, 2] = (columns, counts, terms) if swapped else (counts, columns, terms)
