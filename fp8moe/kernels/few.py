"""Tiles of each expert's pairs where pairs are few, by one program of one kernel: a call with few tokens takes about as
long as its launches do.

On integers alone. Each pair is compared with every other, so nothing is counted or filled beforehand, and no two stores
go to the same place, so none waits for another.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp8moe.kernels.interpreter import INTERPRETED
from fp8moe.kernels.places import FEWEST, local_experts

FEW = 128
"""The most pairs that are laid out so: the work grows with their square. On an H200 one launch takes 1.6 us for up to
32 pairs and 3.7 us for 128, where those of `places` take 3.2 to 4.4 and 4.8 to 5.6; of 256 pairs it is the slower."""
CHUNK = 32
"""Pairs that all are compared with at a time."""
PADDING = 8
"""Rows of a tile that are filled at a time."""


@triton.jit(do_not_specialize=["pairs", "limit", "experts", "tiles", "pad"])
def place_few_pairs_kernel(
    ids,
    expert_map,
    weights,
    local_ids,
    settled_weights,
    pair_of_row,
    owners,
    count,
    pairs,
    limit,
    experts,
    tiles,
    pad,
    HAS_MAP: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    PADDING: tl.constexpr,
    PAIRS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """A pair's row is TILE_ROWS times the tiles of smaller experts, and the earlier pairs of its own."""
    pair = tl.arange(0, PAIRS)
    real = pair < pairs
    given = tl.load(ids + pair, mask=real, other=-1).to(tl.int64)
    known, local = local_experts(given, expert_map, limit, experts, HAS_MAP)
    tl.store(local_ids + pair, local, mask=real)
    if HAS_WEIGHTS:
        tl.store(settled_weights + pair, tl.load(weights + pair, mask=known, other=0.0), mask=real)
    # Three counts of ten bits each, from the lowest: pairs of a pair's expert, the earlier ones of them, and tiles of
    # smaller experts.
    counts = tl.full((PAIRS, CHUNK), 0, tl.int32)
    for first in range(0, pairs, CHUNK):
        other = first + tl.arange(0, CHUNK)[None, :]
        other_id = tl.load(ids + other, mask=other < pairs, other=-1).to(tl.int64)
        _, expert = local_experts(other_id, expert_map, limit, experts, HAS_MAP)
        alike = tl.where(local[:, None] == expert, tl.where(other < pair[:, None], 1 + (1 << 10), 1), 0)
        # Of the other pair: its expert's pairs, without those that are later and itself.
        total = tl.sum(alike, axis=0, keep_dims=True)
        earlier = (total & 1023) - (total >> 10) - 1
        tile = tl.where((expert >= 0) & (earlier % TILE_ROWS == 0), 1 << 20, 0)
        counts += alike + tl.where(expert < local[:, None], tile, 0)
    counts = tl.sum(counts, axis=1)
    alike, earlier, tile = counts & 1023, (counts >> 10) & 1023, counts >> 20
    row = tile * TILE_ROWS + earlier
    first_row = (local >= 0) & (earlier % TILE_ROWS == 0)
    used = tl.sum(first_row.to(tl.int32), axis=0)
    tl.store(count, used * TILE_ROWS)
    tl.store(pair_of_row + row, pair, mask=local >= 0)
    tl.store(owners + row // TILE_ROWS, local, mask=first_row)
    # The last rows of an expert's last tile, and the tiles that are not needed; there are no more tiles than pairs.
    unused = (pair >= used) & (pair < tiles)
    tl.store(owners + pair, tl.full((PAIRS,), -1, tl.int32), mask=unused)
    pads = tl.full((PAIRS, PADDING), pad, tl.int32)
    for start in tl.static_range(0, TILE_ROWS, PADDING):
        further = start + tl.arange(0, PADDING)[None, :]
        inside = further < TILE_ROWS
        past = first_row[:, None] & (earlier[:, None] + further >= alike[:, None])
        tl.store(pair_of_row + row[:, None] + further, pads, mask=inside & past)
        tl.store(pair_of_row + pair[:, None] * TILE_ROWS + further, pads, mask=inside & unused[:, None])


@dataclass(frozen=True)
class FewPlaced:
    """P = M * top_k pairs in tiles.

    Args:
        local_ids: (P,) int32, -1 where a pair has no expert here.
        pair_of_row: (tiles * tile_rows,) int32, each row's pair, `pad` where it has none.
        owners: (tiles,) int32, each tile's expert, -1 for a tile that is not needed.
        count: (1,) int32, rows of the tiles that are needed, which come first.
        weights: (P,) fp32, 0 for absent pairs; empty where not wanted.
    """

    local_ids: Tensor
    pair_of_row: Tensor
    owners: Tensor
    count: Tensor
    weights: Tensor


def place_few_pairs(
    topk_ids: Tensor,
    experts: int,
    tiles: int,
    tile_rows: int,
    expert_map: Tensor | None = None,
    *,
    pad: int = -1,
    weights: Tensor | None = None,
) -> FewPlaced:
    """Groups the P = M * top_k pairs of `topk_ids` by local expert, each expert's from a tile's first row on; experts
    ascend, and so do an expert's pairs.

    Args:
        topk_ids: (M, top_k) integers, 1 to `FEW`, contiguous, else they are copied first; ids outside the experts, -1
            among them, are absent.
        experts: local experts E.
        tiles: enough for every id, and at most P.
        tile_rows: rows of a tile.
        expert_map: (global experts,) int32 or int64 to local ids; None: ids are local.
        pad: stands for no pair.
        weights: (M, top_k) fp32, as `topk_ids`, where they are wanted.
    """
    placed, arguments = few_arguments(topk_ids, experts, tiles, tile_rows, expert_map, pad=pad)
    if weights is not None:
        placed = replace(placed, weights=torch.empty(topk_ids.numel(), dtype=torch.float32, device=topk_ids.device))
    place_few_pairs_kernel[(1,)](
        weights=None if weights is None else weights.contiguous(),
        settled_weights=None if weights is None else placed.weights,
        HAS_WEIGHTS=weights is not None,
        **arguments,
    )
    return placed


def few_arguments(
    topk_ids: Tensor, experts: int, tiles: int, tile_rows: int, expert_map: Tensor | None, *, pad: int
) -> tuple[FewPlaced, dict[str, Any]]:
    """What `place_few_pairs_kernel` fills, without weights, and all of its launch but what concerns them.

    Args: as `place_few_pairs`.
    """
    pairs, device = topk_ids.numel(), topk_ids.device
    block = max(triton.next_power_of_2(pairs), FEWEST)
    expert_map = None if expert_map is None else expert_map.contiguous()
    # Each of its own, and so aligned for whoever reads several at a time.
    placed = FewPlaced(
        *(torch.empty(size, dtype=torch.int32, device=device) for size in (pairs, tiles * tile_rows, tiles, 1)),
        weights=torch.empty(0, dtype=torch.float32, device=device),
    )
    arguments = {
        "ids": topk_ids.contiguous(),
        "expert_map": expert_map,
        "local_ids": placed.local_ids,
        "pair_of_row": placed.pair_of_row,
        "owners": placed.owners,
        "count": placed.count,
        "pairs": pairs,
        "limit": experts if expert_map is None else expert_map.numel(),
        "experts": experts,
        "tiles": tiles,
        "pad": pad,
        "HAS_MAP": expert_map is not None,
        "TILE_ROWS": tile_rows,
        "PADDING": triton.next_power_of_2(tile_rows) if INTERPRETED else PADDING,
        "PAIRS": block,
        "CHUNK": block if INTERPRETED else min(block, CHUNK),
        "num_warps": warps_of(block),
    }
    return placed, arguments


def warps_of(pairs: int) -> int:
    """Of a program with so many pairs, a power of two: at most sixteen comparisons a thread at a time."""
    return max(pairs * CHUNK // 512, 4)
