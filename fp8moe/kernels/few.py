"""Tiles of each expert's pairs where pairs are few, by one launch: a call with few tokens takes about as long as its
launches do.

On integers alone. Each program counts all pairs, and places some of them; nothing is counted or filled beforehand, and
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
"""The most pairs that are laid out so: the work grows with their square."""
MOST_EXPERTS = 1023
"""Of this rank: each program holds a number for each."""
OWN = 32
"""Pairs that a program places."""
CHUNK = 256
"""Pairs that are counted at a time."""
PADDING = 8
"""Rows of a tile that are filled at a time."""
WARPS = 4


def is_few(pairs: int, experts: int) -> bool:
    """Whether `place_few_pairs` takes so many pairs, and experts of this rank."""
    return 0 < pairs <= FEW and experts <= MOST_EXPERTS


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
    """A pair's row is TILE_ROWS times the tiles of smaller experts, and the earlier pairs of its own."""
    pair = tl.program_id(0) * OWN + tl.arange(0, OWN)
    real = pair < pairs
    given = tl.load(ids + pair, mask=real, other=-1).to(tl.int64)
    known, local = local_experts(given, expert_map, limit, experts, HAS_MAP)
    tl.store(local_ids + pair, local, mask=real)
    if HAS_WEIGHTS:
        tl.store(settled_weights + pair, tl.load(weights + pair, mask=known, other=0.0), mask=real)
    number = tl.arange(0, EXPERTS)
    total = tl.full((EXPERTS,), 0, tl.int32)
    before = tl.full((OWN, CHUNK), 0, tl.int32)
    for first in range(0, pairs, CHUNK):
        other = first + tl.arange(0, CHUNK)
        other_id = tl.load(ids + other, mask=other < pairs, other=-1).to(tl.int64)
        _, expert = local_experts(other_id, expert_map, limit, experts, HAS_MAP)
        # The last number, which no expert has, stands for none.
        total += tl.histogram(tl.where(expert >= 0, expert, EXPERTS - 1), EXPERTS)
        before += ((local[:, None] == expert[None, :]) & (other[None, :] < pair[:, None])).to(tl.int32)
    needed = tl.where(number < experts, (total + (TILE_ROWS - 1)) // TILE_ROWS, 0)
    used = tl.sum(needed, axis=0)
    # Two numbers of sixteen bits: tiles of smaller experts, and pairs.
    of_expert = ((tl.cumsum(needed, axis=0) - needed) << 16) | total
    of_pair = tl.sum(tl.where(local[:, None] == number[None, :], of_expert[None, :], 0), axis=1)
    tile, alike, earlier = of_pair >> 16, of_pair & 0xFFFF, tl.sum(before, axis=1)
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
    place_few_pairs_kernel[(programs_of(topk_ids.numel()),)](
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
    own = own_of(pairs)
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
        "EXPERTS": max(triton.next_power_of_2(experts + 1), FEWEST),
        "OWN": own,
        "CHUNK": max(own, FEW) if INTERPRETED else min(max(triton.next_power_of_2(pairs), own), CHUNK),
        "num_warps": WARPS,
    }
    return FewPlaced(local_ids, pair_of_row, owners, count, torch.empty(0, device=device)), arguments


def own_of(pairs: int) -> int:
    """Pairs of a program, a power of two; the interpreter's time goes with the number of programs."""
    block: int = max(triton.next_power_of_2(pairs), FEWEST)
    return block if INTERPRETED else min(block, OWN)


def programs_of(pairs: int) -> int:
    return int(triton.cdiv(pairs, own_of(pairs)))
