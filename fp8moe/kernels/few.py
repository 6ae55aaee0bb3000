"""Tiles of each expert's pairs where pairs are few, by one launch: a call with few tokens takes about as long as its
launches do.

On integers alone. Each program looks at all pairs and places some of them; nothing is counted or filled beforehand, and
no two stores go to the same place, so none waits for another.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp8moe.kernels.interpreter import INTERPRETED
from fp8moe.kernels.places import FEWEST, local_experts

FEW = 1024
"""The most pairs that are laid out so: the work grows with their square. On an H200, with 128 experts, one launch takes
3.3 us for 512 pairs and 3.9 us for 1,024, where those of `places` take 8.3 and 10.1; of 2,048 pairs 6.9 and 10.6
(reports/h200/2026-11-30-begin/counting.txt)."""
FEWER = 64
"""The most pairs that one program places, by comparing each with each: 1.4 to 2.2 us, by counting 2.4 to 2.7."""
MOST_EXPERTS = 1023
"""Of this rank, where programs count: each holds a number for every one."""
OWN, ALL = 8, 1024
"""Pairs that a program of several places, and counts at a time."""
COMPARED = 32
"""Pairs that all are compared with at a time."""
PADDING = 8
"""Rows of a tile that are filled at a time."""
WARPS = 4


def is_few(pairs: int, experts: int) -> bool:
    """Whether `place_few_pairs` takes so many pairs, and experts of this rank."""
    return 0 < pairs <= FEW and (pairs <= FEWER or experts <= MOST_EXPERTS)


@triton.jit
def by_comparing(
    ids,
    expert_map,
    pair,
    local,
    pairs,
    limit,
    experts,
    HAS_MAP: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Of each of all pairs, by comparing it with every other: pairs of its expert, the earlier ones of them, and tiles
    of smaller experts; and of all experts together the tiles."""
    # Three counts of ten bits each, from the lowest.
    counts = tl.full((pair.shape[0], CHUNK), 0, tl.int32)
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
    used = tl.sum(((local >= 0) & (earlier % TILE_ROWS == 0)).to(tl.int32), axis=0)
    return alike, earlier, tile, used


@triton.jit
def by_counting(
    ids,
    expert_map,
    pair,
    local,
    pairs,
    limit,
    experts,
    HAS_MAP: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    """The same of some of the pairs, by counting those of each expert."""
    number = tl.arange(0, EXPERTS)
    total = tl.full((EXPERTS,), 0, tl.int32)
    before = tl.full((pair.shape[0], CHUNK), 0, tl.int32)
    for first in range(0, pairs, CHUNK):
        other = first + tl.arange(0, CHUNK)
        other_id = tl.load(ids + other, mask=other < pairs, other=-1).to(tl.int64)
        _, expert = local_experts(other_id, expert_map, limit, experts, HAS_MAP)
        # The last number, which no expert has, stands for none.
        total += tl.histogram(tl.where(expert >= 0, expert, EXPERTS - 1), EXPERTS)
        before += ((local[:, None] == expert[None, :]) & (other[None, :] < pair[:, None])).to(tl.int32)
    needed = tl.where(number < experts, (total + (TILE_ROWS - 1)) // TILE_ROWS, 0)
    # Two numbers of sixteen bits: tiles of smaller experts, and pairs.
    of_expert = ((tl.cumsum(needed, axis=0) - needed) << 16) | total
    of_pair = tl.sum(tl.where(local[:, None] == number[None, :], of_expert[None, :], 0), axis=1)
    return of_pair & 0xFFFF, tl.sum(before, axis=1), of_pair >> 16, tl.sum(needed, axis=0)


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
    EXPERTS: tl.constexpr,
    OWN: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """A pair's row is TILE_ROWS times the tiles of smaller experts, and the earlier pairs of its own. With EXPERTS 0
    one program has all pairs."""
    pair = tl.program_id(0) * OWN + tl.arange(0, OWN)
    real = pair < pairs
    given = tl.load(ids + pair, mask=real, other=-1).to(tl.int64)
    known, local = local_experts(given, expert_map, limit, experts, HAS_MAP)
    tl.store(local_ids + pair, local, mask=real)
    if HAS_WEIGHTS:
        tl.store(settled_weights + pair, tl.load(weights + pair, mask=known, other=0.0), mask=real)
    if EXPERTS == 0:
        alike, earlier, tile, used = by_comparing(
            ids, expert_map, pair, local, pairs, limit, experts, HAS_MAP, TILE_ROWS, CHUNK
        )
    else:
        alike, earlier, tile, used = by_counting(
            ids, expert_map, pair, local, pairs, limit, experts, HAS_MAP, TILE_ROWS, CHUNK, EXPERTS
        )
    row = tile * TILE_ROWS + earlier
    first_row = (local >= 0) & (earlier % TILE_ROWS == 0)
    tl.store(pair_of_row + row, pair, mask=local >= 0)
    tl.store(owners + row // TILE_ROWS, local, mask=first_row)
    if tl.program_id(0) == 0:
        tl.store(count, used * TILE_ROWS)
    # The last rows of an expert's last tile, and the tiles that are not needed; there are no more tiles than pairs.
    unused = (pair >= used) & (pair < tiles)
    tl.store(owners + pair, tl.full((OWN,), -1, tl.int32), mask=unused)
    pads = tl.full((OWN, PADDING), pad, tl.int32)
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
        topk_ids: (M, top_k) integers, so many that `is_few`, contiguous, else they are copied first; ids outside the
            experts, -1 among them, are absent.
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
    place_few_pairs_kernel[(programs_of(topk_ids.numel(), experts),)](
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
    expert_map = None if expert_map is None else expert_map.contiguous()
    # Each of its own, and so aligned for whoever reads several at a time.
    local_ids, pair_of_row, owners, count = (
        torch.empty(size, dtype=torch.int32, device=device) for size in (pairs, tiles * tile_rows, tiles, 1)
    )
    arguments = {
        "ids": topk_ids.contiguous(),
        "expert_map": expert_map,
        "local_ids": local_ids,
        "pair_of_row": pair_of_row,
        "owners": owners,
        "count": count,
        "pairs": pairs,
        "limit": experts if expert_map is None else expert_map.numel(),
        "experts": experts,
        "tiles": tiles,
        "pad": pad,
        "HAS_MAP": expert_map is not None,
        "TILE_ROWS": tile_rows,
        "PADDING": triton.next_power_of_2(tile_rows) if INTERPRETED else PADDING,
        **program_of(pairs, experts),
        "num_warps": WARPS,
    }
    return FewPlaced(local_ids, pair_of_row, owners, count, torch.empty(0, device=device)), arguments


def program_of(pairs: int, experts: int) -> dict[str, int]:
    """What a program does: pairs that it places, those that it looks at at a time, numbers of experts or 0."""
    block: int = max(triton.next_power_of_2(pairs), FEWEST)
    if pairs <= FEWER:
        return {"OWN": block, "CHUNK": block if INTERPRETED else min(block, COMPARED), "EXPERTS": 0}
    counted = max(triton.next_power_of_2(experts + 1), FEWEST)
    # The interpreter's time goes with the number of programs.
    return {"OWN": block if INTERPRETED else OWN, "CHUNK": min(block, ALL), "EXPERTS": counted}


def programs_of(pairs: int, experts: int) -> int:
    return int(triton.cdiv(pairs, program_of(pairs, experts)["OWN"]))
