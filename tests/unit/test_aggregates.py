"""Ratios of many errors together: what they say of uniform roundings, and what they find where others do not."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from conformance.bounds import Judgement, judge, pooled
from conformance.bounds.aggregates import (
    Residuals,
    Segments,
    bernstein,
    case_sums,
    columns_ratios,
    directed_sums,
    exponent,
    norm_ratios,
)
from conformance.bounds.allowance import half_spacing
from conformance.build import CaseTensors, build
from conformance.cases import Case
from fp8moe.backends.torch_experts import TorchExperts
from fp8moe.recipe import FP32, Recipe
from fp8moe.reference.recipe import RecipeTrace, recipe_moe
from fp8moe.reference.rounding import BFLOAT16, FLOAT16, round_to

pytestmark = pytest.mark.usefixtures("one_thread")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def residuals(exact: Tensor, before: Tensor | None = None, slack: float = 0.0) -> Residuals:
    """Of outputs rounded from `before`, `exact` being the reference."""
    output = round_to(exact if before is None else before, BFLOAT16)
    return Residuals.of(output - exact, exact, torch.full_like(exact, slack), BFLOAT16)


def whole(of: Residuals) -> Segments:
    return Segments.of(torch.zeros_like(of.error, dtype=torch.int64), 1, of.mantissa)


class Setting:
    """A case, its oracle, and outputs rounded from what is given instead of the oracle's result."""

    def __init__(self, text: str) -> None:
        self.tensors: CaseTensors = build(Case.parse(text))
        t = self.tensors
        self.call = (t.weights, t.hidden_states, t.topk_weights, t.topk_ids)
        self.trace: RecipeTrace = recipe_moe(t.config, t.quant, Recipe(), *self.call)
        self.half = half_spacing(self.trace.smooth, BFLOAT16)

    def judged(self, added: Tensor) -> Judgement:
        output = round_to(self.trace.smooth + added, BFLOAT16).to(torch.bfloat16)
        return judge(self.trace, output, FP32)


def failed(judgement: Judgement) -> set[str]:
    return {name for name, value in judgement.statistics.items() if not value <= 1}


# -- the parts --


def test_the_level_keeps_the_probability_of_one_test() -> None:
    for tests in (1, 8, 1000):
        assert tests * math.exp(-exponent(tests)) == pytest.approx(math.exp(-18))


def test_bernstein_solves_its_inequality() -> None:
    variance, largest = torch.tensor([2.0, 0.0, 5.0]), torch.tensor([1.0, 3.0, 0.0])
    found = bernstein(variance, largest, 18.0)
    exponents = found.square() / (2 * variance + 2 * largest * found / 3)
    assert exponents.tolist() == pytest.approx([18.0] * 3)


def test_segments_add_up_and_know_who_is_rounded_alike() -> None:
    segment, mantissa = torch.tensor([0, 0, 0, 1, 1]), torch.tensor([5, 5, 7, 5, 6])
    segments = Segments.of(segment, 3, mantissa)
    values = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0], dtype=torch.float64)
    assert segments.total(values).tolist() == [7.0, 24.0, 0.0]
    assert segments.squares(values).tolist() == [9.0 + 16.0, 64.0 + 256.0, 0.0]
    assert segments.largest(values).tolist() == [4.0, 16.0, 0.0]


