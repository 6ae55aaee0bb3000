"""The gate's statistics: quantiles as in printed tables, intervals as wide as they must be, Holm's procedure."""

from __future__ import annotations

import math

import numpy as np
import pytest

from conformance.gate.families import beyond, checked_names, mirrored
from conformance.gate.interval import (
    LEAST_PAIRS,
    MOST_BATCHES,
    TIMER_US,
    Estimate,
    block_length,
    estimate,
    interquartile_mean,
    resampled,
    timer_floor,
)
from conformance.gate.policy import DEFAULT, Policy
from conformance.gate.student import normal_quantile, quantile, tail
from tests.unit.gate_samplers import most_expected

RESAMPLES, SEED = DEFAULT.resamples, DEFAULT.seed


@pytest.mark.parametrize(
    ("level", "freedom", "printed"),
    [
        (0.05, 1, "6.314"), (0.025, 1, "12.706"), (0.025, 2, "4.303"), (0.025, 7, "2.365"), (0.01, 10, "2.764"),
        (0.005, 15, "2.947"), (0.0005, 30, "3.646"), (0.001, 5, "5.893"), (0.1, 120, "1.289"),
    ],
)  # fmt: skip
def test_students_quantiles_are_those_of_the_tables(level: float, freedom: int, printed: str) -> None:
    assert f"{quantile(level, freedom):.3f}" == printed


def test_a_quantile_is_exceeded_with_its_probability() -> None:
    draws = np.random.default_rng(0).standard_t(7, size=20_000)
    for level in (0.05, 0.01, 0.001):
        beyond_it = int((draws > quantile(level, 7)).sum())
        assert beyond_it <= most_expected(len(draws), level)
        assert len(draws) - beyond_it <= most_expected(len(draws), 1 - level)


def test_students_t_tends_to_the_normal_and_is_wider() -> None:
    assert f"{normal_quantile(0.025):.4f}" == "1.9600"
    assert quantile(0.01, 7) > quantile(0.01, 15) > quantile(0.01, 1000) > normal_quantile(0.01)
    assert tail(0.0, 7) == 0.5
    assert quantile(0.5, 7) < 1e-9


def test_quantiles_refuse_what_is_none() -> None:
    with pytest.raises(ValueError, match=r"level: a probability above 0 and at most 0\.5, not 0\.7"):
        quantile(0.7, 5)
    with pytest.raises(ValueError, match="freedom: at least 1, not 0"):
        quantile(0.1, 0)


def test_the_interquartile_mean_does_not_see_a_quarter_at_either_end() -> None:
    values = np.array([1e9, 4.0, 2.0, 3.0, 1.0, -1e9, 2.0, 4.0])
    assert interquartile_mean(values) == np.mean([2.0, 2.0, 3.0, 4.0])
    assert interquartile_mean(np.stack([values, values + 1])).tolist() == [2.75, 3.75]


