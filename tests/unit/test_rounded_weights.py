"""Weights that are rounded with their scales, codes whose exponent is shifted: declared, they are judged as such."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from conformance.build import build
from conformance.cases import Case
from conformance.checks import check_case
from conformance.plan import Subject, resolve_target
from conformance.results import Status
from fp8moe.backends.marlin import BY_MARLIN, contract_for
from fp8moe.backends.torch_experts import TorchExperts
from fp8moe.recipe import Contract, Recipe
from fp8moe.reference.problem import MoEProblem
from fp8moe.reference.replay import why_not_replayed
from fp8moe.registry import LayerNotSupported

EXACT = replace(BY_MARLIN, bias="float32", routing_weights="float32")
SCALES, PRODUCTS = (replace(EXACT, w13=form, w2=form) for form in ("rounded_scales", "rounded"))
SHIFT = 120
WITNESS = "computes.relation.clamp_witness"


class Computing(TorchExperts):
    """Computes by one recipe and declares another."""

    computes: Recipe
    loses = False

    @property
    def recipe(self) -> Recipe:
        return self.computes

    def second_gemm(self, intermediate: Tensor, index: int) -> Tensor:
        if not self.loses:
            return super().second_gemm(intermediate, index)
        scale = self.rounded(self.weights.w2_scale[index], "input").reshape(1, -1)
        quantum = 2.0 ** (SHIFT - 149)
        sums = intermediate @ (self.weight("w2", index) / scale.t()).t()
        return self.rounded((sums / quantum).trunc() * quantum * scale, self.recipe.gemm2_output)


def judged(
    case: str, computes: Recipe, declares: Recipe, check: str = "computes.equivalence", **fields: bool
) -> Status:
    members = {"computes": computes, "contract": Contract(declares, deterministic=True), **fields}
    cls = type("Made", (Computing,), members)
    return check_case(Case.parse(case), Subject("Made", cls, ""), resolve_target("cpu"), check).status


@pytest.mark.parametrize(
    ("case", "recipe"),
    [
        ("v1:M=16,scheme=channel_tok,values=exact_sums", SCALES),
        ("v1:M=16,scheme=tensor_dyn,act=silu_no_mul,values=exact_sums", SCALES),
        ("v1:M=16,values=one_hot", PRODUCTS),
    ],
)
def test_what_is_rounded_is_judged_as_it_is_declared(case: str, recipe: Recipe) -> None:
    assert judged(case, recipe, recipe) is Status.PASSED
    assert judged(case, recipe, EXACT) is Status.FAILED
    assert judged(case, EXACT, recipe) is Status.FAILED


def test_what_a_shifted_exponent_loses_is_allowed_where_it_is_declared() -> None:
    case = "v1:M=16,scheme=channel_tok,act=swigluoai"
    shifted = replace(SCALES, w13_shift=SHIFT, w2_shift=SHIFT)
    assert judged(case, SCALES, SCALES, WITNESS) is Status.PASSED
    assert judged(case, SCALES, SCALES, WITNESS, loses=True) is Status.FAILED
    assert judged(case, shifted, shifted, WITNESS, loses=True) is Status.PASSED


def test_a_zero_weight_is_judged_where_the_enlarged_layer_is_refused() -> None:
    class Small(TorchExperts):
        def __init__(self, config: object, quant: object, weights: object) -> None:
            super().__init__(config, quant, weights)  # type: ignore[arg-type]
            assert self.weights.w2_scale is not None
            if float(self.weights.w2_scale.max()) > 2.0**7:
                raise LayerNotSupported("Small: a scale of more than 2^7")

        def combine(self, slots: Tensor, weights: Tensor, present: Tensor) -> Tensor:
            return super().combine(slots, weights + self.wrong, present)

        wrong = 0.0

    case = Case.parse("v1:E=4,k=3,H=128,I=128,M=9,scheme=channel_tok,law=skewed")
    for wrong, status in ((0.0, Status.PASSED), (0.5, Status.FAILED)):
        cls = type("Small", (Small,), {"wrong": wrong})
        found = check_case(case, Subject("Small", cls, ""), resolve_target("cpu"), "computes.relation.zero_weight")
        assert found.status is status, found.reason


def test_rounded_weights_are_not_replayed() -> None:
    tensors = build(Case.parse("v1:M=3"), "cpu")
    given = (tensors.quant, tensors.weights, 6)
    contract = replace(TorchExperts.contract, steps=None)
    assert why_not_replayed(replace(contract, recipe=PRODUCTS), *given)


@pytest.mark.parametrize("shift", [-1, 127, 1.0])
def test_a_shift_out_of_range_is_refused(shift: int) -> None:
    with pytest.raises(ValueError, match=r"w2_shift=.*: expected an integer from 0 to 126"):
        Recipe(w2_shift=shift)


def test_an_unknown_rounding_of_weights_is_refused() -> None:
    with pytest.raises(ValueError, match="w2='bf16': expected one of 'exact', 'rounded_scales', 'rounded'"):
        Recipe(w2="bf16")  # type: ignore[arg-type]


def test_float64_keeps_what_is_not_rounded() -> None:
    """The oracle's weights are those of the formula, rounded once a product."""
    tensors = build(Case.parse("v1:M=3,H=256,I=128"), "cpu")
    given = (tensors.hidden_states, tensors.topk_weights, tensors.topk_ids, tensors.expert_map, False, torch.arange(3))
    scale = tensors.weights.w2_scale
    assert scale is not None
    wide = scale[1].repeat_interleave(128, 0).repeat_interleave(128, 1)
    codes = tensors.weights.w2[1].double()
    for recipe, expected in (
        (Recipe(), codes * wide.double()),
        (Recipe(w2="rounded_scales"), codes * wide.bfloat16().double()),
        (Recipe(w2="rounded"), (codes * wide.bfloat16().double()).float().bfloat16().double()),
    ):
        problem = MoEProblem(tensors.config, tensors.quant, recipe, tensors.weights, *given)
        assert torch.equal(problem.weight_rows("w2", 1, 0, 256), expected)


