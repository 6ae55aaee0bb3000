"""Relations between experts: their numbers, their spread over ranks, and some that nobody uses."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from conformance.build import CaseTensors
from conformance.mismatches import exactly
from conformance.named_check import Check, Exactness
from conformance.relations.changed import every_expert, experts_of, shuffled
from conformance.relations.grounds import (
    fewer_experts,
    fewer_tokens,
    not_applicable,
    replayed_alike,
    sharded,
    shared_scale,
    unless,
)
from conformance.results import Status
from conformance.trial import Ended, Trial, contract_of
from fp8moe.config import FusedMoEParallelConfig

UNUSED = 3
"""Experts appended: an even number of experts becomes an odd one."""
UNUSED_SCALE = 2.0**10


def expert_relabelling(trial: Trial) -> None:
    """Experts in another order, and the ids or the map that name them so.

    Where the sum over a token's slots goes by expert instead of by slot, it may be rounded otherwise.
    """
    tensors = trial.tensors
    order = shuffled(trial, "experts", tensors.config.num_local_experts)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)

    def renamed(ids: Tensor) -> Tensor:
        return torch.where(ids < 0, ids, place[ids.long().clamp(min=0)].to(ids.dtype))

    moved = replace(tensors, weights=every_expert(tensors.weights, lambda tensor: tensor[order]))
    if tensors.expert_map is None:
        moved = replace(moved, topk_ids=renamed(tensors.topk_ids))
    else:
        moved = replace(moved, expert_map=renamed(tensors.expert_map))
    output, again = trial.call(), trial.call(moved, backend=trial.made(moved))
    what = f"with local experts in the order {order.tolist()}"
    trial.same(moved, output, again, what, exact=trial.by_bits, origin=(tensors, output))
    if tensors.expert_map is None:
        mapped = replace(moved, topk_ids=tensors.topk_ids, expert_map=place)
        again = trial.call(mapped, backend=trial.made(moved))
        what = f"with a map of 64-bit ids to the local experts {place.tolist()}"
        trial.same(mapped, output, again, what, exact=trial.by_bits, origin=(tensors, output))


def shard_sum(trial: Trial) -> None:
    """The sum over the ranks of expert parallelism is the whole: each rank's part is judged by the bound on its own.

    Partitions: two uneven ones with the experts of no token on a third rank, and one expert a rank. A token without an
    expert on a rank gets zeros there; where sums are replayed, one with all its experts on a rank gets the whole.
    """
    tensors = trial.tensors
    output = trial.call()
    used = torch.bincount(tensors.topk_ids[tensors.topk_ids >= 0].long(), minlength=tensors.config.num_experts) > 0
    for ranks in _partitions(used.cpu()):
        for rank, experts in enumerate(ranks):
            _judge_shard(trial, output, experts.to(output.device), len(ranks), rank)


def _partitions(used: Tensor) -> Iterator[list[Tensor]]:
    """Lists of ranks, each the global ids of its experts."""
    busy, idle = used.nonzero()[:, 0], (~used).nonzero()[:, 0]
    uneven = [busy[::3], torch.cat([busy[1::3], busy[2::3]]).sort().values, idle]
    yield [experts for experts in uneven if len(experts)]
    yield [torch.tensor([expert]) for expert in range(len(used))]


def _judge_shard(trial: Trial, whole: Tensor, experts: Tensor, ranks: int, rank: int) -> None:
    shard = _shard_of(trial.tensors, experts, ranks, rank)
    backend = trial.made(shard)
    contract = contract_of(backend, len(shard.hidden_states))
    got = trial.call(shard, backend=backend)
    what = f"rank {rank} of {ranks}, with experts {experts.tolist()}"
    local = experts_of(shard)
    here = (local >= 0).any(dim=1)
    astray = ((got != 0) & ~here[:, None]).nonzero()
    if len(astray):
        token, column = (int(place) for place in astray[0])
        value = float(got[token, column])
        trial.compared.begin(shard, what, got, row=token)
        raise Ended(
            Status.FAILED,
            f"{what}: token {token} has no expert there: expected 0 at column {column}, got {value:.9g}",
            mismatch=exactly(token, column, 0.0, value, got.shape[1]),
        )
    if bool(here.any()):
        trial.within(shard, got, what, here.nonzero()[:, 0], contract)
    everything = ((local >= 0) == (trial.tensors.topk_ids >= 0)).all(dim=1).nonzero()[:, 0]
    if not shared_scale(trial.case) and replayed_alike(trial, shard, contract):
        what = f"{what}: of tokens that have no others"
        trial.equal(whole[everything], got[everything], what, everything, given=shard, rows=everything)


def _shard_of(tensors: CaseTensors, experts: Tensor, ranks: int, rank: int) -> CaseTensors:
    placed = torch.full((tensors.config.num_experts,), -1, dtype=torch.int32, device=experts.device)
    placed[experts] = torch.arange(len(experts), dtype=torch.int32, device=experts.device)
    parallel = FusedMoEParallelConfig.make(tp_size=ranks, tp_rank=rank, enable_expert_parallel=ranks > 1)
    return replace(
        tensors,
        config=replace(tensors.config, num_local_experts=len(experts), moe_parallel_config=parallel),
        weights=every_expert(tensors.weights, lambda tensor: tensor[experts]),
        expert_map=placed,
    )


def padding_experts(trial: Trial) -> None:
    """Three experts that no token names, with large weights, appended.

    The height of a tile may follow from the number of experts; where it does not, replayed bits stay.
    """
    tensors = trial.tensors
    experts = tensors.config.num_experts + UNUSED
    limit = trial.contract.max_experts
    if limit is not None and experts > limit:
        raise not_applicable(f"{experts} experts are beyond the declared max_experts={limit}")
    source = torch.arange(experts, device=tensors.topk_ids.device) % tensors.config.num_experts
    weights = every_expert(tensors.weights, lambda tensor: tensor[source])
    for name in ("w13_scale", "w2_scale"):
        scale = getattr(weights, name)
        if scale is not None:
            scale[-UNUSED:] *= UNUSED_SCALE
    padded = replace(
        tensors,
        config=replace(tensors.config, num_experts=experts, num_local_experts=experts),
        weights=weights,
    )
    backend = trial.made(padded)
    contract = contract_of(backend, len(padded.hidden_states))
    output, got = trial.call(), trial.call(padded, backend=backend)
    exact = replayed_alike(trial, padded, contract)
    what = f"with {UNUSED} experts appended that no token names"
    trial.same(padded, output, got, what, exact=exact, origin=(tensors, output), contract=contract)


EXPERTS = (
    Check(
        "computes.relation.expert_relabelling",
        "experts in another order, and ids that follow them, give the same output",
        Exactness.BOUND,
        expert_relabelling,
        unless(fewer_experts(2), fewer_tokens(1)),
    ),
    Check(
        "computes.relation.shard_sum",
        "the ranks of expert parallelism each compute their experts' part, and nothing where they have none",
        Exactness.BOUND,
        shard_sum,
        unless(sharded, fewer_experts(2), fewer_tokens(1)),
    ),
    Check(
        "computes.relation.padding_experts",
        "experts that no token names change nothing",
        Exactness.BOUND,
        padding_experts,
        unless(sharded, fewer_tokens(1)),
    ),
)