@pytest.mark.parametrize("pairs", [*range(LEAST_PAIRS, 200, 2), 384, 1000])
def test_blocks_have_both_orders_and_there_are_enough(pairs: int) -> None:
    length = block_length(pairs)
    assert length % 2 == 0
    assert MOST_BATCHES // 2 <= pairs // length <= MOST_BATCHES
    indices = resampled(pairs, 200, 0)
    assert indices.shape == (200, pairs // length * length)
    assert (indices[:, ::length] % 2 == 0).all()
    blocks = indices.reshape(200, -1, length)
    assert ((np.diff(blocks, axis=-1) % pairs) == 1).all()


def normal(rng: np.random.Generator, n: int) -> np.ndarray:
    return rng.normal(size=n)


def heavy(rng: np.random.Generator, n: int) -> np.ndarray:
    return rng.standard_t(3, size=n)


def bimodal(rng: np.random.Generator, n: int) -> np.ndarray:
    return rng.normal(size=n) + 10.0 * rng.choice([-1, 1], n) * (rng.random(n) < 0.2)


@pytest.mark.parametrize("draw", [normal, heavy, bimodal])
@pytest.mark.parametrize("pairs", [16, 24, 96])
def test_limits_are_wrong_no_more_often_than_they_say(draw, pairs: int) -> None:
    rng, runs = np.random.default_rng([pairs, 1]), 1500
    found = [estimate(draw(rng, pairs), 0.0, 400, SEED) for _ in range(runs)]
    for level in (0.025, 0.01):
        assert sum(of.low(level) > 0 for of in found) <= most_expected(runs, level)
        assert sum(of.high(level) < 0 for of in found) <= most_expected(runs, level)


def test_limits_are_not_so_wide_that_they_say_nothing() -> None:
    """On normal noise within a third of the width of the exact interval of a mean, which is the narrowest there is."""
    rng, pairs, runs = np.random.default_rng(2), 96, 300
    widths = [of.high(0.01) - of.low(0.01) for of in (estimate(normal(rng, pairs), 0.0, 400, 0) for _ in range(runs))]
    assert np.median(widths) < 4 / 3 * 2 * quantile(0.01, pairs - 1) / np.sqrt(pairs)


def test_blocks_cover_noise_that_follows_itself() -> None:
    """With single pairs for blocks, an autoregression of 0.5 would make limits wrong more than four times as often."""
    rng, pairs, runs = np.random.default_rng(3), 96, 1500
    wrong = 0
    for _ in range(runs):
        fresh = rng.normal(size=pairs + 30)
        wrong += estimate(np.convolve(fresh, 0.5 ** np.arange(30))[30 : 30 + pairs], 0.0, 400, 0).low(0.025) > 0
    assert wrong <= most_expected(runs, 2 * 0.025)


def test_an_estimate_depends_on_the_samples_alone_and_has_a_mirror() -> None:
    row = np.random.default_rng(4).normal(0.02, 0.003, 32)
    assert estimate(row, 0.0, RESAMPLES, SEED) == estimate(row.copy(), 0.0, RESAMPLES, SEED)
    there, back = estimate(row, 0.0, RESAMPLES, SEED), estimate(-row, 0.0, RESAMPLES, SEED)
    assert back.log_ratio == -there.log_ratio
    assert mirrored({"a": there})["a"].low(0.01) == -there.high(0.01)


def test_equal_readings_are_known_to_the_timers_step_only() -> None:
    floor = timer_floor(np.full(20, 200.0), np.full(20, 200.0))
    assert floor == math.sqrt(2 * (TIMER_US / 200.0) ** 2 / 12)
    assert estimate(np.zeros(20), floor, RESAMPLES, SEED).spread == floor


@pytest.mark.parametrize("pairs", [14, 17])
def test_too_few_pairs_and_half_couples_have_no_interval(pairs: int) -> None:
    with pytest.raises(ValueError, match=f"an even number of at least 16 log ratios, not {pairs}"):
        estimate(np.zeros(pairs), 0.0, RESAMPLES, SEED)


def test_holm_on_limits_is_holm_on_p_values() -> None:
    """The textbook's procedure: sort p-values, stop at the first above level / (k - rank)."""
    rng, level, margin = np.random.default_rng(5), 0.05, 0.001
    rejections = 0
    for _ in range(300):
        cells = {f"c{i}": Estimate(rng.choice([0.0, 0.006]) + rng.normal(0, 0.002), 0.002, 9) for i in range(6)}
        p_values = sorted(
            (tail(t, 9) if t >= 0 else 1 - tail(-t, 9), name)
            for name, of in cells.items()
            for t in [(of.log_ratio - margin) / of.spread]
        )
        expected = set()
        for rank, (p, name) in enumerate(p_values):
            if p >= level / (len(cells) + 2 - rank):
                break
            expected.add(name)
        assert set(beyond(cells, margin, level, len(cells) + 2)) == expected
        rejections += len(expected)
    assert rejections > 0


def test_holm_reports_each_cells_own_level() -> None:
    cells = {"far": Estimate(1.0, 0.01, 9), "near": Estimate(0.029, 0.01, 9), "not": Estimate(0.0, 0.01, 9)}
    assert quantile(0.02 / 3, 9) > 2.9 > quantile(0.02 / 2, 9), "near passes only once far is out of the family"
    assert beyond(cells, 0.0, 0.02, 3) == {"far": 0.02 / 3, "near": 0.02 / 2}


@pytest.mark.parametrize(("cells", "told"), [((), "not none"), (("a", "b", "a"), r"not \['a'\] twice")])
def test_a_family_has_each_cell_once(cells: tuple[str, ...], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        checked_names(cells)


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("alpha", 0.0, "between 0 and 1, not 0.0"),
        ("alpha", 0.7, "at most 0.5, not 0.7"),
        ("looks", (0.9, 0.2), "a sum of at most 1"),
        ("looks", (), "at least one"),
        ("cleared", 0.02, "at most the aim, not 0.02"),
        ("least_pairs", 25, "even, for both orders, not 25"),
        ("least_pairs", 8, "at least 16, not 8"),
        ("most_pairs", 14, "at least least_pairs, not 14"),
        ("budget_us", 0.0, "above 0, not 0.0"),
        ("resamples", 10, "at least 200"),
        ("margin_one_process", -0.1, "0 or more, not -0.1"),
        ("visits", 4, "16 rounds or more in all, not 4"),
    ],
)
def test_a_policy_says_what_is_wrong_with_it(field: str, value: object, told: str) -> None:
    with pytest.raises(ValueError, match=f"Policy.{field}: .*{told}"):
        Policy(**{field: value})


def test_the_margin_is_that_of_the_number_of_processes() -> None:
    assert DEFAULT.margin(1) < DEFAULT.margin(2) < DEFAULT.aim
    with pytest.raises(ValueError, match=r"processes: 1 .* or 2 .*, not 3"):
        DEFAULT.margin(3)
