"""The paired gate on scripted samplers: each outcome, each reason, fresh pairs, the budget."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from conformance.gate.paired import judge_paired
from conformance.gate.policy import DEFAULT
from conformance.gate.samples import Flag, Samples
from conformance.gate.verdicts import Mode, Outcome, Reason
from tests.unit.gate_samplers import ScriptedPairs

CELLS = tuple(f"cell {index}" for index in range(30))


def only(name: str, log_ratio: float):
    return lambda cell, call: log_ratio if cell == name else 0.0


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize(
    ("log_ratio", "outcome"), [(0.02, Outcome.SLOWER), (-0.02, Outcome.FASTER), (0.0, Outcome.SAME)]
)
def test_a_planted_change_is_told_and_nothing_else_is(processes: int, log_ratio: float, outcome: Outcome) -> None:
    verdict = judge_paired(CELLS, ScriptedPairs(only("cell 7", log_ratio), processes=processes))
    assert [cell.outcome for cell in verdict.cells] == [outcome if name == "cell 7" else Outcome.SAME for name in CELLS]
    cell = verdict.cells[7]
    assert cell.low < cell.ratio < cell.high
    assert cell.low < np.exp(log_ratio) < cell.high
    assert cell.margin == DEFAULT.margin(processes)
    assert verdict.mode is (Mode.ONE_PROCESS if processes == 1 else Mode.TWO_PROCESSES)


def test_a_suspect_is_judged_by_fresh_pairs_alone() -> None:
    """Slow for as long as the screen lasts, and never again."""
    sampler = ScriptedPairs(lambda cell, call: 0.05 if cell == "cell 3" and call < 2 else 0.0)
    verdict = judge_paired(CELLS, sampler)
    assert verdict.cells[3].outcome is Outcome.SAME
    assert verdict.cells[3].stage == "confirm"
    assert {cell.stage for cell in verdict.cells if cell.cell != "cell 3"} == {"screen"}


def test_only_suspects_are_measured_again() -> None:
    sampler = ScriptedPairs(only("cell 3", 0.05))
    judge_paired(CELLS, sampler)
    assert {cell for cell, count in sampler.calls[2 * len(CELLS) :]} == {"cell 3"}
    assert all(count % 2 == 0 for _, count in sampler.calls)


def test_slower_by_less_than_the_margin_is_not_slower() -> None:
    """0.5% is above the margin of one process and below that of two; the screen clears nothing of that size here."""
    policy, slower = replace(DEFAULT, cleared=0.003), only("cell 0", 0.005)
    two = judge_paired(CELLS, ScriptedPairs(slower, processes=2), policy).cells[0]
    one = judge_paired(CELLS, ScriptedPairs(slower), policy).cells[0]
    assert (two.outcome, two.stage) == (Outcome.SAME, "confirm")
    assert (one.outcome, one.stage) == (Outcome.SLOWER, "confirm")


def test_wide_noise_is_inconclusive_and_says_so() -> None:
    verdict = judge_paired(["a"], ScriptedPairs(only("a", 0.01), noise=0.2))
    assert (verdict.cells[0].outcome, verdict.cells[0].reason) == (Outcome.INCONCLUSIVE, Reason.NOISE)
    assert verdict.cells[0].pairs > DEFAULT.most_pairs, "looked again before it gave up"
    assert "noise too wide" in str(verdict.cells[0])


@pytest.mark.parametrize(
    ("flag", "reason"),
    [(Flag.THROTTLED, Reason.THROTTLED), (Flag.CLOCKS_CHANGED, Reason.CLOCKS), (Flag.SHARED, Reason.SHARED)],
)
def test_a_cell_that_is_always_disturbed_is_inconclusive_with_the_reason(flag: Flag, reason: Reason) -> None:
    def flags(cell: str, call: int, count: int) -> np.ndarray:
        return np.full(count, flag if cell == "b" else 0, np.uint8)

    sampler = ScriptedPairs(only("b", 0.5), flags=flags)
    verdict = judge_paired(["a", "b", "c"], sampler)
    assert [cell.outcome for cell in verdict.cells] == [Outcome.SAME, Outcome.INCONCLUSIVE, Outcome.SAME]
    found = verdict.cells[1]
    assert found.reason is reason
    assert np.isnan(found.ratio)
    assert found.dropped == sum(count for cell, count in sampler.calls if cell == "b")
    assert found.pairs == 0


def test_heat_that_passes_costs_nothing_but_time() -> None:
    """Throttled throughout its turn, and well at the end of the screen."""

    def flags(cell: str, call: int, count: int) -> np.ndarray:
        return np.full(count, Flag.THROTTLED if cell == "a" and call < 3 else 0, np.uint8)

    verdict = judge_paired(["a", "b"], ScriptedPairs(only("a", 0.03), flags=flags))
    assert [cell.outcome for cell in verdict.cells] == [Outcome.SLOWER, Outcome.SAME]
    assert verdict.cells[0].dropped > 0


def test_some_invalid_pairs_are_dropped_and_counted() -> None:
    """The invalid ones are absurd: if any counted, the verdict would be another."""

    class Absurd(ScriptedPairs):
        def pairs(self, cell: str, count: int) -> Samples:
            given = super().pairs(cell, count)
            return replace(given, b_us=np.where(given.flags > 0, 10 * given.b_us, given.b_us))

    def flags(cell: str, call: int, count: int) -> np.ndarray:
        return np.where(np.arange(count) % 10 == 9, Flag.THROTTLED, 0).astype(np.uint8)

    verdict = judge_paired(CELLS, Absurd(only("", 0.0), flags=flags))
    assert {cell.outcome for cell in verdict.cells} == {Outcome.SAME}
    assert all(cell.dropped > 0 for cell in verdict.cells)


def test_the_budget_is_kept_and_what_it_ends_is_inconclusive() -> None:
    policy = replace(DEFAULT, budget_us=2e6)
    verdict = judge_paired(CELLS, ScriptedPairs(only("cell 29", 0.1), pair_us=10e3), policy)
    assert verdict.spent_us <= policy.budget_us + 10e3, "a pair more: what a request costs is known from the mean"
    ended = [cell for cell in verdict.cells if cell.reason is Reason.BUDGET]
    assert ended
    assert verdict.cells[29] in ended
    assert {cell.outcome for cell in verdict.cells if cell not in ended} == {Outcome.SAME}


def test_a_budget_that_ends_before_the_fresh_pairs_accuses_nobody() -> None:
    """Enough for the screen of both, the fewest pairs of 10 ms, and no more."""
    policy = replace(DEFAULT, budget_us=2 * DEFAULT.least_pairs * 10e3 + 50e3)
    verdict = judge_paired(["a", "b"], ScriptedPairs(only("a", 0.1), pair_us=10e3), policy)
    assert (verdict.cells[0].outcome, verdict.cells[0].reason) == (Outcome.INCONCLUSIVE, Reason.BUDGET)
    assert verdict.cells[0].stage == "screen"
    assert verdict.cells[0].ratio > 1.05, "what the screen saw is told all the same"


def test_a_sampler_that_has_no_more_leaves_the_cell_inconclusive() -> None:
    class Short(ScriptedPairs):
        def pairs(self, cell: str, count: int) -> Samples:
            return super().pairs(cell, 2 if cell == "a" else count)

    class Empty(ScriptedPairs):
        def pairs(self, cell: str, count: int) -> Samples:
            nothing = np.empty(0)
            return super().pairs(cell, count) if cell != "a" else Samples(nothing, nothing, nothing.astype(np.uint8))

    for sampler in (Short(only("", 0.0)), Empty(only("", 0.0))):
        verdict = judge_paired(["a", "b"], sampler)
        assert [cell.reason for cell in verdict.cells] == [Reason.NO_SAMPLES, None]


def test_a_sampler_that_gives_more_than_asked_is_an_error() -> None:
    class Generous(ScriptedPairs):
        def pairs(self, cell: str, count: int) -> Samples:
            return super().pairs(cell, count + 2)

    with pytest.raises(ValueError, match=r"pairs\('a', 2\): at most 2 pairs, not 4"):
        judge_paired(["a"], Generous(only("", 0.0)))


def test_what_a_sampler_raises_is_no_verdict() -> None:
    class Broken(ScriptedPairs):
        def pairs(self, cell: str, count: int) -> Samples:
            raise RuntimeError("device lost")

    with pytest.raises(RuntimeError, match="device lost"):
        judge_paired(["a"], Broken(only("", 0.0)))


def test_equal_samples_have_equal_verdicts() -> None:
    first, second = (judge_paired(CELLS, ScriptedPairs(only("cell 1", 0.02))) for _ in range(2))
    assert first == second


def test_a_run_can_be_read_and_stored() -> None:
    def flags(cell: str, call: int, count: int) -> np.ndarray:
        return np.full(count, Flag.SHARED if cell == "b" else 0, np.uint8)

    verdict = judge_paired(["a", "b", "c"], ScriptedPairs(only("a", 0.02), flags=flags))
    first, slower, shared = verdict.lines()
    assert first.startswith("paired, one process: 1 slower, 0 faster, 1 same, 1 inconclusive; ")
    assert slower.startswith("a: slower, ratio 1.0")
    assert "margin 0.20%" in slower
    assert shared.startswith("b: inconclusive (GPU shared with other work), ")
    stored = verdict.as_json()
    assert stored["cells"][0]["outcome"] == "slower"
    assert stored["cells"][1] | {"dropped": 0} == {
        "cell": "b", "outcome": "inconclusive", "ratio": None, "low": None, "high": None, "level": DEFAULT.same_level,
        "margin": DEFAULT.margin_one_process, "pairs": 0, "dropped": 0, "stage": "screen",
        "reason": "GPU shared with other work",
    }  # fmt: skip
