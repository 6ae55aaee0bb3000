"""Faults of what outlives a call: workspaces, caches, captured graphs, races.

What takes a device to go wrong is put in terms of calls here: a graph's stale addresses are values kept from the first
call, a race is lost at every so many calls of one backend.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from conformance.cases import Case
from conformance.zoo.aliasing import ALIASING
from conformance.zoo.override import nth, overriding
from conformance.zoo.padding import TILE, runs
from fp8moe.config import FusedMoEConfig
from fp8moe.experts import MoEWeights
from fp8moe.quant import FusedMoEQuantConfig

SMALL = Case(tokens=16, experts=4, hidden=128, inter=128, seed=5)
FULL = Case(tokens=16, experts=2, hidden=128, inter=128, seed=5)
"""Every expert gets every token, whatever the seed."""
LOST_RACES = {"align": 5, "gate": 7, "barrier": 3, "stage": 32}
"""A race is lost at every so manieth call, or product."""


def is_lost(self: Any, race: str) -> bool:
    return nth(self, race) % LOST_RACES[race] == 0


# -- workspaces --


@overriding(
    "experts",
    "the workspace has 16 rows for each expert, however many are routed: pairs past its end are lost",
    catalogue="workspace-sized-by-experts",
    witness=Case(tokens=48, experts=4, hidden=128, inter=128),
)
def workspace_by_experts(right: Any, self: Any, tokens: Tensor, source: Tensor, expert: Tensor) -> Any:
    results = right(self, tokens, source, expert)
    results[TILE * self.config.num_local_experts :] = 0.0
    return results


@overriding(
    "combine",
    "hand-off counters outlive a call: the next one of the same size adds the last slot before it is written",
    catalogue="scratch-counter-not-reset",
    witness=SMALL,
    shows="second call",
)
def last_slot_read_early(right: Any, self: Any, slots: Tensor, weights: Tensor, present: Tensor) -> Any:
    before: Tensor | None = vars(self).get("_slots")
    self._slots = slots
    if before is not None and before.shape == slots.shape:
        slots = torch.cat([slots[:, :-1], before[:, -1:]], dim=1)
    return right(self, slots, weights, present)


@overriding(
    "second_gemm",
    "both GEMMs share a workspace whose head is a flag, and from the second call on it says that row 0 is done",
    catalogue="shared-lib-workspace-flag",
    witness=SMALL,
    shows="repeat",
)
def shared_workspace_flag(right: Any, self: Any, intermediate: Tensor, index: int) -> Any:
    result = right(self, intermediate, index)
    if nth(self, f"expert {index}") > 1:
        result[:1] = 0.0
    return result


@overriding(
    "apply",
    "once a larger call has made the workspace grow, a smaller one returns what the old workspace holds",
    catalogue="workspace-grown-under-graph",
    witness=SMALL,
    shows="second call",
)
def grown_workspace(right: Any, self: Any, *given: Tensor, **options: Any) -> Any:
    result = right(self, *given, **options)
    old: dict[int, Tensor] = vars(self).setdefault("_old", {})
    if max(old, default=0) > len(result) and len(result) in old:
        return result.copy_(old[len(result)])
    old[len(result)] = result.clone()
    return result


@overriding(
    "apply_batched",
    "the masked kernel keeps the number of groups that it was first compiled for: later ones past it are not computed",
    catalogue="jit-num-groups-one",
    witness=Case(tokens=1, experts=8, hidden=128, inter=128),
    shows="second call",
    format="Batched",
)
def groups_of_first_call(right: Any, self: Any, batch: Tensor, counts: Tensor) -> Tensor:
    results: Tensor = right(self, batch, counts)
    groups = vars(self).setdefault("_groups", int(counts.nonzero().max()) + 1 if bool(counts.any()) else 0)
    results[groups:] = 0.0
    return results


# -- caches, and what a graph has captured --


@overriding(
    "__init__",
    "converted weights are cached by shape, and a second layer of that shape gets the first one's",
    witness=SMALL,
    shows="second call",
)
def weights_cached_by_shape(
    right: Any, self: Any, config: FusedMoEConfig, quant: FusedMoEQuantConfig, weights: MoEWeights
) -> None:
    tensors = [getattr(weights, field.name) for field in fields(weights)]
    key = [None if tensor is None else (tensor.shape, tensor.dtype, tensor.device) for tensor in tensors]
    kept = vars(type(self)).get("_kept")
    if kept is None or kept[0] != key:
        kept = type(self)._kept = (key, weights)
    right(self, config, quant, kept[1])


@overriding(
    "__init__",
    "weights that are loaded again are transformed again, which exchanges gate and up",
    catalogue="reload-double-shuffle",
    witness=SMALL,
    shows="repeat",
)
def reload_shuffles_again(
    right: Any, self: Any, config: FusedMoEConfig, quant: FusedMoEQuantConfig, weights: MoEWeights
) -> None:
    given = weights.w13
    if getattr(given, "_is_loaded", False):
        halves = given.view(torch.uint8).chunk(2, dim=1)
        weights = replace(weights, w13=torch.cat(halves[::-1], dim=1).view(given.dtype))
    given._is_loaded = True  # type: ignore[attr-defined]
    right(self, config, quant, weights)


@overriding(
    "experts",
    "the tactic found for a number of tokens fits the longest expert of that time, and rows past it are lost later on",
    catalogue="winner-cache-miskeyed",
    witness=Case(tokens=16, experts=4, hidden=128, inter=128, seed=3),
    shows="second call",
)
def tactic_keyed_by_tokens(right: Any, self: Any, tokens: Tensor, source: Tensor, expert: Tensor) -> Any:
    place, count = runs(expert)
    found: dict[int, int] = vars(self).setdefault("_found", {})
    rows = found.setdefault(len(tokens), int(count.max()) if len(count) else 0)
    return right(self, tokens, source, expert).masked_fill((place >= rows)[:, None], 0.0)


@overriding(
    "second_gemm",
    "ready tags repeat, and an expert with as many rows as in an earlier call is taken to be done",
    catalogue="replay-stale-ready-tag",
    witness=FULL,
    shows="second call",
)
def stale_ready_tag(right: Any, self: Any, intermediate: Tensor, index: int) -> Any:
    ready: dict[tuple[int, int], Tensor] = vars(self).setdefault("_ready", {})
    key = (index, len(intermediate))
    if key not in ready:
        ready[key] = right(self, intermediate, index)
    return ready[key]


@overriding(
    "apply",
    "a call of a known size reads the ids at the addresses that the first one had allocated, as a replayed graph does",
    catalogue="graph-fresh-allocations",
    witness=SMALL,
    shows="second call",
)
def ids_of_first_call(right: Any, self: Any, hidden: Tensor, weights: Tensor, ids: Tensor, **options: Any) -> Any:
    captured: dict[tuple[int, ...], Tensor] = vars(self).setdefault("_captured", {})
    first = captured.setdefault(tuple(ids.shape), ids.clone())
    return right(self, hidden, weights, first, **options)


# -- races --


@overriding(
    "experts",
    "at every fifth call a prefix is read before it is written: the last pair gets the first one's expert",
    catalogue="align-missing-barrier",
    witness=FULL,
    shows="repeat",
)
def stale_prefix(right: Any, self: Any, tokens: Tensor, source: Tensor, expert: Tensor) -> Any:
    if is_lost(self, "align"):
        expert = torch.cat([expert[:-1], expert[:1]])
    return right(self, tokens, source, expert)


@overriding(
    "combine",
    "at every seventh call a token's sum of weights is read before it is written, and the token divided by 0",
    catalogue="gate-warp-race",
    witness=SMALL,
    shows="repeat",
)
def divided_by_unwritten_sum(right: Any, self: Any, slots: Tensor, weights: Tensor, present: Tensor) -> Any:
    if is_lost(self, "gate"):
        weights = torch.cat([weights[:1] / 0.0, weights[1:]])
    return right(self, slots, weights, present)


@overriding(
    "combine",
    "at every third call the first tokens are added to an accumulator that is not cleared yet",
    catalogue="partial-barrier-zeroing",
    witness=SMALL,
    shows="repeat",
)
def accumulator_not_cleared(right: Any, self: Any, slots: Tensor, weights: Tensor, present: Tensor) -> Any:
    result = right(self, slots, weights, present)
    before: Tensor | None = vars(self).get("_before")
    self._before = result.clone()
    if is_lost(self, "barrier") and before is not None and before.shape == result.shape:
        result[:4] += before[:4]
    return result


@overriding(
    "first_gemm",
    "at every 32nd product a stage is overwritten while it is read: its last row meets the row before",
    catalogue="smem-stage-reuse",
    witness=FULL,
    shows="repeat",
)
def stage_overwritten(right: Any, self: Any, inputs: Tensor, index: int) -> Any:
    if is_lost(self, "stage") and len(inputs) > 1:
        inputs = torch.cat([inputs[:-1], inputs[-2:-1]])
    return right(self, inputs, index)


STATE = (
    *ALIASING,
    workspace_by_experts,
    last_slot_read_early,
    shared_workspace_flag,
    grown_workspace,
    groups_of_first_call,
    weights_cached_by_shape,
    reload_shuffles_again,
    tactic_keyed_by_tokens,
    stale_ready_tag,
    ids_of_first_call,
    stale_prefix,
    divided_by_unwritten_sum,
    accumulator_not_cleared,
    stage_overwritten,
)
