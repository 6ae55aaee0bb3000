"""The regret of the measured policy and of the seed's order: by hand, and on times carried over from two devices."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fp8moe import PLATFORMS
from fp8moe.measured import Fallback, LayerShape, PolicyRegret, Regrets, policy_regret
from fp8moe.measured.regret import layer_of
from fp8moe.measured.rows import key_of
from fp8moe.schemes import SCHEMES
from tests.unit.measured_tables import WITHOUT_FLASHINFER, carried_over, rows_of, table_of

SHAPE = LayerShape(8, 2, 4096, 14336, "block")
TOKENS = (1, 16, 256, 4096)


def regret(table: Any, **keywords: Any) -> PolicyRegret:
    usual = {"platform": WITHOUT_FLASHINFER, "env": {}, "allow_vllm_cutlass": True}
    return policy_regret(table, **usual | keywords)


def test_by_hand() -> None:
    times = {
        "DEEPGEMM": {1: 100.0, 10: 100.0, 100: 100.0},
        "TRITON": {1: 50.0, 10: 400.0, 100: 128.0},  # 80 on the line from 50 to 128, and 400 in truth
        "MARLIN": {1: 80.0, 10: 90.0, 100: 80.0},
    }
    found = regret(table_of(rows_of(SHAPE, times), ("DEEPGEMM", "TRITON")))
    first, middle, last = found.points
    assert (first.fallback, last.fallback) == (Fallback.TOKENS, Fallback.TOKENS)  # nothing to interpolate between
    assert (first.best, first.chosen, first.policy_regret, first.seed_regret) == ("TRITON", "DEEPGEMM", 1.0, 1.0)
    assert (middle.best, middle.best_us) == ("MARLIN", 90.0)  # uncertified, and the best all the same
    assert middle.fallback is None
    assert (middle.chosen, middle.policy_regret) == ("TRITON", 400.0 / 90.0 - 1)
    assert middle.seed == "DEEPGEMM"
    assert middle.seed_regret == 100.0 / 90.0 - 1
    assert found.policy(measured_only=True).count == 1
    whole = regret(table_of(rows_of(SHAPE, times)), leave_one_out=False)
    assert [point.chosen for point in whole.points] == ["TRITON", "MARLIN", "MARLIN"]
    assert whole.policy() == Regrets(3, 0.0, 0.0, 0.0)
    assert whole.seed().worst == 1.0


def test_a_choice_without_a_time_is_told_apart() -> None:
    times = {"TRITON": {1: 1.0, 16: 2.0, 256: 3.0}, "AITER": {4: 1.0}}
    found = regret(table_of(rows_of(SHAPE, times), ("TRITON",)))
    assert [(point.tokens, point.seed, point.seed_us) for point in found.points] == [
        (tokens, "DEEPGEMM", None) for tokens in (1, 16, 256)
    ]
    assert found.judged() == ()
    assert found.unjudged == ((SHAPE, 4),)  # AITER is not eligible here
    assert math.isnan(found.policy().median)


def test_order_statistics() -> None:
    assert Regrets.of([0.5]) == Regrets(1, 0.5, 0.5, 0.5)
    assert Regrets.of([value / 100 for value in range(101)]) == Regrets(101, 0.5, 0.95, 1.0)
    assert Regrets.of([0.0] * 19 + [1.0]) == Regrets(20, 0.0, 0.0, 1.0)
    assert str(Regrets.of([0.0, 0.5])) == "median 25.0%, p95 50.0%, max 50.0% over 2"


COLUMN = st.fixed_dictionaries({tokens: st.floats(1.0, 1e6) for tokens in TOKENS})


@settings(max_examples=30, deadline=None)
@given(st.fixed_dictionaries(dict.fromkeys(("TRITON", "DEEPGEMM", "MARLIN"), COLUMN)))
def test_with_every_row_there_is_no_regret(times: dict[str, dict[int, float]]) -> None:
    found = regret(table_of(rows_of(SHAPE, times)), leave_one_out=False)
    assert len(found.judged(measured_only=True)) == len(TOKENS)
    assert found.policy().worst == 0
    assert found.seed().median >= 0


LAW = st.tuples(st.integers(0, 9).map(lambda power: 2.0**power), st.sampled_from((0, 1)))
"""(a, b) of a time a * tokens ** b. The tokens are powers of 16, so two times are equal or a factor of 2 apart, and
rounding cannot make them change places."""


@settings(max_examples=30, deadline=None)
@given(st.fixed_dictionaries(dict.fromkeys(("TRITON", "DEEPGEMM", "MARLIN"), LAW)))
def test_powers_of_the_tokens_are_interpolated_without_regret(laws: dict[str, tuple[float, int]]) -> None:
    times = {name: {tokens: scale * tokens**power for tokens in TOKENS} for name, (scale, power) in laws.items()}
    found = regret(table_of(rows_of(SHAPE, times)))
    assert [point.tokens for point in found.judged(measured_only=True)] == list(TOKENS[1:-1])
    assert found.policy(measured_only=True).worst == 0


@pytest.mark.parametrize("layout", ["standard", "batched"])
@pytest.mark.parametrize("activation", ["silu", "relu2_no_mul"])
def test_the_layer_of_a_shape_has_that_shape(layout: str, activation: str) -> None:
    for experts, top_k in ((1, 8), (32, 8), (256, 1)):
        for scheme in SCHEMES:
            shape = LayerShape(experts, top_k, 7168, 2048, scheme, activation, layout)
            assert key_of(layer_of(shape), *SCHEMES[scheme]) == shape.key


# -- the carried-over times --


@pytest.mark.parametrize("device", ["h100", "h200"])
def test_carried_over_times_with_every_row(device: str) -> None:
    found = regret(carried_over(device), leave_one_out=False)
    assert found.unjudged == ()
    assert all(point.fallback is None for point in found.points)
    assert found.policy().worst == 0
    assert found.seed().median > 0


@pytest.mark.parametrize("device", ["h100", "h200"])
def test_carried_over_times_with_one_left_out(device: str) -> None:
    """Where interpolation decides it loses far less than the seed's order at the same points."""
    found = regret(carried_over(device))
    policy, seed = found.policy(measured_only=True), found.seed(measured_only=True)
    assert policy.count == seed.count > 0
    assert (policy.median, policy.p95 < seed.p95, policy.worst < seed.worst) == (0, True, True)
    ends = [point for point in found.points if point.fallback is not None]
    assert {point.fallback for point in ends} == {Fallback.TOKENS}
    assert all(point.chosen == point.seed for point in ends)
    assert found.policy().median <= found.seed().median


def test_a_table_of_another_device_is_the_seeds_order() -> None:
    found = regret(carried_over("h100"), platform=PLATFORMS["b200"].with_libraries("deep_gemm", "vllm"))
    assert {point.fallback for point in found.points} == {Fallback.DEVICE}
    assert found.policy() == found.seed()
