"""Alignment: each pair in a tile of its own expert, and no tile more than is needed."""

from __future__ import annotations

import pytest
import torch

from fp8moe.kernels.align import Alignment, align_batches, align_pairs, most_tiles


def check_alignment(alignment: Alignment, local: list[int], experts: int, tile_rows: int) -> None:
    """Every present pair once, under its own expert, in order; no expert has a tile more than it needs."""
    assert alignment.local_ids.tolist() == local
    pairs, owners = alignment.pairs.tolist(), alignment.tile_experts.tolist()
    for expert in range(experts):
        rows = [pair for tile, owner in zip(pairs, owners, strict=True) if owner == expert for pair in tile]
        mine = [pair for pair, owner in enumerate(local) if owner == expert]
        tiles = -(-len(mine) // tile_rows)
        assert rows == mine + [-1] * (tiles * tile_rows - len(mine))
    unused = [tile for tile, owner in zip(pairs, owners, strict=True) if owner == -1]
    assert all(pair == -1 for tile in unused for pair in tile)
    assert owners == sorted(owners, key=lambda owner: owner if owner >= 0 else experts)


@pytest.mark.parametrize("tile_rows", [16, 64])
@pytest.mark.parametrize(
    ("tokens", "top_k", "experts"), [(0, 2, 4), (1, 1, 1), (5, 3, 8), (40, 2, 3), (200, 8, 16), (3, 1, 200)]
)
def test_alignment(tokens: int, top_k: int, experts: int, tile_rows: int, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(tokens)
    # Two more than there are experts on either side: ids that nobody checked count as absent.
    ids = torch.randint(-2, experts + 2, (tokens, top_k), generator=generator)
    local = [i if 0 <= i < experts else -1 for i in ids.flatten().tolist()]
    alignment = align_pairs(ids.to(device), experts, tile_rows)
    assert alignment.tiles == most_tiles(tokens * top_k, experts, tile_rows)
    check_alignment(alignment, local, experts, tile_rows)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_alignment_with_a_map(dtype: torch.dtype, device: torch.device) -> None:
    expert_map = torch.tensor([-1, 2, -1, 0, 1, -1], dtype=dtype)
    ids = torch.tensor([[0, 1], [3, 3], [4, -1], [5, 2], [1, 4]], dtype=dtype)
    local = [int(expert_map[i]) if i >= 0 else -1 for i in ids.flatten().tolist()]
    check_alignment(align_pairs(ids.to(device), 3, 16, expert_map.to(device)), local, 3, 16)


def test_the_likely_tiles_are_those_of_this_ranks_share(device: torch.device) -> None:
    ids = torch.arange(64, device=device).view(32, 2) % 6
    expert_map = torch.tensor([-1, 2, -1, 0, 1, -1], device=device)
    found = align_pairs(ids, 3, 16, expert_map)
    assert (found.tiles, found.likely) == (most_tiles(64, 3, 16), most_tiles(32, 3, 16)) == (6, 4)
    assert align_pairs(ids % 3, 3, 16).likely == 6


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("tile_rows", [16, 64])
@pytest.mark.parametrize("rows", [1, 16, 20, 64, 100])
def test_alignment_of_batches(rows: int, tile_rows: int, dtype: torch.dtype, device: torch.device) -> None:
    counts = torch.tensor([0, 1, rows, rows + 7, rows // 2, -3], dtype=dtype)
    held = counts.clamp(0, rows).tolist()
    local = [expert if row < held[expert] else -1 for expert in range(6) for row in range(rows)]
    alignment = align_batches(counts.to(device), rows, tile_rows)
    assert alignment.local_ids.dtype == alignment.pairs.dtype == alignment.tile_experts.dtype == torch.int32
    assert alignment.local_ids.tolist() == local
    assert alignment.tiles == 6 * -(-rows // tile_rows)
    for expert, owned in enumerate(held):
        at = slice(expert * -(-rows // tile_rows), (expert + 1) * -(-rows // tile_rows))
        pairs = [pair for tile in alignment.pairs[at].tolist() for pair in tile]
        assert pairs == [expert * rows + row for row in range(owned)] + [-1] * (len(pairs) - owned)
        used = -(-owned // tile_rows)
        owners = alignment.tile_experts[at].tolist()
        assert owners == [expert] * used + [-1] * (len(owners) - used)


def test_alignment_of_no_batches(device: torch.device) -> None:
    for counts, rows in ((torch.empty(0, dtype=torch.int32), 5), (torch.zeros(3, dtype=torch.int32), 0)):
        alignment = align_batches(counts.to(device), rows, 16)
        assert (alignment.tiles, alignment.local_ids.numel(), alignment.tile_experts.numel()) == (0, 0, 0)
    with pytest.raises(ValueError, match="2 batches, rows=1073741824: expected fewer than 2\\^31 rows"):
        align_batches(torch.zeros(2, dtype=torch.int32), 2**30, 16)


def test_worst_case_of_tiles_is_reached(device: torch.device) -> None:
    """One full tile more than an even split: every expert one row over."""
    experts, tile_rows = 4, 16
    ids = torch.arange(experts).repeat_interleave(tile_rows + 1)[:, None]
    alignment = align_pairs(ids.to(device), experts, tile_rows)
    assert alignment.tiles == most_tiles(ids.numel(), experts, tile_rows) == 2 * experts
    assert (alignment.tile_experts >= 0).all()
