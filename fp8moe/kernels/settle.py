"""Pairs for a library that knows no -1, in one kernel; on integers and copies alone."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp8moe.kernels.interpreter import rows_of_program

ROWS = 8
"""Tokens of one program."""


@triton.jit(do_not_specialize=["tokens", "top_k", "limit"])
def settle_pairs_kernel(
    ids,
    weights,
    expert_map,
    settled_ids,
    settled_weights,
    present,
    local_ids,
    without,
    tokens,
    top_k,
    limit,
    stride_ids_token,
    stride_ids_slot,
    stride_weights_token,
    stride_weights_slot,
    HAS_MAP: tl.constexpr,
    ALL_EXPERTS: tl.constexpr,
    SLOTS: tl.constexpr,
    ROWS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    slot = tl.arange(0, SLOTS)
    real = (token < tokens)[:, None] & (slot < top_k)[None, :]
    at = token[:, None] * stride_ids_token + slot[None, :] * stride_ids_slot
    given = tl.load(ids + at, mask=real, other=-1).to(tl.int64)
    known = (given >= 0) & (given < limit)
    slots = tl.broadcast_to(slot[None, :], (ROWS, SLOTS))
    first = tl.min(tl.where(known, slots, SLOTS), axis=1)
    own = tl.sum(tl.where(slots == first[:, None], given, 0), axis=1)
    local = given
    if HAS_MAP:
        local = tl.load(expert_map + tl.where(known, given, 0), mask=real & known, other=-1).to(tl.int64)
        every = tl.arange(0, ALL_EXPERTS)
        here = tl.load(expert_map + every, mask=every < limit, other=0)
        other = tl.min(tl.where((here < 0) & (every < limit), every, ALL_EXPERTS), axis=0)
        own = tl.where(first < SLOTS, own, tl.where(other < ALL_EXPERTS, other, 0))
    out = token[:, None] * top_k + slot[None, :]
    tl.store(settled_ids + out, tl.where(known, given, own[:, None]).to(tl.int32), mask=real)
    at = token[:, None] * stride_weights_token + slot[None, :] * stride_weights_slot
    tl.store(settled_weights + out, tl.load(weights + at, mask=real & known, other=0.0).to(tl.float32), mask=real)
    tl.store(present + out, known.to(tl.uint8), mask=real)
    tl.store(local_ids + out, tl.where(known & (local >= 0), local, -1).to(tl.int32), mask=real)
    tl.store(without + token, (first == SLOTS).to(tl.uint8), mask=token < tokens)


def settle_pairs(
    ids: Tensor, weights: Tensor, expert_map: Tensor | None, experts: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gives every absent pair an expert that its token has anyway, and the weight 0.

    Args:
        ids: (M, k) int32 or int64, any strides; ids outside the experts, -1 among them, are absent.
        weights: (M, k) fp32, any strides.
        expert_map: (global experts,) int32 or int64, contiguous, to local ids, -1 for experts elsewhere; None: ids are
            local.
        experts: how many local ones there are.

    Returns:
        - (M, k) int32 ids; those of a token without any expert name one of another rank, or the first one where there
          is none;
        - (M, k) fp32 weights;
        - (M, k) bool, False for pairs that are absent;
        - (M, k) int32, the local id of each pair, -1 for those that are absent or another rank's;
        - (M, 1) bool, True for tokens without any expert.
    """
    (tokens, top_k), device = ids.shape, ids.device
    limit = experts if expert_map is None else expert_map.numel()
    settled_ids = torch.empty((tokens, top_k), dtype=torch.int32, device=device)
    settled_weights = torch.empty((tokens, top_k), dtype=torch.float32, device=device)
    present = torch.empty((tokens, top_k), dtype=torch.bool, device=device)
    local_ids = torch.empty((tokens, top_k), dtype=torch.int32, device=device)
    without = torch.empty((tokens, 1), dtype=torch.bool, device=device)
    rows_each = rows_of_program(tokens, ROWS)
    if tokens * top_k:
        settle_pairs_kernel[(triton.cdiv(tokens, rows_each),)](
            ids,
            weights,
            expert_map,
            settled_ids,
            settled_weights,
            present.view(torch.uint8),
            local_ids,
            without.view(torch.uint8),
            tokens,
            top_k,
            limit,
            *ids.stride(),
            *weights.stride(),
            HAS_MAP=expert_map is not None,
            ALL_EXPERTS=triton.next_power_of_2(limit),
            SLOTS=triton.next_power_of_2(top_k),
            ROWS=rows_each,
            num_warps=4,
        )
    return settled_ids, settled_weights, present, local_ids, without
