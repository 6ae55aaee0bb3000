"""On what grounds two results must have equal bits, and which cases have nothing to show for a relation."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from conformance.bits import why_not_bits
from conformance.build import CaseTensors
from conformance.cases import Case
from conformance.results import Status
from conformance.trial import Ended, Trial, arithmetic_of, steps_of
from fp8moe.counted import counted
from fp8moe.keys import GroupShape
from fp8moe.recipe import REQUANTISED_FLOOR, Contract
from fp8moe.scaling import decode, group_amax
from fp8moe.schemes import SCHEMES, TENSOR_DYNAMIC

WhyNot = Callable[[Case], str]


def unless(*reasons: WhyNot) -> WhyNot:
    """The first of the reasons that a case gives."""

    def why_not(case: Case) -> str:
        return next((why for why in (reason(case) for reason in reasons) if why), "")

    return why_not


def shared_scale(case: Case) -> str:
    """A dynamic per-tensor scale makes every token's result depend on the others'."""
    return "its tokens share a dynamic scale" if SCHEMES[case.scheme] == TENSOR_DYNAMIC else ""


def weight_on_input(case: Case) -> str:
    return "its routing weights are on the input, which the activation bends" if case.weight_on_input else ""


def sharded(case: Case) -> str:
    return "" if case.ep is None else f"it is one rank's share of the experts already (ep={case.ep})"


def fewer_tokens(least: int) -> WhyNot:
    return lambda case: f"it takes {counted(least, 'token')}, not {case.tokens}" if case.tokens < least else ""


def fewer_slots(least: int) -> WhyNot:
    return lambda case: f"it takes top-{least}, not top-{case.top_k}" if case.top_k < least else ""


def fewer_experts(least: int) -> WhyNot:
    return lambda case: (
        f"it takes {counted(least, 'local expert')}, not {case.local_experts}" if case.local_experts < least else ""
    )


def not_applicable(reason: str) -> Ended:
    """What a check raises where only the backend's contract, or the tensors, tell that it has nothing to show."""
    return Ended(Status.NOT_APPLICABLE, reason)


def deterministic(trial: Trial) -> bool:
    """A call of the same shapes, whose tokens' sums have the same terms, has the same bits again."""
    return trial.by_bits or bool(trial.contract.deterministic)


def replayed_alike(trial: Trial, tensors: CaseTensors, contract: Contract | None = None) -> bool:
    """A token's sums are known to the bit here and in a call on `tensors`, and are the same.

    What is chosen by the number of pairs (the height of a tile, and with it the matrix instruction) may be another in
    a call of another size; only where it is not are the bits the same.
    """
    declared = trial.contract_for(tensors) if contract is None else contract
    pairs = int(tensors.topk_ids.numel())
    return (
        trial.by_bits
        and arithmetic_of(declared, pairs) == trial.arithmetic
        and steps_of(declared, pairs) == trial.steps
        and declared.recipe == trial.contract.recipe
        and not why_not_bits(tensors, declared)
    )


def token_by_token(trial: Trial, tensors: CaseTensors) -> bool:
    """A token's bits are those that it has in a call on `tensors`, whose tokens may be others and another number.

    For cases whose tokens share no dynamic scale.
    """
    alike = trial.contract_for(tensors) == trial.contract
    declared = trial.contract.batch_invariant and trial.contract.deterministic
    return bool(alike and declared) or replayed_alike(trial, tensors)


def scaling_is_exact(trial: Trial, *stages: str) -> bool:
    """Whether a power of two passes through these roundings of the recipe unchanged.

    It does not where a sum is rounded to fp16 on the way: it may be subnormal there, and the output is not.
    """
    return trial.case.dtype != "fp16" or all(getattr(trial.contract.recipe, stage) == "float32" for stage in stages)


def requantised_alike(trial: Trial, name: str, factor: float) -> bool:
    """Whether w13 or w2 with its scales times a power of two has the same codes, where the recipe quantises them anew:
    no group's amax is below the floor, before or after, but those of zeros."""
    if getattr(trial.contract.recipe, name) != "requantised":
        return True
    tensors = trial.tensors
    codes, scale = getattr(tensors.weights, name), getattr(tensors.weights, f"{name}_scale")
    group = tensors.quant.w1.shape or GroupShape.PER_TENSOR
    parts = 2 if name == "w13" and tensors.config.is_act_and_mul and group.is_block() else 1
    for matrix, own in zip(codes, scale, strict=True):
        largest = torch.cat([group_amax(part, group) for part in decode(matrix).chunk(parts)])
        amax = largest.view(own.shape) * own.abs()
        if bool(((amax != 0) & (amax * min(factor, 1.0) < REQUANTISED_FLOOR)).any()):
            return False
    return True


def scaled_output(base: Tensor, got: Tensor, factor: float) -> Tensor:
    """`base` times a power of two, where both are normal numbers of their format; elsewhere what `got` has.

    Strictly above the smallest normal number: what was rounded up to it came from a coarser grid than its multiple.
    """
    limits = torch.finfo(base.dtype)
    wide = base.float()
    normal = (wide.abs() > limits.tiny) & (wide.abs() <= limits.max)
    times = wide * factor
    normal &= (times.abs() > limits.tiny) & (times.abs() <= limits.max)
    return torch.where(normal, times.to(base.dtype), got)
