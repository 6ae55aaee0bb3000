"""Pairs for a library that knows no -1: as `LibraryCall` settles them by torch, on the same ids."""

from __future__ import annotations

import pytest
import torch

from fp8moe.backends.libraries import settled_by_torch
from fp8moe.kernels.settle import settle_pairs


@pytest.mark.parametrize("mapped", [None, torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(("tokens", "top_k", "experts"), [(1, 1, 1), (9, 3, 5), (40, 8, 33), (300, 6, 200)])
def test_settled(
    tokens: int, top_k: int, experts: int, dtype: torch.dtype, mapped: torch.dtype | None, device: torch.device
) -> None:
    generator = torch.Generator().manual_seed(tokens)
    ids = torch.randint(-experts, experts + 2, (tokens, 2 * top_k), generator=generator).to(dtype)[:, ::2]
    ids[tokens // 2] = -1
    weights = torch.rand(top_k, tokens, generator=generator).t()
    expert_map = None
    if mapped is not None:
        expert_map = torch.full((experts,), -1, dtype=mapped)
        expert_map[: experts // 2 + 1] = torch.arange(experts // 2 + 1, dtype=mapped)
        expert_map = expert_map.flip(0).contiguous().to(device)
    given = (ids.to(device), weights.to(device), expert_map, experts)
    for found, expected in zip(settle_pairs(*given), settled_by_torch(*given), strict=True):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)


def test_a_token_without_any_expert_goes_to_another_rank(device: torch.device) -> None:
    ids, weights = torch.tensor([[-1, 9], [2, -1]], device=device), torch.ones(2, 2, device=device)
    expert_map = torch.tensor([0, 1, -1], device=device)
    found, settled, present, local_ids, without = settle_pairs(ids, weights, expert_map, 2)
    assert found.tolist() == [[2, 2], [2, 2]]
    assert settled.tolist() == [[0, 0], [1, 0]]
    assert present.tolist() == [[False, False], [True, False]]
    assert local_ids.tolist() == [[-1, -1], [-1, -1]]
    assert without.tolist() == [[True], [False]]
    assert settle_pairs(ids, weights, None, 2)[0].tolist() == [[0, 0], [0, 0]]
