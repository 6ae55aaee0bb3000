"""Where each token-expert pair goes: pairs grouped by expert, each expert's from a multiple of some number of rows on.

Three small kernels, or two where the pairs fit into one chunk, on integers alone: every order of their programs gives
the same numbers. Nothing waits for the device.
"""

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor, empty, full, int32, int64

from fp8moe.kernels.interpreter import INTERPRETED

FEWEST, CHUNK = 16, 512
"""Pairs of one program, a power of two: the fewest and the most."""
EXPERTS = 16
"""Experts of one program."""
CHUNKS = 64
"""Chunks whose counts are summed up at a time."""


@triton.jit
def local_experts(given, expert_map, limit, experts, HAS_MAP: tl.constexpr):
    """Of int64 ids: whether they name an expert, and its local id in int32, -1 where there is none here."""
    known = (given >= 0) & (given < limit)
    local = given
    if HAS_MAP:
        local = tl.load(expert_map + tl.where(known, given, 0), mask=known, other=-1).to(tl.int64)
    return known, tl.where(known & (local >= 0) & (local < experts), local, -1).to(tl.int32)


@triton.jit(do_not_specialize=["pairs", "top_k", "limit", "experts"])
def count_pairs_kernel(
    ids,
    expert_map,
    local_ids,
    counts,
    pairs,
    top_k,
    limit,
    experts,
    stride_token,
    stride_slot,
    HAS_MAP: tl.constexpr,
    EXPERTS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Local ids of a chunk of pairs, and how many of them each expert has: counts[chunk, expert]."""
    chunk = tl.program_id(1)
    pair = chunk * CHUNK + tl.arange(0, CHUNK)
    real = pair < pairs
    token = (pair // top_k).to(tl.int64)
    given = tl.load(ids + token * stride_token + (pair % top_k) * stride_slot, mask=real, other=-1).to(tl.int64)
    _, local = local_experts(given, expert_map, limit, experts, HAS_MAP)
    if tl.program_id(0) == 0:
        tl.store(local_ids + pair, local, mask=real)
    expert = tl.program_id(0) * EXPERTS + tl.arange(0, EXPERTS)
    found = tl.sum((expert[:, None] == local[None, :]).to(tl.int32), axis=1)
    tl.store(counts + chunk * experts + expert, found, mask=expert < experts)


@triton.jit(do_not_specialize=["chunks", "experts"])
def sum_counts_kernel(counts, totals, chunks, experts, CHUNKS: tl.constexpr, EXPERTS: tl.constexpr):
    """counts[chunk, expert] become the sums over the chunks before, and totals[expert] the sum over all."""
    expert = tl.program_id(0) * EXPERTS + tl.arange(0, EXPERTS)
    total = tl.full((EXPERTS,), 0, tl.int32)
    for first in range(0, chunks, CHUNKS):
        chunk = first + tl.arange(0, CHUNKS)
        mask = (chunk < chunks)[:, None] & (expert < experts)[None, :]
        at = counts + chunk[:, None] * experts + expert[None, :]
        found = tl.load(at, mask=mask, other=0)
        tl.store(at, total[None, :] + tl.cumsum(found, axis=0) - found, mask=mask)
        total += tl.sum(found, axis=0)
    tl.store(totals + expert, total, mask=expert < experts)


@triton.jit(do_not_specialize=["pairs", "experts"])
def place_pairs_kernel(
    local_ids,
    totals,
    before,
    places,
    pair_of_row,
    owners,
    starts,
    pairs,
    experts,
    ALIGNMENT: tl.constexpr,
    ROWS_OF_OWNER: tl.constexpr,
    HAS_BEFORE: tl.constexpr,
    HAS_PLACES: tl.constexpr,
    HAS_PAIR_OF_ROW: tl.constexpr,
    HAS_OWNERS: tl.constexpr,
    ALL_EXPERTS: tl.constexpr,
    EXPERTS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """The rows of a chunk of pairs, for some experts."""
    chunk = tl.program_id(1)
    expert = tl.program_id(0) * EXPERTS + tl.arange(0, EXPERTS)
    every = tl.arange(0, ALL_EXPERTS)
    total = tl.load(totals + every, mask=every < experts, other=0)
    aligned = (total + (ALIGNMENT - 1)) // ALIGNMENT * ALIGNMENT
    row = tl.sum(tl.where(every[None, :] < expert[:, None], aligned[None, :], 0), axis=1)
    if chunk == 0:
        tl.store(starts + expert, row.to(tl.int64), mask=expert < experts)
        if tl.program_id(0) == 0:
            tl.store(starts + experts, tl.sum(aligned, axis=0).to(tl.int64))
    if HAS_BEFORE:
        row += tl.load(before + chunk * experts + expert, mask=expert < experts, other=0)
    pair = chunk * CHUNK + tl.arange(0, CHUNK)
    local = tl.load(local_ids + pair, mask=pair < pairs, other=-1)
    mine = expert[:, None] == local[None, :]
    row = row[:, None] + tl.cumsum(mine.to(tl.int32), axis=1) - 1
    if HAS_OWNERS:
        first = mine & (row % ROWS_OF_OWNER == 0)
        tl.store(owners + row // ROWS_OF_OWNER, tl.broadcast_to(expert[:, None], row.shape), mask=first)
    if HAS_PAIR_OF_ROW:
        tl.store(pair_of_row + row, tl.broadcast_to(pair[None, :], row.shape), mask=mine)
    if HAS_PLACES:
        tl.store(tl.broadcast_to((places + pair)[None, :], row.shape), row, mask=mine)
        if tl.program_id(0) == 0:
            tl.store(places + pair, tl.full((CHUNK,), -1, tl.int32), mask=(pair < pairs) & (local < 0))


@dataclass(frozen=True)
class Placed:
    """Pairs in the rows of a layout; P = M * top_k.

    Args:
        local_ids: (P,) int32, -1 where a pair has no expert here.
        starts: (E + 1,) int64, each expert's first row, and one past the last's, aligned.
        owners: (ceil(rows / rows_of_owner),) int32, the expert of each row, or of each tile of the alignment; -1 where
            there is none; empty where not wanted.
        places: (P,) int32, each pair's row, -1 where it has none; empty where not wanted.
        pair_of_row: (rows,) int32, each row's pair, -1 where it has none; empty where not wanted.
    """

    local_ids: Tensor
    starts: Tensor
    owners: Tensor
    places: Tensor
    pair_of_row: Tensor


def place_pairs(
    topk_ids: Tensor,
    experts: int,
    rows: int,
    alignment: int,
    expert_map: Tensor | None = None,
    *,
    rows_of_owner: int = 0,
    places: bool = False,
    pair_of_row: bool = False,
) -> Placed:
    """Groups the P = M * top_k pairs of `topk_ids` by local expert; experts ascend, and so do an expert's pairs.

    Args:
        topk_ids: (M, top_k) integers, any strides, at least one; ids outside the experts, -1 among them, are absent.
        experts: local experts E.
        rows: of the layout, enough for every id.
        alignment: of an expert's first row.
        expert_map: (global experts,) int32 or int64 to local ids; None: ids are local.
        rows_of_owner: 1, or the alignment; 0: owners are not wanted.
        places, pair_of_row: whether these are wanted.
    """
    pairs, top_k = topk_ids.numel(), topk_ids.shape[1]
    experts_each = max(triton.next_power_of_2(experts), EXPERTS) if INTERPRETED else EXPERTS
    chunk = min(max(triton.next_power_of_2(pairs), FEWEST), 4096 if INTERPRETED else CHUNK)
    chunks, blocks = triton.cdiv(pairs, chunk), triton.cdiv(experts, experts_each)
    device = topk_ids.device
    expert_map = None if expert_map is None else expert_map.contiguous()
    owner_rows = -(-rows // rows_of_owner) if rows_of_owner else 0
    # Those with places for what is not there, which no pair writes.
    filled = full((owner_rows + pair_of_row * rows,), -1, dtype=int32, device=device)
    owners, found_pairs = filled.split((owner_rows, pair_of_row * rows))
    numbers = empty((pairs + places * pairs + (chunks + 1) * experts,), dtype=int32, device=device)
    local_ids, found_places, counts, totals = numbers.split((pairs, places * pairs, chunks * experts, experts))
    starts = empty((experts + 1,), dtype=int64, device=device)
    if chunks == 1:
        totals = counts
    count_pairs_kernel[(blocks, chunks)](
        topk_ids,
        expert_map,
        local_ids,
        counts,
        pairs,
        top_k,
        experts if expert_map is None else expert_map.numel(),
        experts,
        *topk_ids.stride(),
        HAS_MAP=expert_map is not None,
        EXPERTS=experts_each,
        CHUNK=chunk,
        num_warps=4,
    )
    if chunks > 1:
        sum_counts_kernel[(blocks,)](counts, totals, chunks, experts, CHUNKS=CHUNKS, EXPERTS=experts_each, num_warps=4)
    place_pairs_kernel[(blocks, chunks)](
        local_ids,
        totals,
        counts,
        found_places if places else None,
        found_pairs if pair_of_row else None,
        owners if rows_of_owner else None,
        starts,
        pairs,
        experts,
        ALIGNMENT=alignment,
        ROWS_OF_OWNER=rows_of_owner,
        HAS_BEFORE=chunks > 1,
        HAS_PLACES=places,
        HAS_PAIR_OF_ROW=pair_of_row,
        HAS_OWNERS=rows_of_owner > 0,
        ALL_EXPERTS=max(triton.next_power_of_2(experts), 16),
        EXPERTS=experts_each,
        CHUNK=chunk,
        num_warps=4,
    )
    return Placed(local_ids, starts, owners, found_places, found_pairs)
