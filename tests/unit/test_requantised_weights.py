"""Weights that are quantised anew with scales that are powers of two: declared, they are judged as such."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from conformance.build import CaseTensors, build
from conformance.cases import Case
from conformance.oracles import trace_of
from conformance.plan import Subject, resolve_target
from conformance.relations.grounds import requantised_alike
from conformance.results import Status
from conformance.trial import Trial
from fp8moe.backends.torch_experts import TorchExperts
from fp8moe.experts import MoEWeights
from fp8moe.kernel_format import convert_to_fp8_moe_kernel_format
from fp8moe.keys import GroupShape
from fp8moe.layouts.deepgemm import power_of_two_scales
from fp8moe.recipe import Arithmetic, Recipe, Steps
from fp8moe.reference.problem import MoEProblem
from fp8moe.reference.quantisation import scale_of
from fp8moe.reference.replay import replay_moe, why_not_replayed
from fp8moe.reference.replayed_codes import requantised, scale_from
from fp8moe.reference.rounding import E4M3FN, format_of
from fp8moe.registry import Fp8MoeBackend
from fp8moe.scaling import scale_from_amax
from tests.unit.brute_force_moe import float32, fp8_table, nearest
from tests.unit.brute_force_moe import scale_of as plain_scale_of
from tests.unit.test_rounded_weights import judged

pytestmark = pytest.mark.usefixtures("one_thread")

REQUANTISED = Recipe(w13="requantised", w2="requantised")
BY_E8M0 = replace(REQUANTISED, scale_rounding="power_of_two", gemm1_output="input", gemm2_output="input")
WGMMA = Arithmetic.on("hopper.wgmma", promote_every=128)
TINY = Case(tokens=3, experts=2, top_k=1, hidden=136, inter=144, values="block_scales")
"""Its last blocks are cut off."""


def odd(tensors: CaseTensors) -> MoEWeights:
    """With a scale of 0, one below the floor, one that is a power of two."""
    weights = tensors.weights
    assert weights.w2_scale is not None
    scale = weights.w2_scale.clone()
    flat = scale.view(-1)
    flat[0], flat[-1] = 0.0, 1e-8
    if len(flat) > 2:
        flat[1] = 0.25
    return replace(weights, w2_scale=scale)


def plain(
    codes: Tensor, scale: Tensor, tile: tuple[int, int], parts: int
) -> tuple[list[list[float]], dict[Any, float]]:
    """One expert's matrix, a number at a time: what it holds after all, and the scales by part and tile."""
    table = fp8_table(codes.dtype)
    limit = max(value for value in table if value == value)
    recipe = SimpleNamespace(amax_floor=1e-4, scale_division="divide", scale_rounding="power_of_two")
    rows, columns = codes.shape
    each = rows // parts
    grid = scale.reshape(parts, -(-each // tile[0]), -(-columns // tile[1])).tolist()
    raw, places = codes.view(torch.uint8).tolist(), [(r, c) for r in range(rows) for c in range(columns)]

    def where(row: int, column: int) -> tuple[int, int, int]:
        return row // each, row % each // tile[0], column // tile[1]

    values: dict[tuple[int, int], float] = {}
    largest: dict[tuple[int, int, int], float] = {}
    for row, column in places:
        part, high, wide = at = where(row, column)
        values[row, column] = float32(table[raw[row][column]] * grid[part][high][wide])
        largest[at] = max(largest.get(at, 0.0), abs(values[row, column]))
    powers = {at: plain_scale_of(amax, limit, recipe) for at, amax in largest.items()}
    found = [[0.0] * columns for _ in range(rows)]
    for row, column in places:
        power = powers[where(row, column)]
        found[row][column] = nearest(float32(values[row, column] / power), table) * power
    return found, powers


@pytest.mark.parametrize(
    ("scheme", "tile", "fnuz"),
    [
        ("block", (128, 128), False),
        ("block", (128, 128), True),
        ("channel_tok", (1, 1 << 20), False),
        ("tensor_dyn", (1 << 20, 1 << 20), False),
    ],
)
@pytest.mark.parametrize("name", ["w13", "w2"])
def test_every_statement_of_it_is_the_plain_one(scheme: str, tile: tuple[int, int], fnuz: bool, name: str) -> None:
    tensors = build(replace(TINY, scheme=scheme, fnuz=fnuz), "cpu")
    weights = odd(tensors)
    codes, scale = getattr(weights, name), getattr(weights, f"{name}_scale")
    parts = 2 if name == "w13" and scheme == "block" else 1
    group = tensors.quant.w1.shape or GroupShape.PER_TENSOR
    problem = problem_of(tensors, REQUANTISED, weights)
    replayed, powers = requantised(codes, scale, group, parts, format_of(codes.dtype))
    honest = TorchExperts.with_recipe(REQUANTISED)(tensors.config, tensors.quant, weights)
    for expert in range(2):
        expected, plain_powers = plain(codes[expert], scale[expert], tile, parts)
        wanted = torch.tensor(expected, dtype=torch.float64)
        assert powers[expert].view(-1).tolist() == list(plain_powers.values())
        assert all(math.frexp(power)[0] == 0.5 for power in plain_powers.values())
        wide = wanted / replayed[expert].double()
        assert torch.equal(replayed[expert].double() * torch.where(wide.isfinite(), wide, 0.0), wanted)
        assert torch.equal(problem.weight_rows(name, expert, 0, len(wanted)), wanted)
        some = torch.tensor([0, 5, 130])
        assert torch.equal(problem.weight_columns(name, expert, some), wanted[:, some])
        assert torch.equal(honest.weight(name, expert).double(), wanted)
    if scheme == "block" and not fnuz:
        found, scales = power_of_two_scales(codes, scale, parts)
        assert torch.equal(found.view(torch.uint8), replayed.view(torch.uint8))
        assert torch.equal(scales, powers)


def problem_of(tensors: CaseTensors, recipe: Recipe, weights: MoEWeights | None = None) -> MoEProblem:
    call = (tensors.hidden_states, tensors.topk_weights, tensors.topk_ids, tensors.expert_map, False, torch.arange(3))
    return MoEProblem(tensors.config, tensors.quant, recipe, weights or tensors.weights, *call)


@pytest.mark.parametrize("scheme", ["block", "channel_tok", "tensor_dyn"])
def test_what_it_adds_to_a_weight_is_known(scheme: str) -> None:
    tensors = build(replace(TINY, scheme=scheme), "cpu")
    weights = odd(tensors)
    problem, exact = (problem_of(tensors, recipe, weights) for recipe in (REQUANTISED, Recipe()))
    found = problem.weight_deviation("w2", 1, slice(100, 136))
    assert found is not None
    assert bool(found.any())
    assert torch.equal(found, problem.weight_rows("w2", 1, 100, 136) - exact.weight_rows("w2", 1, 100, 136))


def test_powers_of_two_hide_no_code() -> None:
    """A layer whose scales are powers of two already has the same weights, whatever the codes."""
    tensors = build(Case.parse("v1:M=3,values=exact_grid"), "cpu")
    problem, exact = (problem_of(tensors, recipe) for recipe in (REQUANTISED, Recipe()))
    for name in ("w13", "w2"):
        assert torch.equal(problem.weight_rows(name, 0, 0, 128), exact.weight_rows(name, 0, 0, 128))


@pytest.mark.parametrize("weight_on_input", [False, True])
def test_both_oracles_see_the_layer_that_the_kernel_gets(weight_on_input: bool) -> None:
    case = Case(tokens=5, top_k=1, hidden=256, inter=128, values="block_scales", weight_on_input=weight_on_input)
    tensors = build(case, "cpu")
    converted = convert_to_fp8_moe_kernel_format(
        Fp8MoeBackend.DEEPGEMM, tensors.config, tensors.quant, tensors.weights, e8m0=True
    )
    declared = trace_of(tensors, BY_E8M0)
    exact = trace_of(replace(tensors, weights=converted), replace(BY_E8M0, w13="exact", w2="exact"))
    assert torch.equal(declared.R, exact.R)
    assert not torch.equal(declared.R, trace_of(tensors, replace(BY_E8M0, w13="exact", w2="exact")).R)
    steps = Steps(scale_order="product")
    replays = [replay_moe(trace, WGMMA, steps) for trace in (declared, exact)]
    for stage, values in replays[0].stages.items():
        assert torch.equal(values, replays[1].stages[stage]), stage
    contract = replace(TorchExperts.contract, recipe=BY_E8M0, arithmetic=WGMMA, steps=steps)
    assert why_not_replayed(contract, tensors.quant, tensors.weights, 5) == ""


def test_one_weight_may_be_quantised_anew_without_the_other() -> None:
    tensors = build(Case(tokens=3, values="block_scales"), "cpu")
    problem, exact = (problem_of(tensors, recipe) for recipe in (Recipe(w2="requantised"), Recipe()))
    assert torch.equal(problem.weight_rows("w13", 0, 0, 128), exact.weight_rows("w13", 0, 0, 128))
    assert not torch.equal(problem.weight_rows("w2", 0, 0, 128), exact.weight_rows("w2", 0, 0, 128))


@pytest.mark.parametrize("scheme", ["block", "channel_tok", "tensor_dyn"])
@pytest.mark.parametrize("values", ["block_scales", "zero_blocks", "bimodal_scales"])
def test_an_honest_backend_passes(scheme: str, values: str) -> None:
    case = f"v1:M=33,H=256,seed=12,scheme={scheme},values={values}"
    assert judged(case, BY_E8M0, BY_E8M0) is Status.PASSED


@pytest.mark.parametrize("case", ["v1:M=16,values=block_scales", "v1:M=16,values=one_hot"])
def test_what_is_quantised_anew_is_judged_as_it_is_declared(case: str) -> None:
    exact = replace(BY_E8M0, w13="exact", w2="exact")
    assert judged(case, exact, BY_E8M0) is Status.FAILED
    assert judged(case, BY_E8M0, exact) is Status.FAILED
    assert judged(case, replace(BY_E8M0, w2="exact"), BY_E8M0) is Status.FAILED


def test_a_power_of_two_is_a_normal_number_and_the_smallest_that_is_not_below() -> None:
    """Every statement of it: exact powers, one step to both sides, subnormal quotients, zero, infinity, NaN."""
    tiny, powers = 2.0**-126, torch.exp2(torch.arange(-120, 120).float())
    edges = [torch.nextafter(448 * powers, torch.tensor(end)) for end in (0.0, math.inf)]
    special = torch.tensor([0.0, 2.0**-149, 448 * 2.0**-130, 448 * tiny, 3e38, math.inf, math.nan])
    amax = torch.cat([448 * powers, *edges, special])
    recipe = Recipe(scale_rounding="power_of_two", amax_floor=0.0)
    found = scale_of(amax.double(), E4M3FN, recipe)
    for other in (
        scale_from(amax, E4M3FN, recipe),
        scale_from_amax(amax, scale_rounding="power_of_two", amax_floor=0.0),
    ):
        assert torch.equal(found.nan_to_num(-1.0), other.double().nan_to_num(-1.0))
    assert torch.equal(found[: 3 * len(powers)].float(), torch.cat([powers, powers, 2 * powers]))
    assert found[-7:-3].tolist() == [tiny] * 4
    assert found[-2].isinf()
    assert found[-1].isnan()


@pytest.mark.parametrize("check", ["output_scale", "input_scale", "scale_code_exchange", "block_isolation"])
@pytest.mark.parametrize("values", ["bimodal_scales", "block_scales", "zero_blocks"])
def test_relations_of_scales_know_the_floor(check: str, values: str) -> None:
    """Under bimodal_scales most blocks are below it, where a factor does not go through."""
    assert judged(f"v1:M=8,values={values}", BY_E8M0, BY_E8M0, f"computes.relation.{check}") is Status.PASSED


def test_a_factor_goes_through_above_the_floor_alone() -> None:
    trials = []
    for values in ("iid", "bimodal_scales"):
        subject = Subject("Requantised", TorchExperts.with_recipe(BY_E8M0), "")
        trials.append(Trial(Case.parse(f"v1:M=3,values={values}"), subject, resolve_target("cpu")))
        trials[-1].start()
    assert [requantised_alike(trial, "w13", 0.25) for trial in trials] == [True, False]
