"""What a judgement says: wrong forms, NaN and infinity, tokens without experts, where the worst mismatch is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from conformance.bounds import UNKNOWN, allowance_for, judge, judge_ideal
from conformance.bounds.decode import Decoded, decode_flips
from conformance.bounds.least_squares import BoxedFit
from conformance.bounds.statistics import element_ratio, gain_ratio, rounded_alike, token_norm_ratio
from conformance.build import build
from conformance.cases import Case
from fp8moe.backends.torch_experts import TorchExperts
from fp8moe.experts import MoEWeights
from fp8moe.recipe import FP32, Recipe
from fp8moe.reference.ideal import ideal_moe
from fp8moe.reference.recipe import RecipeTrace, recipe_moe
from fp8moe.reference.rounding import BFLOAT16, FLOAT16, round_to

pytestmark = pytest.mark.usefixtures("one_thread")


class Setting:
    """A small case with one token that has no expert, its oracles, and an honest output."""

    def __init__(self, text: str = "v1:M=8,H=256,I=128", weights: object = None, hidden: float = 1.0) -> None:
        tensors = build(Case.parse(text))
        self.ids = tensors.topk_ids.clone()
        self.ids[3] = -1
        self.weights: MoEWeights = tensors.weights if weights is None else weights(tensors.weights)  # type: ignore[operator]
        self.hidden = tensors.hidden_states * hidden
        self.call = (self.weights, self.hidden, tensors.topk_weights, self.ids)
        self.config, self.quant = tensors.config, tensors.quant
        self.output = TorchExperts(self.config, self.quant, self.weights).apply(*self.call[1:])

    def trace(self, tokens: torch.Tensor | None = None) -> RecipeTrace:
        return recipe_moe(self.config, self.quant, Recipe(), *self.call, tokens=tokens)

    def ideal(self) -> torch.Tensor:
        return ideal_moe(self.config, self.quant, *self.call)


@pytest.fixture(scope="module")
def setting(one_thread: None) -> Setting:
    return Setting()


def test_shape_and_dtype_are_reasons_of_their_own(setting: Setting) -> None:
    trace, ideal = setting.trace(), setting.ideal()
    for output, told in ((setting.output[:-1], "shape (7, 256)"), (setting.output.float(), "dtype torch.float32")):
        for judgement in (judge(trace, output, FP32), judge_ideal(ideal, output, trace)):
            assert not judgement.passed
            assert told in judgement.reason
            assert judgement.error_over_bound == float("inf")
            assert judgement.worst is None


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_rejected_first_and_named(setting: Setting, value: float) -> None:
    output = setting.output.clone()
    output[5, 200] = value
    trace = setting.trace()
    for judgement in (judge(trace, output, FP32), judge_ideal(setting.ideal(), output, trace)):
        assert not judgement.passed
        assert judgement.worst is not None
        assert (judgement.worst.token, judgement.worst.column, judgement.worst.columns) == (5, 200, (128, 255))
    assert judge(trace, output, FP32).statistics == {"finite": float("inf")}


def test_a_token_without_experts_is_exactly_zero(setting: Setting) -> None:
    trace = setting.trace()
    assert not trace.R[3].any()
    assert judge(trace, setting.output, FP32).passed
    output = setting.output.clone()
    output[3, 7] = 2.0**-133  # the smallest bf16
    judgement = judge(trace, output, FP32)
    assert not judgement.passed
    assert judgement.worst is not None
    assert (judgement.worst.token, judgement.worst.expert, judgement.worst.expected) == (3, None, 0.0)
    assert not judge_ideal(setting.ideal(), output, trace).passed


def test_the_worst_mismatch_names_token_expert_block_and_numbers(setting: Setting) -> None:
    slot, expert = 1, int(setting.ids[6, 1])
    scale = setting.weights.w2_scale.clone()  # type: ignore[union-attr]
    scale[expert] *= 1.2
    faulty = TorchExperts(setting.config, setting.quant, replace(setting.weights, w2_scale=scale))
    judgement = judge(setting.trace(), faulty.apply(*setting.call[1:]), FP32)
    routed = (setting.ids == expert).any(1)
    assert not judgement.passed
    assert judgement.worst is not None
    assert judgement.worst.expert == expert
    assert bool((judgement.per_token[routed] > 1).all() and (judgement.per_token[~routed] <= 1).all())
    assert max(judgement.per_expert, key=lambda one: judgement.per_expert[one]) in setting.ids[routed]
    assert judgement.per_expert[expert] == judgement.error_over_bound == judgement.worst.error_over_bound
    assert set(judgement.per_expert) == set(setting.ids[setting.ids >= 0].tolist())
    assert slot == 1
    assert f"expert {expert}" in str(judgement.worst)


def test_an_undeclared_arithmetic_is_told(setting: Setting) -> None:
    judgement = judge(setting.trace(), setting.output, None)
    assert judgement.passed
    assert "not declared" in judgement.reason
    assert str(UNKNOWN.fraction_bits) in judgement.reason
    assert judge(setting.trace(), setting.output, FP32).reason == ""


def test_flips_are_read_in_one_thread(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def recording(*given: Any) -> Decoded:
        seen.append(torch.get_num_threads())
        return decode_flips(*given)

    monkeypatch.setattr("conformance.bounds.judgement.decode_flips", recording)
    output = setting.output.clone()
    output[6] *= 1.01
    torch.set_num_threads(2)
    try:
        judge(setting.trace(), output, None)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert seen
    assert set(seen) == {1}


def test_a_sample_of_tokens_is_judged_by_its_rows(setting: Setting) -> None:
    tokens = torch.tensor([6, 0, 3])
    assert judge(setting.trace(tokens), setting.output[tokens], FP32).passed
    assert not judge(setting.trace(tokens), setting.output[tokens.flip(0)], FP32).passed


def test_no_tokens_at_all(setting: Setting) -> None:
    none = torch.zeros(0, dtype=torch.int64)
    trace = setting.trace(none)
    output, ideal = setting.output[:0], setting.ideal()[:0]
    for judgement in (judge(trace, output, FP32), judge_ideal(ideal, output, trace)):
        assert judgement.passed
        assert judgement.error_over_bound == 0


def test_an_overflow_of_the_format_is_shared_and_another_is_not() -> None:
    loud = Setting("v1:M=8,H=256,I=128,dtype=fp16", hidden=64.0)
    trace = loud.trace()
    overflowing = trace.R.abs() > FLOAT16.largest * 1.01
    if not bool(overflowing.any()):
        loud = Setting(
            "v1:M=8,H=256,I=128,dtype=fp16",
            lambda w: replace(w, w2_scale=w.w2_scale * (1e5 / float(trace.R.abs().max()))),
            hidden=64.0,
        )
        trace = loud.trace()
        overflowing = trace.R.abs() > FLOAT16.largest * 1.01
    assert bool(overflowing.any())
    assert bool(torch.isinf(loud.output[overflowing]).all())
    assert judge(trace, loud.output, FP32).passed
    wrong_sign = torch.where(overflowing, -loud.output, loud.output)
    assert not judge(trace, wrong_sign, FP32).passed


def test_allowances_are_kept_with_the_trace(setting: Setting) -> None:
    trace = setting.trace()
    assert allowance_for(trace, FP32) is allowance_for(trace, FP32)
    assert allowance_for(trace, None) is allowance_for(trace, UNKNOWN)
    assert bool((allowance_for(trace, None).total >= allowance_for(trace, FP32).total).all())


def test_ratios_of_rounded_outputs() -> None:
    generator = torch.Generator().manual_seed(0)
    exact = torch.randn(64, 2048, generator=generator, dtype=torch.float64)
    error, nothing = round_to(exact, BFLOAT16) - exact, torch.zeros_like(exact)
    assert 0.49 < float(element_ratio(error, exact, nothing, BFLOAT16).max()) <= 0.5
    assert float(token_norm_ratio(error, exact, nothing, BFLOAT16).max()) < 1
    assert float(gain_ratio(error, exact, nothing, BFLOAT16).max()) < 1
    assert float(gain_ratio(error + exact / 500, exact, nothing, BFLOAT16).min()) > 1
    step = 2.0 ** (torch.floor(torch.log2(exact.abs())) - 7)
    truncated = torch.sign(exact) * torch.floor(exact.abs() / step) * step - exact
    assert float(element_ratio(truncated, exact, nothing, BFLOAT16).max()) <= 1  # faithful
    assert float(token_norm_ratio(truncated, exact, nothing, BFLOAT16).min()) > 1  # but not to nearest


def test_outputs_with_one_mantissa_are_rounded_alike() -> None:
    exact = (1.003 * 2.0 ** torch.arange(-8.0, 8, dtype=torch.float64)).repeat(1, 8)
    error = round_to(exact, BFLOAT16) - exact
    nothing = torch.zeros_like(exact)
    assert rounded_alike(exact, torch.ones_like(exact)).max() == 128
    assert float(gain_ratio(error, exact, nothing, BFLOAT16)) < 1
    assert float(token_norm_ratio(error, exact, nothing, BFLOAT16)) < 1
    quiet = torch.full((1, 64), 2.0**-26, dtype=torch.float64)  # less than half of the smallest fp16
    assert float(gain_ratio(-quiet, quiet, torch.zeros_like(quiet), FLOAT16)) < 1


def test_a_boxed_fit_finds_the_moves_that_were_made() -> None:
    generator = torch.Generator().manual_seed(1)
    columns = torch.randn(256, 40, generator=generator, dtype=torch.float64)
    moves = (torch.rand(40, generator=generator) < 0.3).double()
    target = columns @ moves + 0.01 * torch.randn(256, generator=generator, dtype=torch.float64)
    low, high = torch.zeros(40, dtype=torch.float64), torch.ones(40, dtype=torch.float64)
    fit = BoxedFit(columns, target, low, high, lambda _, value: value.round().clamp(0, 1))
    precision = torch.full((256,), 1e4, dtype=torch.float64)
    assert torch.equal(fit.discrete(precision), moves)
    within = fit.within_box(precision)
    assert bool(((within >= low) & (within <= high)).all())
    limit = torch.full((256,), 0.05, dtype=torch.float64)
    tube = fit.into_tube(torch.zeros_like(low), limit)
    assert float(((target - columns @ tube) / limit).abs().max()) <= 1
    unreachable = BoxedFit(columns, target + 5, low, high, fit.admissible)
    assert float(((target + 5 - columns @ unreachable.into_tube(low, limit)) / limit).abs().max()) > 1
