"""The weighted sum over a token's slots: every rounding, absent pairs, strides."""

from __future__ import annotations

import pytest
import torch

from fp8moe.kernels.reduce import weighted_sum


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("results", [torch.float32, torch.bfloat16, torch.float16])
def test_weighted_sum(weighted: bool, results: torch.dtype, dtype: torch.dtype, device: torch.device) -> None:
    tokens, top_k, columns = 5, 3, 1100
    generator = torch.Generator().manual_seed(3)
    y = torch.randn(tokens * top_k, columns, generator=generator).to(results)
    weights = torch.rand(tokens, top_k, generator=generator)
    local_ids = torch.randint(0, 3, (tokens, top_k), generator=generator).to(torch.int32)
    local_ids[1] = -1
    local_ids[2, 0] = -1
    expected = torch.zeros(tokens, columns)
    for slot in range(top_k):
        weight = weights[:, slot, None] if weighted else torch.ones(tokens, 1)
        product = weight.double() * y.view(tokens, top_k, columns)[:, slot].double()
        expected = torch.where(local_ids[:, slot, None] >= 0, (expected.double() + product).float(), expected)
    absent = local_ids.flatten() < 0
    y[absent] = float("nan")
    weights = torch.where(local_ids < 0, float("nan"), weights)
    output = torch.full((tokens, 2 * columns), 7.0, dtype=dtype, device=device)
    weighted_sum(y.to(device), local_ids.flatten().to(device), output[:, ::2], weights.to(device) if weighted else None)
    assert torch.equal(output[:, ::2].cpu(), expected.to(dtype))
    assert bool((output[:, 1::2] == 7.0).all())


def test_weighted_sum_by_row(device: torch.device) -> None:
    """Rows in another order, some of no pair, and pairs of no row: as the rows in the order of the pairs."""
    tokens, top_k, columns, rows = 5, 3, 1100, 40
    generator = torch.Generator().manual_seed(4)
    y = torch.randn(rows, columns, generator=generator).to(torch.bfloat16)
    places = torch.randperm(rows, generator=generator)[: tokens * top_k].to(torch.int32)
    places[[1, 6, 7, 8]] = -1
    weights = torch.rand(tokens, top_k, generator=generator).to(device)
    taken = y[places.long().clamp(min=0)].to(device)
    y[torch.tensor([row not in places.tolist() for row in range(rows)])] = float("nan")
    found, expected = (torch.empty(tokens, columns, dtype=torch.bfloat16, device=device) for _ in range(2))
    weighted_sum(y.to(device), places.to(device), found, weights, by_row=True)
    weighted_sum(taken, places.to(device), expected, weights)
    assert not bool(found.isnan().any())
    assert torch.equal(found, expected)
