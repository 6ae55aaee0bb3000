"""Relations of scales: powers of two that go through, or that codes and scales exchange."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from conformance.build import CaseTensors
from conformance.cases import Case
from conformance.draw import Draw
from conformance.named_check import Check, Exactness
from conformance.relations.changed import coded, numbers, with_weights
from conformance.relations.grounds import (
    deterministic,
    fewer_tokens,
    not_applicable,
    requantised_alike,
    scaled_output,
    scaling_is_exact,
    unless,
    weight_on_input,
)
from conformance.trial import Trial
from fp8moe.keys import GroupShape
from fp8moe.scaling import fp8_format, group_amax

OUTPUT_EXPONENTS = (3, -2)
INPUT_FACTOR = 4.0


def output_scale(trial: Trial) -> None:
    """w2's scales (unquantised: its values, upwards only) and its bias times 2^n multiply the output by 2^n.

    Compared where both outputs are normal numbers. Exact: the scales meet a sum in fp32, or a 16-bit weight whose
    exponent has room; where the recipe rounds a result to fp16 on the way, which may be subnormal, or quantises weights
    anew from an amax below its floor, the bound judges.
    """
    weights = trial.tensors.weights
    base = trial.call()
    exact = deterministic(trial) and scaling_is_exact(trial, "gemm2_output", "weighted", "combine")
    for exponent in OUTPUT_EXPONENTS:
        factor = 2.0**exponent
        name = "w2" if weights.w2_scale is None else "w2_scale"
        if name == "w2" and exponent < 0:
            continue
        changed = {name: getattr(weights, name) * factor}
        if weights.w2_bias is not None:
            changed["w2_bias"] = weights.w2_bias * factor
        if not all(bool(torch.isfinite(tensor).all()) for tensor in changed.values()):
            raise not_applicable(f"w2 has no room for a factor of 2^{exponent}")
        scaled = with_weights(trial.tensors, **changed)
        got = trial.call(scaled, backend=trial.made(scaled))
        what = f"with {name} times 2^{exponent}"
        same = exact and requantised_alike(trial, "w2", factor)
        trial.same(scaled, scaled_output(base, got, factor), got, what, exact=same, origin=(trial.tensors, base))


def input_scale(trial: Trial) -> None:
    """Hidden states (and a static scale of theirs) times 4, w13's scales by 4, leave the output as it is.

    FP8 codes stay what they are: dynamic scales follow the amax, wherever that is 0 or not below the recipe's floor;
    other tokens are not compared. Multiplying by 4 is exact in 16 bits, subnormal numbers included; w13 itself, where
    it has no scales, is divided, which is why fp16 is left out there.
    """
    tensors = trial.tensors
    weights = tensors.weights
    hidden = tensors.hidden_states * INPUT_FACTOR
    if not bool(torch.isfinite(hidden).all()):
        raise not_applicable("its hidden states have no room for a factor of 4")
    changed: dict[str, Tensor | None] = {}
    if weights.a13_scale is not None:
        changed["a13_scale"] = weights.a13_scale * INPUT_FACTOR
    name = "w13" if weights.w13_scale is None else "w13_scale"
    changed[name] = getattr(weights, name) / INPUT_FACTOR
    scaled = replace(with_weights(tensors, **changed), hidden_states=hidden)
    base, got = trial.call(), trial.call(scaled, backend=trial.made(scaled))
    compared = _above_the_floor(tensors, trial.contract.recipe.amax_floor)[:, None]
    what = f"with hidden states times 4 and {name} by 4"
    expected = torch.where(compared, base, got)
    exact = deterministic(trial) and requantised_alike(trial, "w13", 1 / INPUT_FACTOR)
    trial.same(scaled, expected, got, what, exact=exact, origin=(tensors, base))


def _above_the_floor(tensors: CaseTensors, floor: float) -> Tensor:
    """(M,) bool: whether the dynamic scales of a token are those of its amaxes, or of zeros."""
    desc, hidden = tensors.quant.a1, tensors.hidden_states
    if desc.dtype is None or desc.static or not hidden.numel():
        return torch.ones(len(hidden), dtype=torch.bool, device=hidden.device)
    group = desc.shape or GroupShape.PER_TENSOR
    # A tensor may be one expert's tokens: every token's own amax has to be above the floor for that.
    amax = group_amax(hidden, GroupShape.PER_TOKEN if group.is_per_tensor() else group)
    above = ((amax == 0) | (amax >= floor)).all(dim=1)
    return above.all().expand_as(above) if group.is_per_tensor() else above


def scale_code_exchange(trial: Trial) -> None:
    """Half the codes, twice the scale: half of the blocks, channels or tensors of w13 and w2 say the same otherwise.

    Which half is drawn, since a regular pattern would be the same read with the axes exchanged.

    Codes whose half is subnormal are 0 here from the start, so that halving is exact, and a matrix unit, which counts
    a subnormal number's exponent as the smallest normal one's, aligns the halves as it aligns the codes.
    """
    tensors = trial.tensors
    plain: dict[str, Tensor] = {}
    exchanged: dict[str, Tensor] = {}
    for name in ("w13", "w2"):
        codes, scale = getattr(tensors.weights, name), getattr(tensors.weights, f"{name}_scale")
        values = numbers(codes)
        smallest = 2.0 ** fp8_format(codes.dtype).min_exponent
        values = values.masked_fill(values.abs() < 2 * smallest, 0.0)
        chosen = Draw(trial.case.seed, scale.device).integers(f"relation/{name}_exchange", scale.shape, 2) == 1
        parts = 2 if name == "w13" and tensors.config.is_act_and_mul else 1
        factor = _spread(torch.where(chosen, 0.5, 1.0), values.shape, parts)
        plain[name] = coded(values, codes.dtype)
        exchanged |= {name: coded(values * factor, codes.dtype), f"{name}_scale": torch.where(chosen, 2 * scale, scale)}
    before, after = with_weights(tensors, **plain), with_weights(tensors, **exchanged)
    base = trial.call(before, backend=trial.made(before))
    got = trial.call(after, backend=trial.made(after))
    what = "with half of the scales doubled and their codes halved"
    trial.same(after, base, got, what, exact=deterministic(trial), origin=(before, base))


def _spread(factor: Tensor, shape: torch.Size, parts: int) -> Tensor:
    """One factor for each scale of a weight to one for each element; w13's two parts are blocked apart."""
    if factor.dim() == 1:
        return factor[:, None, None]
    if factor.shape[1] == shape[1]:  # by channel: a column that broadcasts
        return factor
    block = 128
    halves = [
        half.repeat_interleave(block, dim=1)[:, : shape[1] // parts].repeat_interleave(block, dim=2)[:, :, : shape[2]]
        for half in factor.chunk(parts, dim=1)
    ]
    return torch.cat(halves, dim=1)


def _unquantised(case: Case) -> str:
    return "its weights have no scales" if case.scheme == "none" else ""


def _no_room(case: Case) -> str:
    narrow = case.dtype == "fp16" and case.scheme == "none"
    return "its fp16 weights may be subnormal once divided" if narrow else ""


SCALES = (
    Check(
        "computes.relation.output_scale",
        "scales of w2 times a power of two multiply the output by it",
        Exactness.DETERMINISTIC,
        output_scale,
        fewer_tokens(1),
    ),
    Check(
        "computes.relation.input_scale",
        "a power of two moved from the scales of w13 to the hidden states changes nothing",
        Exactness.DETERMINISTIC,
        input_scale,
        unless(weight_on_input, _no_room, fewer_tokens(1)),
    ),
    Check(
        "computes.relation.scale_code_exchange",
        "halved codes with doubled scales are the same weights",
        Exactness.DETERMINISTIC,
        scale_code_exchange,
        unless(_unquantised, fewer_tokens(1)),
    ),
)
