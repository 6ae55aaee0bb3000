"""Faults inside the computation, planted in a stage of `TorchExperts`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from conformance.zoo.plant import ExpertsClass, Fault
from fp8moe.backends.torch_experts import TorchExperts
from fp8moe.keys import GroupShape
from fp8moe.quant import FusedMoEQuantDesc
from fp8moe.recipe import Recipe


def _computes(recipe: Callable[[Recipe], Recipe]) -> Callable[[ExpertsClass], dict[str, Any]]:
    """The mutant computes another recipe than it declares."""

    def members(_: ExpertsClass) -> dict[str, Any]:
        return {"recipe": property(lambda self: recipe(self.contract.recipe))}

    return members


def _bf16_combine(base: ExpertsClass) -> dict[str, Any]:
    parent = cast("type[TorchExperts]", base)

    def combine(self: Any, slots: Tensor, weights: Tensor, present: Tensor) -> Tensor:
        return parent.combine(self, slots.to(torch.bfloat16).float(), weights, present)

    return {"combine": combine}


def _bf16_accumulator(_: ExpertsClass) -> dict[str, Any]:
    """The running sum over K is rounded to bf16 every 32 terms."""

    def first_gemm(self: Any, inputs: Tensor, index: int) -> Tensor:
        weight = self.weight("w13", index)
        total = inputs.new_zeros(inputs.shape[0], weight.shape[0])
        for start in range(0, inputs.shape[1], 32):
            part = inputs[:, start : start + 32] @ weight[:, start : start + 32].t()
            total = (total + part).to(torch.bfloat16).float()
        bias = self.weights.w13_bias
        return total if bias is None else total + bias[index].float()

    return {"first_gemm": first_gemm}


def _coarse_second_quantisation(base: ExpertsClass) -> dict[str, Any]:
    parent = cast("type[TorchExperts]", base)

    def through_fp8(
        self: Any, values: Tensor, desc: FusedMoEQuantDesc, static: Tensor | None, expert: Tensor | None
    ) -> Tensor:
        if (
            desc == self.quant.a2
            and values.shape[-1] == self.config.intermediate_size_per_partition
            and not desc.static
        ):
            desc = replace(
                desc, shape=GroupShape.PER_TENSOR if desc.shape == GroupShape.PER_TOKEN else GroupShape.PER_TOKEN
            )
        return parent.through_fp8(self, values, desc, static, expert)

    return {"through_fp8": through_fp8}


def _early_saturation(base: ExpertsClass) -> dict[str, Any]:
    """Quantised activations stop at 256 of 448 (in units of their scale): the loudest are cut."""
    parent = cast("type[TorchExperts]", base)

    def through_fp8(
        self: Any, values: Tensor, desc: FusedMoEQuantDesc, static: Tensor | None, expert: Tensor | None
    ) -> Tensor:
        exact = parent.through_fp8(self, values, desc, static, expert)
        if desc.dtype is None:
            return exact
        largest = exact.abs().amax() * (256 / 448)
        return exact.clamp(-largest, largest)

    return {"through_fp8": through_fp8}


INSIDE = (
    Fault(
        "bf16_combine", "bf16-combine", "results are rounded to bf16 before the sum over experts", True, _bf16_combine
    ),
    Fault("bf16_accumulator", "bf16-k-accumulate", "the sum over K is kept in bf16", True, _bf16_accumulator),
    Fault(
        "power_of_two_scales",
        "ue8m0-policy-dropped",
        "activation scales are rounded up to powers of two though continuous ones are declared",
        True,
        _computes(lambda recipe: replace(recipe, scale_rounding="power_of_two")),
    ),
    Fault(
        "intermediate_not_requantised",
        "",
        "the second GEMM takes the intermediate unquantised",
        True,
        _computes(lambda recipe: replace(recipe, requantize=False)),
    ),
    Fault(
        "coarse_second_quantisation",
        "",
        "the intermediate is quantised with one scale a token instead of one a group",
        True,
        _coarse_second_quantisation,
    ),
    Fault("early_saturation", "fp8-cast-early-saturation", "quantisation saturates at 256", False, _early_saturation),
)
