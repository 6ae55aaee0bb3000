"""A backend whose kernel depends on the number of tokens, and with it what it promises."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from torch import Tensor

from conformance import check_backend
from conformance.cases import Case
from conformance.checks import check_case
from conformance.plan import Subject, Target
from conformance.results import Status
from conformance.trial import beyond_limits
from fp8moe import PLATFORMS, Contract, FusedMoEActivationFormat, Recipe, Support
from fp8moe.backends.torch_experts import TorchExperts
from fp8moe.schemes import BLOCK

HERE = Target("cpu", PLATFORMS["cpu"], "cpu")
LIMIT = 8
MANY = Recipe(gemm1_output="input", gemm2_output="input", scale_rounding="power_of_two")
FEW = Recipe()


class Composite(TorchExperts):
    """Other roundings from `LIMIT` tokens on."""

    contract = Contract(MANY, fewer=(LIMIT, Contract(FEW)))
    turns_at = LIMIT
    support = Support(
        device=lambda platform, env: True,
        needs="nothing",
        scheme=lambda platform, weight_key, activation_key: (weight_key, activation_key) == BLOCK,
        activations=frozenset({"silu"}),
        activation_format=FusedMoEActivationFormat.Standard,
    )

    def apply(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        recipe = FEW if len(hidden_states) < self.turns_at else MANY
        found: Tensor = TorchExperts.with_recipe(recipe)(self.config, self.quant, self.weights).apply(
            hidden_states, *args, **kwargs
        )
        return found


class TurnsLate(Composite):
    turns_at = LIMIT + 1


class TurnsEarly(Composite):
    turns_at = LIMIT - 1


def status(cls: type[TorchExperts], tokens: int) -> Status:
    case = Case(tokens=tokens, experts=4, hidden=128, inter=128, values="block_scales", seed=1)
    return check_case(case, Subject(cls.__name__, cls, cls.__name__), HERE).status


@pytest.mark.parametrize("tokens", [1, LIMIT - 1, LIMIT, LIMIT + 1, 40])
def test_what_holds_is_what_the_number_of_tokens_says(tokens: int) -> None:
    assert status(Composite, tokens) is Status.PASSED


def test_another_turn_is_convicted() -> None:
    assert (status(TurnsLate, LIMIT), status(TurnsLate, LIMIT + 1)) == (Status.FAILED, Status.PASSED)
    assert (status(TurnsEarly, LIMIT - 1), status(TurnsEarly, LIMIT - 2)) == (Status.FAILED, Status.PASSED)


def test_calls_of_other_sizes_are_judged_by_their_own_contract() -> None:
    report = check_backend(Composite, level="smoke", device="cpu")
    assert report.verdict == "passed", [failure.reason for failure in report.failures]


def test_limits_are_those_of_the_number_of_tokens() -> None:
    contract = Contract(max_experts=64, fewer=(LIMIT, Contract(max_top_k=1)))
    few, many = (Case(tokens=tokens, experts=128, top_k=2) for tokens in (LIMIT - 1, LIMIT))
    assert beyond_limits(contract, few) == "top_k=2 is beyond the declared max_top_k=1"
    assert beyond_limits(contract, many) == "experts=128 is beyond the declared max_experts=64"


def test_for_tokens() -> None:
    few = Contract(FEW, deterministic=True)
    whole = Contract(MANY, fewer=(LIMIT, few))
    assert whole.for_tokens(LIMIT - 1) is few
    assert whole.for_tokens(LIMIT) == replace(whole, fewer=None)
    assert few.for_tokens(1) is few


@pytest.mark.parametrize(
    ("fewer", "why"),
    [
        ((0, Contract()), "fewer=0 tokens: expected an integer of at least 1"),
        ((True, Contract()), "fewer=True tokens"),
        ((4, Recipe()), "expected a Contract that has no `fewer`"),
        ((4, Contract(fewer=(2, Contract()))), "expected a Contract that has no `fewer`"),
    ],
)
def test_nonsense_is_refused(fewer: Any, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        Contract(fewer=fewer)
