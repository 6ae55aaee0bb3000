"""What `fp8moe.kernels.few` computes, by torch: in the kernel's place where a library is played without a device, and
beside it in its tests."""

from __future__ import annotations

import torch
from torch import Tensor

from fp8moe.backends.libraries import settled_by_torch
from fp8moe.kernels.few import FewPlaced


def few_by_torch(
    topk_ids: Tensor,
    experts: int,
    tiles: int,
    tile_rows: int,
    expert_map: Tensor | None = None,
    *,
    pad: int = -1,
    weights: Tensor | None = None,
) -> FewPlaced:
    """As `place_few_pairs`, expert by expert."""
    wanted = torch.empty(topk_ids.shape) if weights is None else weights
    _, settled, _, local_ids, _ = settled_by_torch(topk_ids, wanted, expert_map, experts)
    local_ids = torch.where(local_ids < experts, local_ids, -1).flatten()
    order = torch.full((tiles, tile_rows), pad, dtype=torch.int32)
    owners = torch.full((tiles,), -1, dtype=torch.int32)
    used = 0
    for expert in range(experts):
        for pairs in (local_ids == expert).nonzero()[:, 0].split(tile_rows):
            if len(pairs):
                order[used, : len(pairs)] = pairs
                owners[used] = expert
                used += 1
    count = torch.tensor([used * tile_rows], dtype=torch.int32)
    return FewPlaced(local_ids, order.flatten(), owners, count, settled.flatten()[: 0 if weights is None else None])
