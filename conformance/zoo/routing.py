"""Faults of routing weights, of ids, of the permutation by expert and back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from conformance.cases import Case
from conformance.zoo.override import overriding
from fp8moe.dispatch import local_ids, weighted_input

SMALL = Case(tokens=16, experts=4, hidden=128, inter=128, seed=5)
SINGLE = Case(tokens=16, experts=4, top_k=1, hidden=128, inter=128, seed=5)
TIERS = (1, 2, 4, 8)
WARP = 32
CHUNK = 64

# -- routing weights --


@overriding(
    "apply",
    "with the router's weight on the input, the result is weighted as well",
    catalogue="weight-applied-twice",
    witness=Case(tokens=16, experts=4, top_k=1, hidden=128, inter=128, weight_on_input=True),
)
def weight_applied_twice(right: Any, self: Any, hidden: Tensor, weights: Tensor, ids: Tensor, **options: Any) -> Any:
    if options.get("apply_router_weight_on_input"):
        hidden, options = weighted_input(hidden, weights), options | {"apply_router_weight_on_input": False}
    return right(self, hidden, weights, ids, **options)


@overriding(
    "apply",
    "the router's weight goes on the result though it is asked for on the input",
    catalogue="weight-on-input-ignored",
    witness=Case(tokens=16, experts=4, top_k=1, hidden=128, inter=128, weight_on_input=True, seed=1),
)
def weight_on_input_ignored(right: Any, self: Any, *given: Tensor, **options: Any) -> Any:
    return right(self, *given, **options | {"apply_router_weight_on_input": False})


@overriding(
    "apply",
    "the second GEMM's bias is added once for each expert of a token, whatever its routing weight",
    catalogue="down-bias-unweighted",
    witness=Case(tokens=16, experts=4, hidden=128, inter=128, bias=True),
)
def down_bias_unweighted(right: Any, self: Any, hidden: Tensor, weights: Tensor, ids: Tensor, **options: Any) -> Any:
    result: Tensor = right(self, hidden, weights, ids, **options)
    bias = self.weights.w2_bias
    if bias is None or options.get("apply_router_weight_on_input"):
        return result
    local = local_ids(ids, options.get("expert_map"), self.config.num_local_experts)
    lacking = torch.where(local >= 0, 1 - weights, 0.0)
    return result.add_((lacking[..., None] * bias[local.clamp(min=0)].float()).sum(1))


@overriding(
    "apply",
    "routing weights are written as bf16 into a buffer that is read as fp32",
    catalogue="weights-dtype-punned",
    witness=SMALL,
)
def weights_dtype_punned(right: Any, self: Any, hidden: Tensor, weights: Tensor, ids: Tensor, **options: Any) -> Any:
    read = torch.zeros(weights.numel(), dtype=torch.float32, device=weights.device)
    read.view(torch.bfloat16)[: weights.numel()] = weights.reshape(-1).to(torch.bfloat16)
    return right(self, hidden, read.view_as(weights), ids, **options)


@overriding(
    "apply",
    "a routing weight of zero counts as none given, that is as 1: a test for truth instead of for None",
    witness=Case(tokens=16, experts=4, hidden=128, inter=128, law="unnormalised"),
)
def zero_weight_as_one(right: Any, self: Any, hidden: Tensor, weights: Tensor, ids: Tensor, **options: Any) -> Any:
    return right(self, hidden, torch.where(weights == 0, 1.0, weights), ids, **options)


@overriding(
    "apply",
    "an expert listed twice for a token gets its last weight both times: weights by (token, expert), not by slot",
    witness=Case(tokens=16, experts=4, hidden=128, inter=128, law="repeated"),
)
def weights_by_expert(right: Any, self: Any, hidden: Tensor, weights: Tensor, ids: Tensor, **options: Any) -> Any:
    by_slot = weights.clone()
    for slot in range(1, ids.shape[1]):
        same = ids[:, :slot] == ids[:, slot, None]
        by_slot[:, :slot] = torch.where(same, by_slot[:, slot, None], by_slot[:, :slot])
    return right(self, hidden, by_slot, ids, **options)


@overriding(
    "apply",
    "a token's ids are sorted and its weights stay where they were: the router's `sorted` was taken for granted",
    witness=SMALL,
)
def ids_sorted_weights_not(right: Any, self: Any, hidden: Tensor, weights: Tensor, ids: Tensor, **options: Any) -> Any:
    return right(self, hidden, weights, ids.sort(dim=1).values, **options)


@overriding(
    "apply",
    "absent slots are squeezed out of the ids and not of the weights: one of two arrays compacted",
    witness=Case(tokens=16, experts=4, hidden=128, inter=128, law="masked"),
)
def absent_slots_shift_weights(
    right: Any, self: Any, hidden: Tensor, weights: Tensor, ids: Tensor, **options: Any
) -> Any:
    order = (ids < 0).to(torch.uint8).argsort(dim=1, stable=True)
    return right(self, hidden, weights, ids.gather(1, order), **options)


@overriding(
    "apply",
    "weights are read four slots at a time, and the fifth slot gets the first one's: a vector load that wraps",
    witness=Case(tokens=16, experts=6, top_k=6, hidden=128, inter=128),
)
def slots_past_four_wrap(right: Any, self: Any, hidden: Tensor, weights: Tensor, ids: Tensor, **options: Any) -> Any:
    return right(self, hidden, weights[:, torch.arange(weights.shape[1]) % 4], ids, **options)


@overriding(
    "apply",
    "routing weights are read as if their rows lay together: a kernel without an argument for their stride",
    witness=SMALL,
)
def weights_stride_ignored(right: Any, self: Any, hidden: Tensor, weights: Tensor, ids: Tensor, **options: Any) -> Any:
    packed = (max(weights.shape[1], 1), 1)
    return right(self, hidden, weights.as_strided(weights.shape, packed, weights.storage_offset()), ids, **options)


# -- ids --


@overriding(
    "apply",
    "ids arrive flat, and the first M of them serve as one expert for each token: right for a single token",
    catalogue="topk-ids-flattened",
    witness=SMALL,
)
def topk_ids_flattened(right: Any, self: Any, hidden: Tensor, weights: Tensor, ids: Tensor, **options: Any) -> Any:
    tokens = len(ids)
    if tokens > 1:
        weights, ids = weights.reshape(-1)[:tokens, None], ids.reshape(-1)[:tokens, None]
    return right(self, hidden, weights, ids, **options)


@overriding(
    "apply",
    "ids of 64 bits are read as ids of 32: low and high words in turn",
    catalogue="bad-id-dtype",
    witness=SMALL,
)
def wide_ids_misread(right: Any, self: Any, hidden: Tensor, weights: Tensor, ids: Tensor, **options: Any) -> Any:
    if ids.dtype == torch.int64:
        ids = ids.contiguous().view(torch.int32).view(-1)[: ids.numel()].view(ids.shape)
    return right(self, hidden, weights, ids, **options)


@overriding(
    "apply",
    "ids are kept in eight signed bits, so that experts from 128 to 255 count as absent: a compressed routing table",
    witness=Case(tokens=16, experts=136, hidden=32, inter=32),
)
def ids_in_eight_bits(right: Any, self: Any, hidden: Tensor, weights: Tensor, ids: Tensor, **options: Any) -> Any:
    return right(self, hidden, weights, ids.to(torch.int8).to(torch.int32).clamp(min=-1), **options)


@overriding(
    "apply",
    "no compiled variant fits this top-k: nothing sorts the ids, and the zeros of a fresh buffer are used",
    catalogue="routing-tier-noop",
    witness=Case(tokens=16, experts=4, top_k=3, hidden=128, inter=128),
)
def routing_tier_noop(right: Any, self: Any, hidden: Tensor, weights: Tensor, ids: Tensor, **options: Any) -> Any:
    if ids.shape[1] not in TIERS:
        ids = torch.zeros_like(ids)
    return right(self, hidden, weights, ids, **options)


# -- the permutation by expert --


@overriding(
    "experts",
    "a prefix scan as wide as a warp leaves out the experts past 32",
    catalogue="expert-scan-cap",
    witness=Case(tokens=16, experts=40, hidden=32, inter=32),
)
def expert_scan_cap(right: Any, self: Any, tokens: Tensor, source: Tensor, expert: Tensor) -> Tensor:
    results: Tensor = right(self, tokens, source, expert)
    return results.masked_fill((expert >= WARP)[:, None], 0.0)


@overriding(
    "experts",
    "the last block of four experts wraps around and overwrites the first experts' counts with zeros",
    catalogue="align-modulo-wrap",
    witness=Case(tokens=16, experts=5, hidden=128, inter=128),
)
def align_modulo_wrap(right: Any, self: Any, tokens: Tensor, source: Tensor, expert: Tensor) -> Tensor:
    results: Tensor = right(self, tokens, source, expert)
    return results.masked_fill((expert < -self.config.num_local_experts % 4)[:, None], 0.0)


@overriding(
    "experts",
    "the last expert's range has no end and is taken for empty: prefix sums of E numbers instead of E + 1",
    witness=Case(tokens=16, experts=4, hidden=128, inter=128, law="last"),
)
def last_expert_lost(right: Any, self: Any, tokens: Tensor, source: Tensor, expert: Tensor) -> Tensor:
    results: Tensor = right(self, tokens, source, expert)
    return results.masked_fill((expert == self.config.num_local_experts - 1)[:, None], 0.0)


@overriding(
    "experts",
    "tokens from 64 on are read one chunk too early: an index into the call where one into the chunk is meant",
    witness=Case(tokens=72, experts=4, hidden=128, inter=128),
)
def second_chunk_reads_first(right: Any, self: Any, tokens: Tensor, source: Tensor, expert: Tensor) -> Any:
    return right(self, tokens, torch.where(source >= CHUNK, source - CHUNK, source), expert)


@overriding(
    "first_gemm",
    "an expert's rows from the 17th on are split over K and the halves kept in bf16, so that a token's result goes by "
    "its place among the others",
    catalogue="within-expert-order-dependence",
    subtle=True,
    witness=Case(tokens=32, experts=2, hidden=128, inter=128),
)
def within_expert_order(right: Any, self: Any, inputs: Tensor, index: int) -> Tensor:
    result: Tensor = right(self, inputs, index)
    for part, weight in zip(inputs.chunk(2, 1), self.weight("w13", index).chunk(2, 1), strict=True):
        half = part[16:] @ weight.t()
        result[16:] += half.to(torch.bfloat16).float() - half
    return result


# -- and back --


@overriding(
    "combine",
    "the way back has a token's number where token * k + slot is meant",
    catalogue="reverse-map-token-not-slot",
    witness=SMALL,
)
def reverse_map_token_not_slot(right: Any, self: Any, slots: Tensor, weights: Tensor, present: Tensor) -> Any:
    read = slots.flatten(0, 1)[: len(slots), None].expand_as(slots)
    return right(self, read, weights, present)


@overriding(
    "combine",
    "the third slot has the second one's weight: an unrolled loop with a wrong register",
    witness=Case(tokens=16, experts=4, top_k=3, hidden=128, inter=128),
)
def third_slot_has_seconds_weight(right: Any, self: Any, slots: Tensor, weights: Tensor, present: Tensor) -> Any:
    if weights.shape[1] > 2:
        weights = torch.cat([weights[:, :2], weights[:, 1:2], weights[:, 3:]], dim=1)
    return right(self, slots, weights, present)


@overriding(
    "combine",
    "slots are added in pairs, and of an odd number of them the last is left out",
    witness=Case(tokens=16, experts=5, top_k=5, hidden=128, inter=128),
)
def odd_slot_lost(right: Any, self: Any, slots: Tensor, weights: Tensor, present: Tensor) -> Any:
    if weights.shape[1] > 1 and weights.shape[1] % 2:
        present = present & (torch.arange(weights.shape[1], device=present.device) < weights.shape[1] - 1)
    return right(self, slots, weights, present)


@overriding(
    "combine",
    "the result of an fp16 layer goes through bf16, the dtype that the last step was written for",
    subtle=True,
    witness=Case(tokens=16, experts=4, hidden=128, inter=128, dtype="fp16"),
)
def fp16_through_bf16(right: Any, self: Any, slots: Tensor, weights: Tensor, present: Tensor) -> Tensor:
    result: Tensor = right(self, slots, weights, present)
    return result.to(torch.bfloat16).to(result.dtype)


ROUTING = (
    weight_applied_twice,
    weight_on_input_ignored,
    down_bias_unweighted,
    weights_dtype_punned,
    zero_weight_as_one,
    weights_by_expert,
    ids_sorted_weights_not,
    absent_slots_shift_weights,
    slots_past_four_wrap,
    weights_stride_ignored,
    topk_ids_flattened,
    wide_ids_misread,
    ids_in_eight_bits,
    routing_tier_noop,
    expert_scan_cap,
    align_modulo_wrap,
    last_expert_lost,
    second_chunk_reads_first,
    within_expert_order,
    reverse_map_token_not_slot,
    third_slot_has_seconds_weight,
    odd_slot_lost,
    fp16_through_bf16,
)
