"""Relations between the slots of a token: their order, their weights, slots that are absent, zero or named twice."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from conformance.bounds.accumulation import U
from conformance.bounds.allowance import allowance_for, half_spacing
from conformance.build import CaseTensors
from conformance.mismatches import exactly
from conformance.named_check import Check, Exactness
from conformance.oracles import trace_of
from conformance.relations.changed import busiest_expert, experts_of, with_weights
from conformance.relations.grounds import (
    deterministic,
    fewer_slots,
    fewer_tokens,
    not_applicable,
    scaled_output,
    scaling_is_exact,
    shared_scale,
    unless,
    weight_on_input,
)
from conformance.results import Status
from conformance.trial import Ended, Trial
from fp8moe.reference.recipe import combined

WEIGHT_EXPONENTS = (5, -3)
SPLIT = 0.375
HUGE = 2.0**20
JUDGED = 4
"""Tokens of which the bound judges the merged duplicates: an intermediate that counts twice is slow to decode."""
ABSENT_WEIGHTS = (torch.nan, torch.inf, -1e30)


def slot_permutation(trial: Trial) -> None:
    """The columns of ids and weights moved together. A sum in another order may be rounded otherwise."""
    ids, weights = (getattr(trial.tensors, name).roll(1, dims=1) for name in ("topk_ids", "topk_weights"))
    moved = replace(trial.tensors, topk_ids=ids, topk_weights=weights)
    output, got = trial.call(), trial.call(moved)
    trial.same(moved, output, got, "with its slots in another order", exact=False, origin=(trial.tensors, output))


def weights_scaled(trial: Trial) -> None:
    """f(2^n w) = 2^n f(w), where both are normal numbers of the output's format.

    Exact: a power of two goes through every product and sum in fp32, whose range nothing here leaves.
    """
    base = trial.call()
    exact = deterministic(trial) and scaling_is_exact(trial, "weighted", "combine")
    for exponent in WEIGHT_EXPONENTS:
        factor = 2.0**exponent
        scaled = replace(trial.tensors, topk_weights=trial.tensors.topk_weights * factor)
        got = trial.call(scaled)
        what = f"with its routing weights times 2^{exponent}"
        trial.same(scaled, scaled_output(base, got, factor), got, what, exact=exact, origin=(trial.tensors, base))


def weights_additive(trial: Trial) -> None:
    """f(w) = f(w1) + f(w2) for weights w = w1 + w2: what remains is the rounding of three weighted sums.

    Where the backend is deterministic the three calls share each expert's results y, and no oracle's y is needed, only
    a bound S on sum |w y|: (k + 2) u of each sum's own terms (as in `bounds.allowance`), u S for the difference
    w - w1, a spacing of each output, half a one of each term and running sum that the recipe rounds.
    """
    weights = trial.tensors.topk_weights
    slots = torch.arange(weights.shape[1], device=weights.device)
    part = weights * torch.where(slots % 2 == 0, SPLIT, 1 - SPLIT)
    calls = [replace(trial.tensors, topk_weights=value) for value in (weights, part, weights - part)]
    outputs = [trial.call(), *(trial.call(call) for call in calls[1:])]
    if not deterministic(trial):
        for call, output in zip(calls[1:], outputs[1:], strict=True):
            trial.within(call, output, "with a part of each routing weight")
        return
    allowed, overflows = _rounding_of_parts(trial, outputs)
    whole, first, second = (output.to(allowed.device).double() for output in outputs)
    error = (whole - first - second).abs()
    ratio = torch.where(overflows, 0.0, torch.where(error.isnan(), torch.inf, error / allowed))
    token, column = divmod(int(ratio.argmax()), ratio.shape[1])
    if float(ratio[token, column]) > 1:
        what = "with the rest of each routing weight, of which the first call has a part"
        trial.compared.begin(calls[2], what, outputs[2], first=calls[1], first_got=outputs[1], row=token)
        raise Ended(
            Status.FAILED,
            f"each routing weight in two parts: token {token}, column {column}: {float(whole[token, column]):.9g} in "
            f"one, {float(first[token, column]):.9g} and {float(second[token, column]):.9g} in two; error/bound "
            f"{float(ratio[token, column]):.3g}",
        )


def _rounding_of_parts(trial: Trial, outputs: list[Tensor]) -> tuple[Tensor, Tensor]:
    """(M, H) each: how far the whole may be from the sum of its parts, and where their format may overflow."""
    trace = trace_of(trial.tensors, trial.contract.recipe)
    problem, pairs = trace.problem, trace.pairs
    absolute = replace(pairs, weight=pairs.weight.abs())
    terms = combined(problem, absolute, trace.second.abs())
    terms = terms + allowance_for(trace, trial.arithmetic).total  # the backend's own y, whatever it made of it
    top_k = problem.topk_ids.shape[1]
    allowed = (2 * (top_k + 2) + 1) * U * terms
    if trial.contract.recipe.weighted == "input":
        allowed = allowed + len(outputs) * top_k * half_spacing(terms + allowed, problem.carrier)
    for output in outputs:
        allowed = allowed + 2 * half_spacing(output.to(terms.device).double().abs(), problem.carrier)
    if trial.contract.recipe.combine == "input":
        allowed = allowed + len(outputs) * top_k * half_spacing(terms + allowed, problem.carrier)
    return allowed, 2 * (terms + allowed) >= problem.carrier.largest


def zero_weight(trial: Trial) -> None:
    """Slots of weight 0 are as good as absent, and were their expert's results huge.

    Every slot of one expert gets the weight 0, and that expert's w2 is 2^20 times as large where no fp16 number has to
    hold its result and the backend takes such a layer. Without them other pairs share a tile, so the bits are the same
    only where a token's do not depend on the others, and where no dynamic scale is shared.
    """
    tensors = trial.tensors
    expert = busiest_expert(tensors)
    if expert is None:
        raise not_applicable("no token has an expert here")
    here = experts_of(tensors) == expert
    weights = tensors.topk_weights.masked_fill(here, 0.0)
    muted = replace(_enlarged(trial, expert), topk_weights=weights)
    try:
        backend = trial.made(muted)
    except Ended as ended:
        if ended.status is not Status.NOT_SUPPORTED:
            raise
        muted = replace(tensors, topk_weights=weights)
        backend = trial.made(muted)
    removed = replace(muted, topk_ids=muted.topk_ids.masked_fill(here, -1))
    output, without = trial.call(muted, backend=backend), trial.call(removed, backend=backend)
    exact = trial.row_by_row and not shared_scale(trial.case)
    what = f"with weight 0 for every slot of local expert {expert}"
    trial.same(muted, without, output, what, exact=exact, origin=(removed, without))


def _enlarged(trial: Trial, expert: int) -> CaseTensors:
    tensors = trial.tensors
    if not scaling_is_exact(trial, "gemm2_output", "weighted", "combine"):
        return tensors
    name = "w2" if tensors.weights.w2_scale is None else "w2_scale"
    if name == "w2" and trial.case.dtype == "fp16":
        return tensors
    enlarged = getattr(tensors.weights, name).clone()
    enlarged[expert] *= HUGE
    return with_weights(tensors, **{name: enlarged})


def merged_duplicates(trial: Trial) -> None:
    """An expert named twice, with weights w1 and w2, is as good as named once with w1 + w2."""
    tensors = trial.tensors
    ids, weights = tensors.topk_ids.clone(), tensors.topk_weights.clone()
    ids[:, -1] = ids[:, 0]
    twice = replace(tensors, topk_ids=ids)
    weights[:, 0] += weights[:, -1]
    once = replace(tensors, topk_ids=ids.clone(), topk_weights=weights)
    once.topk_ids[:, -1] = -1
    some = torch.arange(min(JUDGED, trial.case.tokens), device=ids.device)
    trial.within(twice, trial.call(twice), "with an expert in a token's first and last slot", some)
    trial.within(once, trial.call(once), "with the sum of both weights in the first slot, and the last one empty", some)


def absent_slots(trial: Trial) -> None:
    """Slots of id -1 contribute nothing, whatever their weight; a token of -1 alone gets zeros.

    Every third token loses all its slots, every third its last one.
    """
    tensors = trial.tensors
    token = torch.arange(trial.case.tokens, device=tensors.topk_ids.device)
    gone = (token % 3 == 0)[:, None].expand_as(tensors.topk_ids).clone()
    gone[:, -1] |= token % 3 == 1
    ids = tensors.topk_ids.masked_fill(gone, -1)
    absent = replace(tensors, topk_ids=ids, topk_weights=tensors.topk_weights.masked_fill(gone, 0.0))
    output = trial.call(absent)
    _no_traces(trial, absent, output, "with slots of id -1 and weight 0")
    trial.within(absent, output, "with slots of id -1 and weight 0")
    for weight in ABSENT_WEIGHTS:
        weighted = replace(absent, topk_weights=tensors.topk_weights.masked_fill(gone, weight))
        got, what = trial.call(weighted), f"with slots of id -1 and weight {weight}"
        _no_traces(trial, weighted, got, what)
        # The recipe never reads the weight of an absent slot: the bound is that of the call with zeros.
        trial.same(absent, output, got, what, exact=deterministic(trial), before=(absent, output), given=weighted)


def _no_traces(trial: Trial, given: CaseTensors, output: Tensor, what: str) -> None:
    """
    Raises:
        Ended: a token without an expert has another output than zeros.
    """
    found = ((experts_of(given) < 0).all(dim=1)[:, None] & (output != 0)).nonzero()
    if len(found):
        token, column = (int(place) for place in found[0])
        value = float(output[token, column])
        trial.compared.begin(given, what, output, row=token)
        raise Ended(
            Status.FAILED,
            f"{what}: token {token} has no expert here: expected 0 at column {column}, got {value:.9g}",
            mismatch=exactly(token, column, 0.0, value, output.shape[1]),
        )


SLOTS = (
    Check(
        "computes.relation.slot_permutation",
        "slots in another order give the same sum but for its roundings",
        Exactness.BOUND,
        slot_permutation,
        unless(fewer_slots(2), fewer_tokens(1)),
    ),
    Check(
        "computes.relation.weights_scaled",
        "routing weights times a power of two multiply the output by it",
        Exactness.DETERMINISTIC,
        weights_scaled,
        unless(weight_on_input, fewer_tokens(1)),
    ),
    Check(
        "computes.relation.weights_additive",
        "the outputs of two parts of the routing weights add up to that of the whole",
        Exactness.BOUND,
        weights_additive,
        unless(weight_on_input, fewer_tokens(1)),
    ),
    Check(
        "computes.relation.zero_weight",
        "a slot of weight zero is as good as an absent one, however large its expert's weights are",
        Exactness.ROW_BY_ROW,
        zero_weight,
        unless(weight_on_input, fewer_tokens(1)),
    ),
    Check(
        "computes.relation.merged_duplicates",
        "an expert named in two slots counts with the sum of their weights",
        Exactness.BOUND,
        merged_duplicates,
        unless(fewer_slots(2), fewer_tokens(1)),
    ),
    Check(
        "computes.relation.absent_slots",
        "slots of id -1 contribute nothing, whatever their weight, and a token that has no others gets zeros",
        Exactness.DETERMINISTIC,
        absent_slots,
        unless(weight_on_input, fewer_tokens(2)),
    ),
)