@pytest.mark.parametrize("columns", [16, 128, 144, 1024])
def test_uniform_roundings_stay_below_one_in_every_block(columns: int) -> None:
    exact = normal(64, columns)
    found = columns_ratios(residuals(exact).rows(torch.arange(64)), (64, columns))
    assert found.shape == (64, -(-columns // 128))
    assert 0.1 < float(found.max()) < 1


def test_a_rounding_that_truncates_is_outside_by_norm_and_by_direction() -> None:
    exact = normal(4096)
    down = exact - torch.sign(exact) * half_spacing(exact, BFLOAT16)  # the nearest to this is the truncation of `exact`
    cut = residuals(exact, down)
    assert float(norm_ratios(cut, whole(cut))) > 1
    sums = case_sums(cut)
    assert float(sums["away"].ratios(1)) > 1
    assert float(sums["gain"].ratios(1)) > 1


@pytest.mark.parametrize("way", [1.0, -1.0])
def test_a_shift_is_outside_upward_and_not_along_the_sign(way: float) -> None:
    exact = normal(8192)
    shifted = residuals(exact, exact + way * half_spacing(exact, BFLOAT16) / 8)
    sums = case_sums(shifted)
    assert float(sums["upward"].ratios(1)) > 1
    assert float(sums["away"].ratios(1)) < 1


def test_slack_is_allowed_to_lean_as_far_as_it_reaches() -> None:
    exact = 1 + normal(8192).abs().frac()  # one binade
    slack = float(half_spacing(exact, BFLOAT16)[0]) / 64
    for way in (slack, -slack):
        honest = residuals(exact, exact + way, slack)
        assert all(float(of.ratios(1)) <= 1 for of in case_sums(honest).values())
        beyond = residuals(exact, exact + 4 * way, slack)
        assert float(case_sums(beyond)["upward"].ratios(1)) > 1


def test_references_between_two_numbers_may_all_go_one_way() -> None:
    """A grid whose every element is a tie: any slack moves all of them by a whole spacing, the same way."""
    step = 2.0**-7
    exact = 1 + step * (torch.arange(64, dtype=torch.float64) + 0.5)
    tiny = step * 2.0**-20
    for way in (tiny, -tiny):
        tied = residuals(exact, exact + way, 2 * tiny)
        assert all(float(of.ratios(1)) <= 1 for of in case_sums(tied).values())
        assert float(norm_ratios(tied, whole(tied))) <= 1


def test_tokens_that_are_equal_count_once() -> None:
    one = normal(1, 128)
    equal = residuals(one.expand(64, -1).contiguous())
    flat = equal.rows(torch.arange(64))
    assert float(norm_ratios(flat, whole(flat))) < 1
    direction = torch.sign(flat.reference)
    assert float(directed_sums(flat, whole(flat), direction).variance) == pytest.approx(
        64**2 * float(flat.half[:128].square().sum())
    )


def test_outputs_below_the_smallest_number_are_lost_without_a_lean() -> None:
    quiet = torch.full((256,), 2.0**-26, dtype=torch.float64)
    lost = Residuals.of(-quiet, quiet, torch.zeros_like(quiet), FLOAT16)
    assert all(float(of.ratios(1)) == 0 for of in case_sums(lost).values())


# -- in a judgement --


def test_an_honest_output_has_every_statistic_and_its_sums() -> None:
    setting = Setting("v1:M=8")
    t = setting.tensors
    judgement = judge(setting.trace, TorchExperts(t.config, t.quant, t.weights).apply(*setting.call[1:]), FP32)
    assert judgement.passed
    assert {"columns", "expert", "expert_gain", "bias"} <= set(judgement.statistics)
    assert all(type(value) is float for value in judgement.sums.values())
    assert set(pooled([judgement])) == {"gain", "away", "upward"}
    assert max(pooled([judgement]).values()) < 1


def test_a_noisy_block_of_columns_does_not_drown_in_its_token() -> None:
    setting = Setting("v1:M=2,H=4096,I=128")
    noise = torch.zeros_like(setting.half)
    noise[1, 1024:1152] = setting.half[1, 1024:1152] * 0.95 * torch.sign(normal(128))
    judgement = setting.judged(noise)
    assert failed(judgement) == {"columns"}
    assert judgement.worst is not None
    assert judgement.worst.token == 1
    assert setting.judged(torch.zeros_like(noise)).passed


def test_an_expert_with_few_tokens_does_not_drown() -> None:
    """Its results are scaled by 4e-4: too little for the gain of a token, or of all tokens."""
    setting = Setting("v1:k=1,H=512,I=128,M=64")
    ids = setting.trace.problem.topk_ids[:, 0]
    expert = int(ids.bincount(minlength=8).argmin())
    mine = (ids == expert)[:, None]
    judgement = setting.judged(torch.where(mine, setting.trace.smooth / 2500, 0.0))
    assert "expert_gain" in failed(judgement)
    assert failed(judgement) <= {"expert_gain", "bias"}
    assert max(judgement.per_expert, key=lambda one: judgement.per_expert[one]) == expert


def test_an_output_that_leans_is_told() -> None:
    setting = Setting("v1:M=32")
    judgement = setting.judged(setting.half / 16)
    assert failed(judgement) == {"bias"}
    assert "lean to one side" in judgement.reason


def test_what_no_case_shows_many_together_do() -> None:
    """Small cases, an error of a sixteenth of half a spacing, along the sign or upward; honest outputs stay below."""
    honest, outward, upward = [], [], []
    for seed in range(30):
        setting = Setting(f"v1:M=2,H=128,I=128,seed={seed}")
        small = setting.half / 16
        honest.append(setting.judged(torch.zeros_like(small)))
        outward.append(setting.judged(small * torch.sign(setting.trace.smooth)))
        upward.append(setting.judged(small))
    assert all(judgement.passed for judgement in honest + outward + upward)
    assert max(pooled(honest).values()) < 1
    assert pooled(outward)["away"] > 1 > pooled(outward)["upward"]
    assert pooled(upward)["upward"] > 1 > pooled(upward)["away"]
    assert pooled([judgement.sums for judgement in upward]) == pooled(upward)


def test_nothing_to_pool_is_no_error() -> None:
    assert pooled([]) == {"gain": 0.0, "away": 0.0, "upward": 0.0}
    assert pooled([{}, {}]) == pooled([])
