"""The stored gate on scripted samplers: what cancels, what widens the interval, what is never compared."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest

from conformance.gate.policy import DEFAULT
from conformance.gate.record import Record, measure
from conformance.gate.samples import Flag, Rounds
from conformance.gate.stored import judge_stored, measured_margin, moved_apart
from conformance.gate.verdicts import Mode, Outcome, Reason
from tests.unit.gate_samplers import ScriptedRounds

NAMES = tuple(f"cell {index}" for index in range(30))
CELLS = dict.fromkeys(NAMES, 7.0)
YARDSTICKS = {"memory": 8.0, "compute": 7.5}


def record(
    cells: Mapping[str, float] = CELLS,
    yardsticks: Mapping[str, float] = YARDSTICKS,
    seed: int = 0,
    noise: float = 0.001,
    flag: int = 0,
    setting: Mapping[str, str] | None = None,
) -> Record:
    """A process whose cells and yardsticks have these log times."""
    return measure(
        cells, ScriptedRounds(cells, yardsticks, noise=noise, flag=flag, setting=setting, seed=seed), DEFAULT
    )


BEFORE = record(seed=1)


@pytest.mark.parametrize(
    ("change", "outcome"), [(0.05, Outcome.SLOWER), (-0.05, Outcome.FASTER), (0.0, Outcome.SAME), (0.008, Outcome.SAME)]
)
def test_a_change_beyond_the_margin_is_told_and_nothing_else_is(change: float, outcome: Outcome) -> None:
    verdict = judge_stored(record(CELLS | {"cell 4": 7.0 + change}), [BEFORE])
    assert [cell.outcome for cell in verdict.cells] == [outcome if name == "cell 4" else Outcome.SAME for name in NAMES]
    assert verdict.mode is Mode.STORED
    assert verdict.cells[4].low < math.exp(change) < verdict.cells[4].high
    assert verdict.cells[4].margin == DEFAULT.margin_stored


def test_what_slows_cells_and_yardsticks_alike_is_no_change() -> None:
    slower = {name: log_us + 0.3 for name, log_us in CELLS.items()}
    everything = {name: log_us + 0.3 for name, log_us in YARDSTICKS.items()}
    assert {cell.outcome for cell in judge_stored(record(slower, everything), [BEFORE]).cells} == {Outcome.SAME}


def test_yardsticks_that_move_apart_widen_every_interval() -> None:
    moved = 0.04
    here = record(yardsticks=YARDSTICKS | {"compute": 7.5 + moved}, seed=2)
    apart = moved_apart(here, [BEFORE])
    assert abs(apart - moved) < 2 * 0.001
    still = judge_stored(record(seed=2), [BEFORE]).cells[0]
    wider = judge_stored(here, [BEFORE]).cells[0]
    assert math.log(wider.high / wider.low) > math.log(still.high / still.low) + DEFAULT.follows_other * apart


def test_yardsticks_too_far_apart_leave_nothing_to_say() -> None:
    here = record(CELLS | {"cell 0": 7.2}, YARDSTICKS | {"compute": 7.6})
    verdict = judge_stored(here, [BEFORE])
    assert {(cell.outcome, cell.reason) for cell in verdict.cells} == {(Outcome.INCONCLUSIVE, Reason.CLOCKS)}


def test_wide_noise_is_inconclusive() -> None:
    verdict = judge_stored(record(noise=0.15), [BEFORE])
    assert {cell.reason for cell in verdict.cells} == {Reason.NOISE}


def test_cells_without_valid_rounds_have_the_reason() -> None:
    class Sometimes(ScriptedRounds):
        def rounds(self, cell: str, count: int) -> Rounds:
            given = super().rounds(cell, count)
            return replace(given, flags=np.full(count, Flag.THROTTLED, np.uint8)) if cell == "cell 2" else given

    here = measure(NAMES, Sometimes(CELLS, YARDSTICKS), DEFAULT)
    verdict = judge_stored(here, [BEFORE])
    assert verdict.cells[2].reason is Reason.THROTTLED
    assert verdict.cells[2].dropped == 2 * DEFAULT.visits * DEFAULT.visit_rounds, "as many visits again were tried"
    assert {cell.outcome for cell in verdict.cells if cell.cell != "cell 2"} == {Outcome.SAME}
    assert judge_stored(BEFORE, [here]).cells[2].reason is Reason.THROTTLED, "of the baseline as well"
    assert Record.from_json(here.to_json()).to_json() == here.to_json()


def test_a_cell_that_the_baseline_lacks_is_not_judged() -> None:
    verdict = judge_stored(record({**CELLS, "new": 7.0}), [BEFORE])
    assert (verdict.cells[-1].outcome, verdict.cells[-1].reason) == (Outcome.INCONCLUSIVE, Reason.NO_BASELINE)
    assert math.isnan(verdict.cells[-1].ratio)


def test_visits_of_a_cell_have_all_others_in_between() -> None:
    asked: list[str] = []

    class Watched(ScriptedRounds):
        def rounds(self, cell: str, count: int) -> Rounds:
            asked.append(cell)
            return super().rounds(cell, count)

    found = measure(NAMES, Watched(CELLS, YARDSTICKS), DEFAULT)
    assert asked == list(NAMES) * DEFAULT.visits
    assert found.cells["cell 0"].rounds == DEFAULT.visits * DEFAULT.visit_rounds
    assert found.spent_us > 0


def test_a_baseline_that_varies_widens_the_margin() -> None:
    def process(seed: int, spread: float) -> Record:
        rng = np.random.default_rng(seed)
        return record({name: 7.0 + rng.normal(0, spread) for name in NAMES}, seed=seed)

    steady, restless = ([process(seed, spread) for seed in range(3)] for spread in (0.001, 0.02))
    assert measured_margin(steady, len(NAMES), DEFAULT.alpha) < DEFAULT.margin_stored
    assert measured_margin(restless[:2], len(NAMES), DEFAULT.alpha) == 0.0
    here = record(CELLS | {"cell 4": 7.05})
    assert judge_stored(here, steady).cells[4].outcome is Outcome.SLOWER
    verdict = judge_stored(here, restless)
    assert not verdict.slower
    assert verdict.cells[4].margin == measured_margin(restless, len(NAMES), DEFAULT.alpha) > 0.05


def test_a_record_goes_through_a_file() -> None:
    assert Record.from_json(BEFORE.to_json()) == BEFORE


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda given: given | {"format": 0}, "format: 1, not 0: measure the baseline anew"),
        (lambda given: {"format": 1}, "not a record of a run: record.setting: is missing"),
        (lambda given: [given], "format: 1, not"),
        (lambda given: given | {"cells": {"a": {"yardstick": "memory"}}}, "not a record of a run"),
        (
            lambda given: given | {"cells": {"a": given["cells"]["cell 0"] | {"rounds": "many"}}},
            "not a record of a run",
        ),
        (lambda given: given | {"cells": {"a": given["cells"]["cell 0"] | {"extra": 1}}}, "not a record of a run"),
    ],
)
def test_a_file_that_is_no_record_says_so(change, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Record.from_json(json.dumps(change(json.loads(BEFORE.to_json()))))


def test_runs_of_another_setting_are_not_compared() -> None:
    with pytest.raises(ValueError, match=r"baseline\[0\].setting\['device'\]: 'scripted', as in this run, not 'other'"):
        judge_stored(record(), [record(setting={"device": "other"})])
    with pytest.raises(ValueError, match=r"baseline\[0\].yardsticks_us: \['memory'\], as in this run, not"):
        judge_stored(record(yardsticks={"memory": 8.0}), [BEFORE])
    other = measure(NAMES, ScriptedRounds(CELLS, YARDSTICKS, own="compute"), DEFAULT)
    with pytest.raises(ValueError, match=r"yardstick: 'memory', as in this run, not 'compute'"):
        judge_stored(record(), [other])
    with pytest.raises(ValueError, match="baseline: at least one record, not none"):
        judge_stored(record(), [])
    with pytest.raises(ValueError, match=r"yardstick\('cell 0'\): one of \['compute', 'memory'\].*not 'disk'"):
        measure(NAMES, ScriptedRounds(CELLS, YARDSTICKS, own="disk"), DEFAULT)
