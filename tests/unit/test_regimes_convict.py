"""Each of the regimes that were made for a fault convicts it, where independent and alike values hardly do."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from conformance.bounds import judge
from conformance.build import build
from conformance.cases import Case
from fp8moe.backends.torch_experts import TorchExperts
from fp8moe.config import FusedMoEConfig
from fp8moe.experts import MoEWeights
from fp8moe.keys import GroupShape
from fp8moe.quant import FusedMoEQuantConfig, FusedMoEQuantDesc
from fp8moe.recipe import FP32, Arithmetic, Recipe
from fp8moe.reference.recipe import recipe_moe
from tests.unit.honest_experts import exponents, powers, to_fp8

pytestmark = pytest.mark.usefixtures("one_thread")

PLAIN = Recipe()
POWERS_OF_TWO = Recipe(scale_rounding="power_of_two")
SEEDS = range(4)


class QuietScalesOff(TorchExperts):
    """Block scales below 1/128 of the largest are 5% too large, as in a format of too few exponents."""

    def __init__(self, config: FusedMoEConfig, quant: FusedMoEQuantConfig, weights: MoEWeights) -> None:
        scale = weights.w13_scale
        assert scale is not None
        off = torch.where(scale < scale.amax() / 128, scale * 1.05, scale)
        super().__init__(config, quant, replace(weights, w13_scale=off))


class HalfAwayFromZero(TorchExperts):
    """The first quantisation rounds ties away from zero; everything else as it should."""

    def quantize_input(self, tokens: Tensor, expert: Tensor | None) -> Tensor:
        group = self.quant.a1.shape
        width = 128 if group is not None and group.is_per_group() else tokens.numel()
        parts = tokens.float().reshape(-1, width)
        scale = parts.abs().amax(-1, keepdim=True).clamp(min=self.recipe.amax_floor) / 448
        quotient = (parts / scale).double()
        step = powers(exponents(quotient).clamp(min=-6) - 3)
        codes = torch.sign(quotient) * torch.floor(quotient.abs() / step + 0.5) * step
        return (codes.float() * scale).view(tokens.shape)


class LimitOf240(TorchExperts):
    """The intermediate's power-of-two scales are those of a format that ends at 240."""

    def requantize(self, intermediate: Tensor, expert: Tensor) -> Tensor:
        parts = intermediate.reshape(len(intermediate), -1, 128)
        needed = parts.abs().amax(-1, keepdim=True).clamp(min=self.recipe.amax_floor).double() / 240
        power = powers(exponents(needed))
        scale = torch.where(power < needed, 2 * power, power).float()
        return (to_fp8(parts / scale) * scale).flatten(1)


class PerTokenInstead(TorchExperts):
    """The intermediate has one scale a token instead of one a group."""

    def requantize(self, intermediate: Tensor, expert: Tensor) -> Tensor:
        desc = FusedMoEQuantDesc(self.quant.a2.dtype, GroupShape.PER_TOKEN, False)
        return self.through_fp8(intermediate, desc, None, None)


class EarlySaturation(TorchExperts):
    """Inputs stop at the code before the largest, 416 of 448."""

    def quantize_input(self, tokens: Tensor, expert: Tensor | None) -> Tensor:
        exact = super().quantize_input(tokens, expert)
        largest = exact.abs().amax() * (416 / 448)
        return exact.clamp(-largest, largest)


def tokens_convicted(
    fault: type[TorchExperts], text: str, recipe: Recipe = PLAIN, arithmetic: Arithmetic | None = FP32
) -> float:
    """Share of a case's tokens, over some seeds. Honest outputs pass."""
    shares = []
    for seed in SEEDS:
        t = build(Case.parse(f"{text},seed={seed}"))
        call = (t.weights, t.hidden_states, t.topk_weights, t.topk_ids)
        trace = recipe_moe(t.config, t.quant, recipe, *call)
        honest, faulty = (
            cls.with_recipe(recipe)(t.config, t.quant, t.weights).apply(*call[1:]) for cls in (TorchExperts, fault)
        )
        judgement = judge(trace, honest, arithmetic)
        assert judgement.passed, judgement.reason
        shares.append(float((judge(trace, faulty, arithmetic).per_token > 1).double().mean()))
    return sum(shares) / len(shares)


def test_quiet_blocks_cannot_hide_where_they_are_alone() -> None:
    """Three of ten binades of scales are off: in half of the tokens gate, up or both; equal scales have none."""
    for arithmetic, share in ((FP32, 3 / 4), (None, 2 / 5)):
        assert tokens_convicted(QuietScalesOff, "v1:M=8,H=512,I=128,values=iid", arithmetic=arithmetic) == 0
        alone = tokens_convicted(QuietScalesOff, "v1:M=8,H=512,I=128,values=single_block", arithmetic=arithmetic)
        assert alone > share


def test_ties_tell_rounding_modes_apart() -> None:
    """bf16 inputs have ties of their own, in groups whose amax is 7 times a number of few bits, so in some tokens."""
    assert tokens_convicted(HalfAwayFromZero, "v1:M=8,values=ties") == 1
    assert tokens_convicted(HalfAwayFromZero, "v1:M=8,values=iid") < 1 / 2
    assert tokens_convicted(HalfAwayFromZero, "v1:M=8,values=ties,scheme=tensor_dyn") == 1
    assert tokens_convicted(HalfAwayFromZero, "v1:M=8,values=iid,scheme=tensor_dyn") < 1 / 2


@pytest.mark.parametrize("fault", [LimitOf240, PerTokenInstead])
def test_wide_groups_show_limits_and_granularity_under_powers_of_two(fault: type[TorchExperts]) -> None:
    assert tokens_convicted(fault, "v1:M=8,values=wide_groups", POWERS_OF_TWO) > 0.9
    assert tokens_convicted(fault, "v1:M=8,values=iid", POWERS_OF_TWO) == 0


def test_values_at_the_limit_show_early_saturation_in_every_token() -> None:
    """Under one scale for all tokens the loudest alone shows it elsewhere."""
    for scheme in ("tensor_dyn", "tensor_static"):
        assert tokens_convicted(EarlySaturation, f"v1:M=16,scheme={scheme},values=near_limit") == 1
        assert tokens_convicted(EarlySaturation, f"v1:M=16,scheme={scheme},values=iid") <= 2 / 16
