"""Cuts each expert's token-expert pairs into tiles, for the grouped GEMM.

All shapes follow from the inputs' shapes: nothing waits for the device.
"""

from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor

from fp8moe.kernels.begin import begin
from fp8moe.kernels.few import FewPlaced, is_few, place_few_pairs
from fp8moe.kernels.places import Placed, place_pairs


@dataclass(frozen=True)
class Alignment:
    """Which pairs each tile holds. A pair is a (token, slot), numbered token * top_k + slot; P = M * top_k.

    Args:
        local_ids: (P,) int32, the pair's local expert, -1 where it has none here.
        pairs: (tiles, tile_rows) int32, the pair in each row, -1 in rows that pad.
        tile_experts: (tiles,) int32, the tile's expert, -1 for a tile that is not needed.
        likely: how many tiles are in use if this rank has its share of the pairs; None: all. No bit depends on it.
    """

    local_ids: Tensor
    pairs: Tensor
    tile_experts: Tensor
    likely: int | None = None

    @property
    def tiles(self) -> int:
        return self.pairs.shape[0]

    @property
    def tile_rows(self) -> int:
        return self.pairs.shape[1]


def most_tiles(pairs: int, experts: int, tile_rows: int) -> int:
    """The most tiles that `pairs` pairs can need: each expert in use has one tile with as little as one row."""
    return (pairs + min(experts, pairs) * (tile_rows - 1)) // tile_rows


def likely_tiles(pairs: int, experts: int, tile_rows: int, expert_map: Tensor | None) -> int:
    """How many tiles `pairs` pairs of all ranks need here, if this rank has its share of them and each goes to any
    expert: those of the experts in use, and full ones."""
    ranks = 1.0 if expert_map is None else max(expert_map.numel() / max(experts, 1), 1.0)
    here = ceil(pairs / ranks)
    used = ceil(experts * (1 - (1 - 1 / max(experts, 1)) ** here))
    return min(used + here // tile_rows, most_tiles(here, experts, tile_rows))


def align_pairs(topk_ids: Tensor, experts: int, tile_rows: int, expert_map: Tensor | None = None) -> Alignment:
    """Groups the pairs of `topk_ids` by local expert, in the order of the pairs within an expert.

    Args:
        topk_ids: (M, top_k) integers, any strides; ids outside the experts, -1 among them, count as absent.
        experts: local experts E.
        tile_rows: rows of a tile.
        expert_map: (global experts,) int32 or int64 to local ids, -1 for experts elsewhere; None: ids are local.

    Returns:
        An `Alignment` of `most_tiles(P, E, tile_rows)` tiles, those in use first; experts ascend.
    """
    tiles = most_tiles(topk_ids.numel(), experts, tile_rows)
    if tiles == 0:
        pairs = torch.empty((0, tile_rows), dtype=torch.int32, device=topk_ids.device)
        return Alignment(pairs.new_empty(topk_ids.numel()), pairs, pairs.new_empty(0))
    likely = likely_tiles(topk_ids.numel(), experts, tile_rows, expert_map)
    placed: FewPlaced | Placed
    if is_few(topk_ids.numel(), experts):
        placed = place_few_pairs(topk_ids, experts, tiles, tile_rows, expert_map)
    else:
        given = (topk_ids, experts, tiles * tile_rows, tile_rows, expert_map)
        placed = place_pairs(*given, rows_of_owner=tile_rows, pair_of_row=True)
    return Alignment(placed.local_ids, placed.pair_of_row.view(tiles, tile_rows), placed.owners, likely)


def align_and_quantize(
    x: Tensor,
    topk_ids: Tensor,
    experts: int,
    tile_rows: int,
    expert_map: Tensor | None = None,
    *,
    amax_floor: float,
) -> tuple[Alignment, tuple[Tensor, Tensor]]:
    """`align_pairs`, and `quantize.quantize_per_token_group` of `x`, (M, columns), by one launch: of few pairs."""
    tiles = most_tiles(topk_ids.numel(), experts, tile_rows)
    likely = likely_tiles(topk_ids.numel(), experts, tile_rows, expert_map)
    placed, codes, scales = begin(x, topk_ids, experts, tiles, tile_rows, expert_map, amax_floor=amax_floor)
    alignment = Alignment(placed.local_ids, placed.pair_of_row.view(tiles, tile_rows), placed.owners, likely)
    return alignment, (codes, scales)


def align_batches(counts: Tensor, rows: int, tile_rows: int) -> Alignment:
    """Tiles for a batched layout: E batches of `rows` rows each, of which the first counts[e] hold something.

    Row r of batch e is the pair e * rows + r.

    Args:
        counts: (E,) int32 or int64; more than `rows` count as `rows`, less than none as none.
        rows: rows of a batch.
        tile_rows: rows of a tile.

    Returns:
        An `Alignment` of E * ceil(rows / tile_rows) tiles, batch after batch; a tile without a row that holds
        something has no expert.

    Raises:
        ValueError: 2^31 rows or more, which int32 cannot number.
    """
    batches = counts.numel()
    if batches * rows >= 2**31:
        raise ValueError(f"counts of {batches} batches, rows={rows}: expected fewer than 2^31 rows in all")
    # `rows` need not be a multiple of tile_rows: the positions go to the end of a batch's last tile.
    tiles = -(-rows // tile_rows)
    position = torch.arange(tiles * tile_rows, device=counts.device)
    expert = torch.arange(batches, device=counts.device)[:, None]
    used = position < counts.to(torch.int64).clamp(max=rows)[:, None]
    owner = torch.where(used, expert, -1).to(torch.int32)
    pairs = torch.where(used, expert * rows + position, -1).to(torch.int32)
    return Alignment(
        local_ids=owner[:, :rows].reshape(-1).contiguous(),  # reshape alone may give a view with a stride
        pairs=pairs.reshape(batches * tiles, tile_rows),
        tile_experts=owner[:, ::tile_rows].reshape(-1).contiguous(),
    )
