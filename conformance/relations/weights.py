"""Relations of weights: a block that changes, hidden channels that are zero, the limits of a clamped activation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from conformance.build import CaseTensors
from conformance.cases import Case
from conformance.named_check import Check, Exactness
from conformance.relations.changed import busiest_expert, coded, experts_of, numbers, with_weights
from conformance.relations.grounds import (
    deterministic,
    fewer_tokens,
    not_applicable,
    replayed_alike,
    shared_scale,
    unless,
    weight_on_input,
)
from conformance.trial import Trial, contract_of

BLOCK = 128
BLOCK_FACTOR = 1.5
"""Times a block's scale: as large as a fault of its index is on weights whose blocks differ."""
JUDGED = 4
"""Tokens of which the bound judges that the block does reach them; the rest is equivalence's."""
CLAMPED = ("swigluoai", "swiglustep")
"""Activations with a limit (7): gate from above, up from both sides."""
GATES = (8.0, 12.0, 10.0)
UPS = (8.0, -8.0, 12.0, -16.0)
"""In turn over the columns of the intermediate, for a hidden state of 1."""
REACHES = (0.25, 0.5, 1.0, 2.0, -0.25, -0.5, -1.0, -2.0)
"""Hidden states of the tokens in turn, so that gates lie from -24 to 24: inside the limits, beyond, and below."""
BEYOND = 2.0


def block_isolation(trial: Trial) -> None:
    """Another block of one expert's w2 changes only that block's columns, of tokens with that expert; another block of
    its w13 only tokens with that expert.

    The expert is the busiest one, the block that of the last rows and the first columns (off the diagonal, so that
    exchanged axes show): changed by its scale where it has one of its own, else by its codes' signs. Nothing else in
    the call is different, so nothing else may be rounded otherwise. Under a dynamic scale that all tokens share, w13 is
    left alone.
    """
    tensors = trial.tensors
    expert = busiest_expert(tensors)
    if expert is None:
        raise not_applicable("no token has an expert here")
    output = trial.call()
    routed = (experts_of(tensors) == expert).any(dim=1)
    last = (tensors.config.hidden_dim - 1) // BLOCK * BLOCK
    columns = torch.arange(tensors.config.hidden_dim, device=output.device) >= last
    reach = {"w2": routed[:, None] & columns, "w13": routed[:, None].expand_as(output)}
    if shared_scale(trial.case):
        del reach["w13"]
    for name, mask in reach.items():
        changed = with_weights(tensors, **_with_another_block(tensors, name, expert))
        got = trial.call(changed, backend=trial.made(changed))
        what = f"with another block in the last rows of {name} of local expert {expert}, outside of what it reaches"
        expected, origin = torch.where(mask, got, output), (tensors, output)
        trial.same(changed, expected, got, what, exact=deterministic(trial), origin=origin)
        here = routed.nonzero()[:JUDGED, 0]
        trial.within(changed, got, f"with another block in the last rows of {name} of local expert {expert}", here)


def _with_another_block(tensors: CaseTensors, name: str, expert: int) -> dict[str, Tensor]:
    group = tensors.quant.w1.shape
    if group is not None and group.is_block():
        scale: Tensor = getattr(tensors.weights, f"{name}_scale").clone()
        scale[expert, -1, 0] *= BLOCK_FACTOR
        return {f"{name}_scale": scale}
    weight: Tensor = getattr(tensors.weights, name)
    values = numbers(weight[expert])
    rows = tensors.config.hidden_dim if name == "w2" else tensors.config.intermediate_size_per_partition
    first = len(values) - rows + (rows - 1) // BLOCK * BLOCK
    values[first:, :BLOCK].neg_()
    changed = weight.clone()
    changed[expert] = coded(values, weight.dtype)
    return {name: changed}


def padding_hidden(trial: Trial) -> None:
    """One group of 128 more hidden channels, in which every token is 0: the first H columns stay.

    w13's new columns are not zero, so whatever is read in the place of a hidden state shows. The sum over K has more
    terms and may go in another order; on a replayed unit, adding zeros changes no bit, unless a block that was cut off
    is quantised anew with what is new in it.
    """
    tensors = trial.tensors
    hidden = tensors.config.hidden_dim
    weights: dict[str, Any] = {}
    for name, axis in (("w13", -1), ("w2", 1)):
        weights[name] = _longer(getattr(tensors.weights, name), axis, BLOCK)
        scale: Tensor | None = getattr(tensors.weights, f"{name}_scale")
        if scale is not None and scale.dim() == 3:
            by_channel = scale.shape[1:] == (getattr(tensors.weights, name).shape[1], 1)
            more = (BLOCK if name == "w2" else 0) if by_channel else 1
            weights[f"{name}_scale"] = _longer(scale, axis, more)
    if tensors.weights.w2_bias is not None:
        weights["w2_bias"] = _longer(tensors.weights.w2_bias, 1, BLOCK)
    padded = replace(
        with_weights(tensors, **weights),
        config=replace(tensors.config, hidden_dim=hidden + BLOCK),
        hidden_states=torch.nn.functional.pad(tensors.hidden_states, (0, BLOCK)),
    )
    backend = trial.made(padded)
    contract = contract_of(backend, len(padded.hidden_states))
    base, got = trial.call(), trial.call(padded, backend=backend)
    expected = torch.cat([base, got[:, hidden:]], dim=1)
    cut_off = hidden % BLOCK != 0 and "requantised" in (contract.recipe.w13, contract.recipe.w2)
    exact = replayed_alike(trial, padded, contract) and not cut_off
    what = f"with {BLOCK} more hidden channels, all zero"
    trial.same(padded, expected, got, what, exact=exact, origin=(tensors, base), contract=contract)


