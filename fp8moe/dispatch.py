"""Token-expert pairs: from global to local ids, the router's weight on the input, the weighted sum over slots."""

from __future__ import annotations

import torch
from torch import Tensor


def local_ids(topk_ids: Tensor, expert_map: Tensor | None, experts: int) -> Tensor:
    """(M, k) int64 local expert ids below `experts`; -1 where the slot is empty, its expert is on another rank, or its
    id is out of range (which an eager call has raised for, and a captured one has marked)."""
    ids = topk_ids.to(torch.int64)
    if expert_map is not None:
        known = (ids >= 0) & (ids < expert_map.numel())
        ids = expert_map.to(torch.int64)[ids.clamp(0, expert_map.numel() - 1)].masked_fill(~known, -1)
    return ids.masked_fill((ids < 0) | (ids >= experts), -1)


def places_by_expert(local: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """For each pair, in the order token then slot, its row among its expert's tokens; (E,) int32 counts."""
    flat = local.reshape(-1)
    ours = torch.where(flat < 0, experts, flat)
    sorted_ids, order = torch.sort(ours, stable=True)
    starts = torch.searchsorted(sorted_ids, torch.arange(experts + 2, device=flat.device))
    row = torch.empty_like(flat)
    row[order] = torch.arange(flat.numel(), device=flat.device) - starts[sorted_ids]
    return row, starts.diff()[:experts].to(torch.int32)


def weighted_input(hidden_states: Tensor, topk_weights: Tensor) -> Tensor:
    """Top-1: each token times its routing weight in fp32, rounded to the tokens' dtype."""
    return (hidden_states.float() * topk_weights).to(hidden_states.dtype)


def combine(
    slots: Tensor,
    weights: Tensor,
    present: Tensor,
    dtype: torch.dtype,
    round_sum: bool,
    round_terms: bool = False,
) -> Tensor:
    """Sum over the slots of a token, in their order: each result times its weight, added in fp32.

    Args:
        slots: (M, k, H) fp32; what absent slots hold is never read.
        weights: (M, k) fp32.
        present: (M, k) bool.
        dtype: of the output.
        round_sum: round the running sum to `dtype` after each slot.
        round_terms: round each result times its weight to `dtype` before it is added.

    Returns:
        (M, H) in `dtype`.
    """
    total = slots.new_zeros(slots.shape[0], slots.shape[2])
    for slot in range(slots.shape[1]):
        term = torch.where(present[:, slot, None], slots[:, slot] * weights[:, slot, None], 0.0)
        if round_terms:
            term = term.to(dtype).float()
        total = total + term
        if round_sum:
            total = total.to(dtype).float()
    return total.to(dtype)
