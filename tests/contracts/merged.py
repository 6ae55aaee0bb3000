"""What `fp8moe.kernels.merge` computes, by torch: in the kernel's place where a library is played without a device, and
beside it in its tests."""

from __future__ import annotations

import torch
from torch import Tensor

from fp8moe.backends.libraries import settled_by_torch


def merged_by_torch(
    ids: Tensor, weights: Tensor, expert_map: Tensor | None, experts: int, *, merge: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """As `merge_slots`; sums are in fp64 as well, but in whatever order torch takes on the device."""
    _, weights, _, local_ids, without = settled_by_torch(ids, weights, expert_map, experts)
    ids = torch.where(local_ids < 0, experts, local_ids)
    if not merge:
        return ids, weights, without
    same = ids[:, :, None] == ids[:, None, :]
    first = same.to(torch.int8).argmax(2) == torch.arange(ids.shape[1], device=ids.device)
    sums = (same * weights[:, None, :].double()).sum(2).float()
    kept = first & (ids != experts)
    return torch.where(kept, ids, experts), torch.where(kept, sums, 0.0), without