@pytest.mark.parametrize(
    ("case", "fields"),
    [
        ("v1:M=16,scheme=channel_tok,act=swigluoai,values=one_hot,bias=on,seed=2000036", {"bias": "input"}),
        (
            "v1:E=1,k=1,M=16,scheme=tensor_none,dtype=fp16,act=relu2_no_mul,values=exact_sums,seed=2000127",
            {"routing_weights": "input"},
        ),
    ],
)
def test_roundings_on_the_way_out_are_judged_as_they_are_declared(case: str, fields: dict[str, Any]) -> None:
    """On a device they were told by their bits."""
    less = replace(SCALES, w13_shift=8, w2_shift=8)
    declared = replace(less, **fields)
    assert judged(case, declared, declared) is Status.PASSED
    assert judged(case, declared, less) is Status.FAILED


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("scheme", ["block", "channel_tok", "tensor_dyn"])
@pytest.mark.parametrize("values", ["loud_quiet", "bimodal_scales", "one_hot"])
def test_an_honest_backend_of_marlins_recipe_passes(scheme: str, values: str, dtype: str) -> None:
    case = Case.parse(f"v1:M=33,H=256,act=swigluoai,seed=12,scheme={scheme},values={values},dtype={dtype},bias=on")
    tensors = build(case, "cpu")
    recipe = contract_for(tensors.config, tensors.quant).recipe
    assert judged(str(case), recipe, recipe) is Status.PASSED


def test_marlins_recipe_goes_by_the_groups_of_each_gemm() -> None:
    for hidden, inter, forms in (
        (128, 24, ("rounded_scales", "rounded_scales")),
        (256, 128, ("rounded", "rounded_scales")),
        (128, 136, ("rounded_scales", "rounded")),
    ):
        tensors = build(Case(hidden=hidden, inter=inter), "cpu")
        recipe = contract_for(tensors.config, tensors.quant).recipe
        assert (recipe.w13, recipe.w2) == forms
        assert (recipe.w13_shift, recipe.w2_shift) == tuple(120 if form == "rounded_scales" else 0 for form in forms)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("scheme", ["block", "channel_tok"])
def test_what_rounding_adds_to_a_weight_is_known(scheme: str, dtype: str) -> None:
    """Of each element, where a scale is 0, or in fp16 so small that it becomes subnormal, too."""
    tensors = build(Case.parse(f"v1:M=3,H=256,I=128,scheme={scheme},dtype={dtype}"), "cpu")
    assert tensors.weights.w2_scale is not None
    scale = tensors.weights.w2_scale.clone()
    scale[1, 0], scale[1, 1] = 0.0, 3e-7
    weights = replace(tensors.weights, w2_scale=scale)
    given = (tensors.hidden_states, tensors.topk_weights, tensors.topk_ids, tensors.expert_map, False, torch.arange(3))
    exact, rounded = (
        MoEProblem(tensors.config, tensors.quant, Recipe(w2=form), weights, *given) for form in ("exact", "rounded")
    )
    assert exact.weight_deviation("w2", 1, slice(0, 256)) is None
    found = rounded.weight_deviation("w2", 1, slice(100, 256))
    assert found is not None
    expected = rounded.weight_rows("w2", 1, 100, 256) - exact.weight_rows("w2", 1, 100, 256)
    assert bool(found.any())
    assert torch.equal(found, expected)


@pytest.mark.parametrize("values", ["zero_blocks", "bimodal_scales"])
def test_the_ideal_oracles_band_holds_an_honest_output_in_fp16(values: str) -> None:
    case = Case.parse(f"v1:M=40,H=256,I=256,dtype=fp16,values={values},law=unnormalised,seed=4")
    tensors = build(case, "cpu")
    recipe = contract_for(tensors.config, tensors.quant).recipe
    assert judged(str(case), recipe, recipe) is Status.PASSED