def _longer(tensor: Tensor, axis: int, more: int) -> Tensor:
    """The first `more` of an axis again at its end (from the start once more where there are too few)."""
    size = tensor.shape[axis]
    source = torch.arange(size + more, device=tensor.device) % size
    if tensor.element_size() == 1:
        return tensor.view(torch.uint8).index_select(axis, source).view(tensor.dtype)
    return tensor.index_select(axis, source)


def clamp_witness(trial: Trial) -> None:
    """Beyond the limits of a clamped activation nothing changes; within them, and below the gate's open end, it does.

    The layer's w13 has one column, so that a token's first channel sets all its gates and ups: exact small numbers.
    Judged by the bound with channels on both sides of every limit; then, with all gates and all ups beyond them, equal
    to a call with channels twice as large.
    """
    tensors = _one_column(trial.tensors)
    backend = trial.made(tensors)
    tokens = torch.arange(trial.case.tokens, device=tensors.hidden_states.device)
    reaches = torch.tensor(REACHES, device=tokens.device)[tokens % len(REACHES)]
    spread = _reaching(tensors, reaches)
    trial.within(spread, trial.call(spread, backend=backend), "with gates and ups on both sides of the limit")
    beyond = _reaching(tensors, torch.ones_like(reaches))
    farther = _reaching(tensors, torch.full_like(reaches, BEYOND))
    clamped, again = (trial.call(given, backend=backend) for given in (beyond, farther))
    what = "with gates and ups beyond the limit made twice as large"
    trial.same(farther, clamped, again, what, exact=deterministic(trial), before=(beyond, clamped))


def _one_column(tensors: CaseTensors) -> CaseTensors:
    given, inter = tensors.weights, tensors.config.intermediate_size_per_partition
    values = torch.zeros(given.w13.shape, device=given.w13.device)
    place = torch.arange(inter, device=values.device)
    values[:, :inter, 0] = torch.tensor(GATES, device=values.device)[place % len(GATES)]
    values[:, inter:, 0] = torch.tensor(UPS, device=values.device)[place % len(UPS)]
    changed: dict[str, Any] = {"w13": coded(values, given.w13.dtype)}
    if given.w13_scale is not None:
        changed["w13_scale"] = torch.ones_like(given.w13_scale)
    if given.w13_bias is not None:
        changed["w13_bias"] = torch.zeros_like(given.w13_bias)
    if given.a13_scale is not None and given.a2_scale is not None:
        # Both powers of two: channels are exact, and 7 * (7 + 1), the largest an intermediate can be, has a code.
        changed |= {"a13_scale": torch.full_like(given.a13_scale, 2.0**-5)}
        changed |= {"a2_scale": torch.full_like(given.a2_scale, 2.0**-2)}
    return with_weights(tensors, **changed)


def _reaching(tensors: CaseTensors, channel: Tensor) -> CaseTensors:
    hidden = torch.zeros_like(tensors.hidden_states, memory_format=torch.contiguous_format)
    hidden[:, 0] = channel.to(hidden.dtype)
    return replace(tensors, hidden_states=hidden)


def _unclamped(case: Case) -> str:
    return "" if case.activation in CLAMPED else f"its activation {case.activation} has no limit"


WEIGHTS = (
    Check(
        "computes.relation.block_isolation",
        "another block of a weight changes the columns and tokens that it reaches, and no others",
        Exactness.DETERMINISTIC,
        block_isolation,
        fewer_tokens(1),
    ),
    Check(
        "computes.relation.padding_hidden",
        "hidden channels that are zero in every token change nothing",
        Exactness.BOUND,
        padding_hidden,
        fewer_tokens(1),
    ),
    Check(
        "computes.relation.clamp_witness",
        "a clamped activation is what it must be on both sides of its limits, and beyond them nothing changes",
        Exactness.DETERMINISTIC,
        clamp_witness,
        unless(_unclamped, weight_on_input, fewer_tokens(1)),
    ),
)
