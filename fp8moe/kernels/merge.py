"""Pairs for a library that knows a rank's own experts and one id for all others, which finds an expert once a token.

One kernel: the expert map, the absent ids, and the sum over a token's slots with one expert.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp8moe.kernels.interpreter import rows_of_program
from fp8moe.kernels.places import local_experts

PAIRS_OF_SLOTS = 512
"""Of one program: a token's slots are compared each with each."""


@triton.jit(do_not_specialize=["tokens", "top_k", "limit", "experts"])
def merge_slots_kernel(
    ids,
    weights,
    expert_map,
    merged_ids,
    merged_weights,
    without,
    tokens,
    top_k,
    limit,
    experts,
    stride_ids_token,
    stride_ids_slot,
    stride_weights_token,
    stride_weights_slot,
    HAS_MAP: tl.constexpr,
    MERGE: tl.constexpr,
    SLOTS: tl.constexpr,
    ROWS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    slot = tl.arange(0, SLOTS)
    real = (token < tokens)[:, None] & (slot < top_k)[None, :]
    at = token[:, None] * stride_ids_token + slot[None, :] * stride_ids_slot
    given = tl.load(ids + at, mask=real, other=-1).to(tl.int64)
    known, local = local_experts(given, expert_map, limit, experts, HAS_MAP)
    kept = local >= 0
    expert = tl.where(kept, local, experts)
    at = token[:, None] * stride_weights_token + slot[None, :] * stride_weights_slot
    weight = tl.load(weights + at, mask=known, other=0.0).to(tl.float32)
    if MERGE:
        before = (slot[None, :] < slot[:, None])[None, :, :]
        repeated = (expert[:, :, None] == expert[:, None, :]) & before
        # Ordered as the numbers are, NaN outermost, and no two slots of a token in the same place.
        bits = weight.to(tl.int32, bitcast=True)
        order = bits ^ ((bits >> 31) & 0x7FFFFFFF)
        smaller = (order[:, None, :] < order[:, :, None]) | ((order[:, None, :] == order[:, :, None]) & before)
        rank = tl.sum(smaller.to(tl.int32), axis=2)
        wide = weight.to(tl.float64)
        total = tl.zeros((ROWS, SLOTS), tl.float64)
        for place in range(SLOTS):
            here = rank == place
            same = expert == tl.sum(tl.where(here, expert, 0), axis=1)[:, None]
            total += same.to(tl.float64) * tl.sum(tl.where(here, wide, 0.0), axis=1)[:, None]
        kept = kept & (tl.max(repeated.to(tl.int32), axis=2) == 0)
        expert = tl.where(kept, expert, experts)
        weight = tl.where(kept, total.to(tl.float32), 0.0)
    out = token[:, None] * top_k + slot[None, :]
    tl.store(merged_ids + out, expert, mask=real)
    tl.store(merged_weights + out, weight, mask=real)
    tl.store(without + token, (tl.max(known.to(tl.int32), axis=1) == 0).to(tl.uint8), mask=token < tokens)


def merge_slots(
    ids: Tensor, weights: Tensor, expert_map: Tensor | None, experts: int, *, merge: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Each local expert in the first of a token's slots that have it, with the sum of their weights; `experts`, an id
    that stands for all others, in every other slot, with the weight 0.

    A sum is taken in fp64, from zero, smallest weight first whatever the slots, and rounded once to fp32: so no order
    of a token's slots shows. Where fp64 is exact, every other order has the same bits, and it is where the magnitudes
    of an expert's weights add up to at most 2^29 times the smallest that is not 0; elsewhere another order may have
    others. Every sum of a token has all its weights in it, those of other experts times 0: an infinite weight, or NaN,
    makes NaN of the others' sums.

    Args:
        ids: (M, k) int32, int64 or uint32, any strides; ids outside the experts, -1 among them, are absent, and the
            weight of an absent pair counts as 0.
        weights: (M, k) fp32, any strides.
        expert_map: (global experts,) int32 or int64, contiguous, to local ids, -1 for experts elsewhere; None: ids are
            local.
        experts: how many local ones there are; other local ids count as elsewhere.
        merge: False: every slot keeps its expert and its weight, also another rank's weight.

    Returns:
        - (M, k) int32 ids;
        - (M, k) fp32 weights;
        - (M, 1) bool, True for tokens without any expert, here or elsewhere.
    """
    (tokens, top_k), device = ids.shape, ids.device
    merged_ids = torch.empty((tokens, top_k), dtype=torch.int32, device=device)
    merged_weights = torch.empty((tokens, top_k), dtype=torch.float32, device=device)
    without = torch.empty((tokens, 1), dtype=torch.bool, device=device)
    if tokens * top_k:
        slots = triton.next_power_of_2(top_k)
        rows_each = rows_of_program(tokens, max(PAIRS_OF_SLOTS // slots**2, 1))
        merge_slots_kernel[(triton.cdiv(tokens, rows_each),)](
            ids,
            weights,
            expert_map,
            merged_ids,
            merged_weights,
            without.view(torch.uint8),
            tokens,
            top_k,
            experts if expert_map is None else expert_map.numel(),
            experts,
            *ids.stride(),
            *weights.stride(),
            HAS_MAP=expert_map is not None,
            MERGE=merge,
            SLOTS=slots,
            ROWS=rows_each,
            num_warps=4,
            enable_fp_fusion=False,
        )
    return merged_ids, merged_weights, without
