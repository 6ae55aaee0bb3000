"""Faults of the expert map and of expert parallelism, seen from one rank."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from conformance.cases import Case
from conformance.zoo.override import overriding
from fp8moe.dispatch import local_ids

SHARD = Case(tokens=16, experts=8, hidden=128, inter=128, ep="2:1", seed=8)
VECTOR = 16
"""Experts whose offsets are loaded at once."""

# -- the map --


@overriding(
    "apply",
    "an expert of another rank, -1 in the map, is used as an index, and the last local expert computes for it",
    witness=SHARD,
)
def map_minus_one_indexed(
    right: Any, self: Any, *given: Tensor, expert_map: Tensor | None = None, **options: Any
) -> Any:
    if expert_map is not None:
        expert_map = torch.where(expert_map < 0, self.config.num_local_experts - 1, expert_map)
    return right(self, *given, expert_map=expert_map, **options)


@overriding(
    "apply",
    "ids go through the map twice, once on the way in and once in the kernel",
    witness=SHARD,
)
def map_applied_twice(right: Any, self: Any, *given: Tensor, expert_map: Tensor | None = None, **options: Any) -> Any:
    if expert_map is not None:
        expert_map = torch.where(expert_map < 0, -1, expert_map[expert_map.long().clamp(min=0)])
    return right(self, *given, expert_map=expert_map, **options)


@overriding(
    "apply",
    "local ids are global ones less the rank's first, whatever order the map has after a rebalance",
    catalogue="logical-map-skipped",
    witness=SHARD,
)
def map_order_ignored(right: Any, self: Any, *given: Tensor, expert_map: Tensor | None = None, **options: Any) -> Any:
    if expert_map is not None:
        here = expert_map >= 0
        expert_map = torch.where(here, here.cumsum(0) - 1, -1).to(expert_map.dtype)
    return right(self, *given, expert_map=expert_map, **options)


@overriding(
    "apply",
    "a map of 64-bit numbers is read as one of 32: low and high words in turn",
    witness=SHARD,
)
def wide_map_misread(right: Any, self: Any, *given: Tensor, expert_map: Tensor | None = None, **options: Any) -> Any:
    if expert_map is not None and expert_map.dtype == torch.int64:
        expert_map = expert_map.view(torch.int32)[: len(expert_map)].contiguous()
    return right(self, *given, expert_map=expert_map, **options)


@overriding(
    "apply",
    "with the router's weight on the input the map is not handed on, and global ids wrap around: a branch of its own",
    witness=Case(tokens=16, experts=8, top_k=1, hidden=128, inter=128, ep="2:0", weight_on_input=True, seed=8),
)
def map_lost_with_weighted_input(
    right: Any, self: Any, hidden: Tensor, weights: Tensor, ids: Tensor, **options: Any
) -> Any:
    if options.get("apply_router_weight_on_input") and options.get("expert_map") is not None:
        ids = torch.where(ids < 0, ids, ids % self.config.num_local_experts)
        options = options | {"expert_map": None}
    return right(self, hidden, weights, ids, **options)


# -- experts of this rank, and of others --


@overriding(
    "apply",
    "the second GEMM's biases, those of this rank, are looked up by global id",
    catalogue="global-id-local-table",
    witness=Case(tokens=16, experts=8, hidden=128, inter=128, ep="2:1", bias=True, seed=8),
)
def global_id_local_table(
    right: Any, self: Any, *given: Tensor, expert_map: Tensor | None = None, **options: Any
) -> Any:
    owned, bias = self.weights, self.weights.w2_bias
    if expert_map is not None and bias is not None:
        ids = expert_map.argsort()[-len(bias) :]  # the global ids of this rank's experts
        self.weights = replace(owned, w2_bias=bias[ids.clamp(max=len(bias) - 1)])
    try:
        return right(self, *given, expert_map=expert_map, **options)
    finally:
        self.weights = owned


@overriding(
    "apply",
    "an expert that two ranks hold is added by both: what its tokens get is twice what it gives",
    catalogue="replica-summed-twice",
    witness=SHARD,
)
def replica_summed_twice(right: Any, self: Any, hidden: Tensor, weights: Tensor, ids: Tensor, **options: Any) -> Any:
    placed = options.get("expert_map")
    if placed is not None:
        shared = local_ids(ids, placed, self.config.num_local_experts) == 0
        weights = torch.where(shared, 2 * weights, weights)
    return right(self, hidden, weights, ids, **options)


@overriding(
    "experts",
    "offsets are loaded sixteen experts at a time, and the experts past the last sixteen get none",
    catalogue="non-16-multiple-local-experts",
    witness=Case(tokens=16, experts=20, hidden=32, inter=32),
)
def experts_past_sixteens_lost(right: Any, self: Any, tokens: Tensor, source: Tensor, expert: Tensor) -> Any:
    whole = self.config.num_local_experts // VECTOR * VECTOR
    lost = (expert >= whole) & (whole > 0)
    return right(self, tokens, source, expert).masked_fill(lost[:, None], 0.0)


# -- absent slots --


@overriding(
    "apply",
    "an id of -1 is used as an index, and the last expert computes for it",
    catalogue="negative-id-indexed",
    witness=Case(tokens=16, experts=4, hidden=128, inter=128, law="masked"),
)
def negative_id_indexed(right: Any, self: Any, hidden: Tensor, weights: Tensor, ids: Tensor, **options: Any) -> Any:
    placed = options.get("expert_map")
    experts = self.config.num_local_experts if placed is None else len(placed)
    return right(self, hidden, weights, torch.where(ids < 0, experts - 1, ids), **options)


@overriding(
    "combine",
    "slots of experts elsewhere keep what the scratch held: earlier calls' results",
    catalogue="off-rank-not-zeroed",
    witness=SHARD,
    shows="second call",
)
def off_rank_not_zeroed(right: Any, self: Any, slots: Tensor, weights: Tensor, present: Tensor) -> Any:
    scratch: Tensor | None = vars(self).get("_scratch")
    if scratch is None or scratch.shape != slots.shape:
        scratch = torch.zeros_like(slots)
    self._scratch = torch.where(present[..., None], slots, scratch)
    return right(self, self._scratch, weights, torch.ones_like(present))


@overriding(
    "apply",
    "a token without a local expert keeps what the given output held: only rows with a pair are written",
    witness=SHARD,
)
def idle_tokens_not_written(right: Any, self: Any, hidden: Tensor, weights: Tensor, ids: Tensor, **options: Any) -> Any:
    output, placed = options.get("output"), options.get("expert_map")
    held = None if output is None else output.clone()
    result = right(self, hidden, weights, ids, **options)
    if held is not None:
        idle = (local_ids(ids, placed, self.config.num_local_experts) < 0).all(dim=1)
        result[idle] = held[idle]
    return result


@overriding(
    "apply",
    "a rank that none of a call's tokens needs hands the tokens on instead of zeros: an early return",
    witness=Case(tokens=1, experts=4, top_k=1, hidden=128, inter=128, law="masked"),
)
def idle_rank_hands_on(right: Any, self: Any, hidden: Tensor, weights: Tensor, ids: Tensor, **options: Any) -> Any:
    result = right(self, hidden, weights, ids, **options)
    local = local_ids(ids, options.get("expert_map"), self.config.num_local_experts)
    return result if bool((local >= 0).any()) else result.copy_(hidden)


PARALLEL = (
    map_minus_one_indexed,
    map_applied_twice,
    map_order_ignored,
    wide_map_misread,
    map_lost_with_weighted_input,
    global_id_local_table,
    replica_summed_twice,
    experts_past_sixteens_lost,
    negative_id_indexed,
    off_rank_not_zeroed,
    idle_tokens_not_written,
    idle_rank_hands_on,
)
