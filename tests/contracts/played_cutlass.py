"""vLLM's CUTLASS operators by their definitions, on whatever device the tensors are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def permute(
    values: Tensor,
    ids: Tensor,
    numbers: Tensor,
    placed: Tensor | None,
    experts: int,
    local: int,
    top_k: int,
    taken: Tensor,
    offsets: Tensor,
    places: Tensor,
    pairs: Tensor,
) -> None:
    """Rows by local expert, those without one at the end, where nothing is written."""
    assert torch.equal(numbers.flatten(), torch.arange(ids.numel(), dtype=torch.int32, device=ids.device))
    assert experts == (local if placed is None else placed.numel())
    owner = ids.long().flatten() if placed is None else placed.long()[ids.long().flatten()]
    order = torch.argsort(torch.where(owner < 0, local, owner), stable=True)
    here = int((owner >= 0).sum())
    taken.view(torch.uint8).fill_(0x7F)  # NaN: what is there must not be looked at
    taken.view(torch.uint8)[:here] = values.view(torch.uint8)[order[:here] // top_k]
    offsets.copy_(
        torch.searchsorted(torch.where(owner < 0, local, owner)[order], torch.arange(local + 1, device=ids.device))
    )
    places.view(-1)[order] = torch.arange(ids.numel(), dtype=torch.int32, device=ids.device)
    pairs[:here] = order[:here].to(torch.int32)


def unpermute(values: Tensor, weights: Tensor, places: Tensor, offsets: Tensor | None, top_k: int, out: Tensor) -> None:
    assert offsets is not None
    total = torch.zeros(out.shape, device=out.device)
    for slot in range(top_k):
        row = places[:, slot].long()
        read = row < offsets[-1]  # from there on no expert here has a row, and none is read
        term = weights[read, slot, None] * values[row[read]].float()
        total[read] = total[read] + term
    out.copy_(total)


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
