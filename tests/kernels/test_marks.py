"""Ids out of range, found on the device; marks that are set stay."""

from __future__ import annotations

import pytest
import torch

from fp8moe.kernels.marks import BLOCK, mark_out_of_range


def marked(x: torch.Tensor, limit: int, before: bool = False) -> bool:
    mark = torch.tensor(before, device=x.device)
    mark_out_of_range(x, limit, mark)
    return bool(mark)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 8), (BLOCK, 3), (2 * BLOCK + 5, 2)])
def test_one_id_out_of_range(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> None:
    wide = torch.full((2 * rows, 2 * columns), 99, dtype=dtype, device=device)
    x = wide[::2, ::2]
    x.copy_(torch.arange(rows * columns).view(rows, columns) % 8 - 1)
    assert not marked(x, 7)
    assert marked(x, 7, before=True)
    for wrong in (-2, 7, -(2**31), 2**31 - 1):
        for at in {(0, 0), (rows - 1, columns - 1), (rows // 2, columns // 2)}:
            right = int(x[at])
            x[at] = wrong
            assert marked(x, 7), (wrong, at)
            x[at] = right


def test_a_map(device: torch.device) -> None:
    expert_map = torch.tensor([-1, 0, 1], device=device)
    assert not marked(expert_map, 2)
    assert marked(expert_map, 1)
    assert not marked(expert_map[:0], 1)


def test_uint32(device: torch.device) -> None:
    ids = torch.tensor([[0, 2**32 - 1]]).to(torch.uint32).to(device)
    assert marked(ids, 5)
    assert not marked(ids[:, :1], 5)
