"""The base class's `apply` for batched backends: group tokens by expert, compute, put the results back.

Torch operations whose shapes follow from the arguments' shapes but for T, the rows of a batch: the longest batch in
eager mode, and under graph capture, where nothing may wait for the device, the most that an expert could get.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fp8moe.dispatch import combine, local_ids, places_by_expert, weighted_input
from fp8moe.validation import InvalidMoEInput

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
    from fp8moe.experts import is_capturing

    config = experts.config
    experts.check_call(
        hidden_states,
        topk_weights,
        topk_ids,
        expert_map=expert_map,
        apply_router_weight_on_input=apply_router_weight_on_input,
        output=output,
    )
    tokens, top_k = topk_ids.shape
    local = local_ids(topk_ids, expert_map, config.num_local_experts)
    row, counts = places_by_expert(local, config.num_local_experts)
    longest = tokens * top_k if is_capturing(hidden_states.device) else int(counts.max())
    rows = config.num_local_experts * longest
    if rows >= 2**31:
        raise InvalidMoEInput("topk_ids", f"such that the batches have {rows} rows", "fewer than 2^31: split the call")
    source, weights = hidden_states, topk_weights
    recipe = experts.contract.for_tokens(tokens).recipe
    if apply_router_weight_on_input:
        if recipe.input_weights == "input":
            weights = weights.to(config.in_dtype).float()
        source, weights = weighted_input(hidden_states, weights), torch.ones_like(topk_weights)
    # Absent pairs all write to one row past the end.
    place = torch.where(local.reshape(-1) < 0, rows, local.reshape(-1) * longest + row)
    batch = source.new_zeros(rows + 1, config.hidden_dim)
    batch[place] = source.repeat_interleave(top_k, dim=0)
    batch = batch[:rows].view(config.num_local_experts, longest, config.hidden_dim)
    results = _computed(experts, batch, counts, place)
    slots = _taken(results, place).float().view(tokens, top_k, config.hidden_dim)
    roundings = (recipe.combine == "input", recipe.weighted == "input")
    if recipe.routing_weights == "input":
        weights = weights.to(config.in_dtype).float()
    total = combine(slots, weights, local >= 0, config.in_dtype, *roundings)
    if experts.observe is not None:
        experts.observe("combine", total)
    if output is None:
        return total
    output.copy_(total)
    return output


def _computed(experts: FusedMoEPermuteExpertsUnpermute, batch: Tensor, counts: Tensor, place: Tensor) -> Tensor:
    """`apply_batched` on (E, T, H), checked; whoever observes its stages sees them in the order of the pairs."""
    observe = experts.observe
    if observe is not None:

        def in_order_of_pairs(stage: str, values: Tensor) -> None:
            observe(stage, _taken(values, place))

        experts.observe = in_order_of_pairs
    try:
        results = experts.apply_batched(batch, counts)
    finally:
        experts.observe = observe
    if tuple(results.shape) != tuple(batch.shape):
        raise InvalidMoEInput(
            "apply_batched's result", f"of shape {tuple(results.shape)}", f"(E, T, H) = {tuple(batch.shape)}"
        )
    return results


def _taken(values: Tensor, place: Tensor) -> Tensor:
    """(E, T, columns) to the rows of the pairs, (P, columns); an absent pair gets some row or other, or zeros."""
    flat = values.reshape(-1, values.shape[-1])
    if not len(flat):
        return flat.new_zeros(len(place), values.shape[-1])
    raw = flat.view(torch.uint8) if flat.itemsize == 1 else flat  # torch 2.9 takes no rows of FP8 on a CPU
    return raw[place.clamp(max=len(flat) - 1)].view(flat.dtype)
