"""The base class's `apply` for batched backends: group tokens by expert, compute, put the results back."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fp8moe.dispatch import combine, local_ids, weighted_input
from fp8moe.validation import InvalidMoEInput, check_call

if TYPE_CHECKING:
    from fp8moe.experts import FusedMoEPermuteExpertsUnpermute


def apply_through_batches(
    experts: FusedMoEPermuteExpertsUnpermute,
    hidden_states: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    expert_map: Tensor | None,
    apply_router_weight_on_input: bool,
    output: Tensor | None,
) -> Tensor:
    """`apply` in terms of `apply_batched`; arguments, result and errors as `apply`."""
    config, device = experts.config, experts.weights.w13.device
    check_call(
        config,
        device,
        hidden_states,
        topk_weights,
        topk_ids,
        expert_map=expert_map,
        apply_router_weight_on_input=apply_router_weight_on_input,
        output=output,
    )
    tokens, top_k = topk_ids.shape
    local = local_ids(topk_ids, expert_map)
    expert, row, counts = _places(local, config.num_local_experts)
    longest = int(counts.max()) if counts.numel() else 0
    source = hidden_states
    weights = topk_weights
    if apply_router_weight_on_input:
        source, weights = weighted_input(hidden_states, topk_weights), torch.ones_like(topk_weights)
    batch = source.new_zeros(config.num_local_experts, longest, config.hidden_dim)
    pairs = (local.reshape(-1) >= 0).nonzero()[:, 0]
    batch[expert[pairs], row[pairs]] = source[pairs // top_k]
    results = experts.apply_batched(batch, counts)
    if tuple(results.shape) != tuple(batch.shape):
        raise InvalidMoEInput(
            "apply_batched's result", f"of shape {tuple(results.shape)}", f"(E, T, H) = {tuple(batch.shape)}"
        )
    slots = torch.zeros(tokens * top_k, config.hidden_dim, dtype=torch.float32, device=device)
    slots[pairs] = results[expert[pairs], row[pairs]].float()
    slots = slots.view(tokens, top_k, config.hidden_dim)
    total = combine(slots, weights, local >= 0, config.in_dtype, experts.contract.recipe.combine == "input")
    if output is None:
        return total
    output.copy_(total)
    return output


def _places(local: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """For each pair, in the order token then slot: its expert and its row among the expert's tokens; the counts."""
    flat = local.reshape(-1)
    ours = torch.where(flat < 0, experts, flat)
    counts = torch.bincount(ours, minlength=experts + 1)
    order = torch.argsort(ours, stable=True)
    starts = torch.cumsum(counts, 0) - counts
    row = torch.empty_like(flat)
    row[order] = torch.arange(flat.numel(), device=flat.device) - starts[ours[order]]
    return flat, row, counts[:experts].to(torch.int32)
