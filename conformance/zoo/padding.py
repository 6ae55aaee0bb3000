"""Faults at the edges of tiles, in padding, and at sizes of 0 and 1."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from conformance.cases import Case
from conformance.zoo.override import overriding

TILE = 16
"""Rows of a tile, as small as tensor cores take them."""
BLOCK = 128
VECTOR = 16
"""Elements that one instruction stores."""


def runs(expert: Tensor) -> tuple[Tensor, Tensor]:
    """Of each pair of a sorted list: its place among its expert's pairs, and how many these are."""
    start = torch.searchsorted(expert, expert)
    end = torch.searchsorted(expert, expert, right=True)
    return torch.arange(len(expert), device=expert.device) - start, end - start


# -- rows --


@overriding(
    "experts",
    "each 128 rows are taken for one expert's, though an expert's rows need not begin at a multiple of 128",
    catalogue="group-not-128-aligned",
    witness=Case(tokens=16, experts=4, hidden=128, inter=128),
)
def group_not_128_aligned(right: Any, self: Any, tokens: Tensor, source: Tensor, expert: Tensor) -> Any:
    row = torch.arange(len(expert), device=expert.device)
    return right(self, tokens, source, expert[row // BLOCK * BLOCK])


@overriding(
    "experts",
    "the last tile of an odd number of them, more than one, gets the next expert's weights: tiles go in pairs, and a "
    "pair may span two experts",
    catalogue="group-straddling-cluster",
    witness=Case(tokens=72, experts=2, top_k=1, hidden=128, inter=128),
)
def group_straddling_cluster(right: Any, self: Any, tokens: Tensor, source: Tensor, expert: Tensor) -> Any:
    place, count = runs(expert)
    last = (count - 1) // TILE
    straddles = (last > 0) & (last % 2 == 0) & (place // TILE == last)
    end = torch.searchsorted(expert, expert, right=True).clamp(max=max(len(expert) - 1, 0))
    return right(self, tokens, source, torch.where(straddles, expert[end], expert))


@overriding(
    "experts",
    "room for a tile too few where the pairs are many or each have an expert of their own: the last tile is not run",
    catalogue="tile-count-off-by-one",
    subtle=True,
    witness=Case(tokens=2, experts=4, hidden=128, inter=128, law="one_each"),
)
def tile_count_off_by_one(right: Any, self: Any, tokens: Tensor, source: Tensor, expert: Tensor) -> Any:
    place, _ = runs(expert)
    tile = (place % TILE == 0).cumsum(0) - 1
    room = len(expert) // TILE + min(len(expert), self.config.num_local_experts) - 1
    return right(self, tokens, source, expert).masked_fill((tile >= max(room, 1))[:, None], 0.0)


@overriding(
    "experts",
    "the last row of every expert is lost: its range ends at the prefix sum less one",
    witness=Case(tokens=16, experts=4, hidden=128, inter=128),
)
def last_row_of_expert_lost(right: Any, self: Any, tokens: Tensor, source: Tensor, expert: Tensor) -> Any:
    place, count = runs(expert)
    return right(self, tokens, source, expert).masked_fill((place == count - 1)[:, None], 0.0)


@overriding(
    "experts",
    "a single row past a tile's edge is lost, an expert's only row too: tiles are (rows + 14) // 16, rounding up amiss",
    subtle=True,
    witness=Case(tokens=17, experts=4, top_k=1, hidden=128, inter=128, law="last"),
)
def row_past_tile_lost(right: Any, self: Any, tokens: Tensor, source: Tensor, expert: Tensor) -> Any:
    place, count = runs(expert)
    lost = (count % TILE == 1) & (place == count - 1)
    return right(self, tokens, source, expert).masked_fill(lost[:, None], 0.0)


@overriding(
    "experts",
    "a last tile that is full counts as empty: its height is rows % 16, and 0 means none",
    witness=Case(tokens=16, experts=4, top_k=1, hidden=128, inter=128, law="last"),
)
def full_last_tile_lost(right: Any, self: Any, tokens: Tensor, source: Tensor, expert: Tensor) -> Any:
    place, count = runs(expert)
    lost = (count % TILE == 0) & (place >= count - TILE)
    return right(self, tokens, source, expert).masked_fill(lost[:, None], 0.0)


@overriding(
    "apply",
    "a tile of pairs that begins with -1 multiplies it into the weights' offset, and reads the last expert",
    catalogue="minus-one-m-index-offset",
    witness=Case(tokens=16, experts=4, hidden=128, inter=128, law="masked", seed=1),
)
def tile_that_begins_with_none(
    right: Any, self: Any, hidden: Tensor, weights: Tensor, ids: Tensor, **options: Any
) -> Any:
    flat, placed = ids.reshape(-1), options.get("expert_map")
    experts = self.config.num_local_experts if placed is None else len(placed)
    head = flat[torch.arange(len(flat), device=ids.device) // TILE * TILE]
    misled = torch.where((head < 0) & (flat >= 0), experts - 1, flat)
    return right(self, hidden, weights, misled.view_as(ids), **options)


@overriding(
    "experts",
    "weights are found by the number of an expert among those that have tokens: pointers listed without the idle ones",
    catalogue="empty-expert-shape",
    witness=Case(tokens=16, experts=4, hidden=128, inter=128, law="empty", seed=1),
)
def idle_experts_not_counted(right: Any, self: Any, tokens: Tensor, source: Tensor, expert: Tensor) -> Any:
    return right(self, tokens, source, torch.unique_consecutive(expert, return_inverse=True)[1])


# -- columns and K --


@overriding(
    "activation",
    "gate and up are padded to a multiple of 128 together, and their halves are taken after that",
    catalogue="w13-joint-padding",
    witness=Case(tokens=16, experts=4, hidden=128, inter=72),
)
def w13_joint_padding(right: Any, self: Any, gate_up: Tensor) -> Any:
    if self.halves == 2:
        inter = gate_up.shape[1] // 2
        gate, up = pad(gate_up, (0, -gate_up.shape[1] % BLOCK)).chunk(2, dim=1)
        gate_up = torch.cat([gate[:, :inter], up[:, :inter]], dim=1)
    return right(self, gate_up)


@overriding(
    "second_gemm",
    "columns past the last whole 128 are never computed: a grid rounded down",
    witness=Case(tokens=16, experts=4, hidden=144, inter=128),
)
def columns_past_tiles_lost(right: Any, self: Any, intermediate: Tensor, index: int) -> Tensor:
    result: Tensor = right(self, intermediate, index)
    result[:, result.shape[1] // BLOCK * BLOCK :] = 0.0
    return result


@overriding(
    "second_gemm",
    "columns past the last whole 16 are never stored: vectors of 16 without a remainder",
    witness=Case(tokens=16, experts=4, hidden=136, inter=128),
)
def columns_past_vectors_lost(right: Any, self: Any, intermediate: Tensor, index: int) -> Tensor:
    result: Tensor = right(self, intermediate, index)
    result[:, result.shape[1] // VECTOR * VECTOR :] = 0.0
    return result


@overriding(
    "second_gemm",
    "the last block of I is loaded whole, and takes in the beginning of the next row on both sides: no mask",
    witness=Case(tokens=16, experts=4, hidden=128, inter=136),
)
def second_k_not_masked(right: Any, self: Any, intermediate: Tensor, index: int) -> Any:
    beyond = -intermediate.shape[1] % BLOCK
    rows, weight = intermediate.roll(-1, 0), self.weight("w2", index).roll(-1, 0)
    return right(self, intermediate, index) + rows[:, :beyond] @ weight[:, :beyond].t()


# -- sizes of 0 and 1 --


@overriding(
    "apply",
    "without tokens the result is the fp32 buffer that it would have been cast from",
    catalogue="zero-token-wrong-dtype",
    witness=Case(tokens=0, experts=4, hidden=128, inter=128),
)
def zero_tokens_in_fp32(right: Any, self: Any, hidden: Tensor, weights: Tensor, ids: Tensor, **options: Any) -> Any:
    return right(self, hidden, weights, ids, **options) if len(ids) else torch.zeros_like(hidden, dtype=torch.float32)


@overriding(
    "apply",
    "a single token's weights are renormalised: its path was written for routers whose weights sum to 1",
    subtle=True,
    witness=Case(tokens=1, experts=4, hidden=128, inter=128, law="unnormalised"),
)
def single_token_renormalised(
    right: Any, self: Any, hidden: Tensor, weights: Tensor, ids: Tensor, **options: Any
) -> Any:
    if len(ids) == 1:
        weights = weights / weights.sum()
    return right(self, hidden, weights, ids, **options)


@overriding(
    "first_gemm",
    "an expert's only row goes through a matrix-vector product, which has no bias",
    witness=Case(tokens=2, experts=4, hidden=128, inter=128, law="one_each", bias=True),
)
def lone_row_without_bias(right: Any, self: Any, inputs: Tensor, index: int) -> Any:
    if len(inputs) == 1:
        return inputs @ self.weight("w13", index).t()
    return right(self, inputs, index)


@overriding(
    "weight",
    "a single local expert's mode vanishes from the descriptor, and w2 is read with the modes that are left exchanged",
    catalogue="singleton-expert",
    witness=Case(tokens=16, experts=1, top_k=1, hidden=128, inter=128),
)
def singleton_expert(right: Any, self: Any, name: str, index: int) -> Tensor:
    matrix: Tensor = right(self, name, index)
    if self.config.num_local_experts == 1 and name == "w2":
        return matrix.t().reshape(matrix.shape)
    return matrix


# -- experts' batches --


@overriding(
    "apply_batched",
    "an expert takes no more than twice its share of the pairs, and the rest are dropped: a capacity factor of 2",
    witness=Case(tokens=16, experts=4, top_k=1, hidden=128, inter=128, law="last"),
    format="Batched",
)
def past_capacity_dropped(right: Any, self: Any, batch: Tensor, counts: Tensor) -> Tensor:
    results: Tensor = right(self, batch, counts)
    capacity = -(-2 * int(counts.sum()) // len(counts))
    results[:, capacity:] = 0.0
    return results


@overriding(
    "apply_batched",
    "counts are kept in eight signed bits: an expert with 128 rows has none",
    witness=Case(tokens=130, experts=4, top_k=1, hidden=32, inter=32, law="last"),
    format="Batched",
)
def counts_in_eight_bits(right: Any, self: Any, batch: Tensor, counts: Tensor) -> Any:
    return right(self, batch, counts.to(torch.int8).clamp(min=0).to(counts.dtype))


@overriding(
    "apply_batched",
    "a batch that is filled to its last row loses that row: a mask with `< T - 1`",
    subtle=True,
    witness=Case(tokens=16, experts=4, hidden=128, inter=128),
    format="Batched",
)
def last_row_of_full_batch_lost(right: Any, self: Any, batch: Tensor, counts: Tensor) -> Any:
    return right(self, batch, counts.clamp(max=max(batch.shape[1] - 1, 0)))


PADDING = (
    group_not_128_aligned,
    group_straddling_cluster,
    tile_count_off_by_one,
    last_row_of_expert_lost,
    row_past_tile_lost,
    full_last_tile_lost,
    tile_that_begins_with_none,
    idle_experts_not_counted,
    w13_joint_padding,
    columns_past_tiles_lost,
    columns_past_vectors_lost,
    second_k_not_masked,
    zero_tokens_in_fp32,
    single_token_renormalised,
    lone_row_without_bias,
    singleton_expert,
    past_capacity_dropped,
    counts_in_eight_bits,
    last_row_of_full_batch_lost,
)
