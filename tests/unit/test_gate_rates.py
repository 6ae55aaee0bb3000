"""The gate's error rates on the simulated device, with few runs and honest limits.

A limit is what the promised rate explains with a probability of 0.1% (`gate_samplers.SURPRISE`). The published figures
come from more runs: `python -m conformance.gate.rates`.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from conformance.gate.paired import judge_paired
from conformance.gate.policy import DEFAULT
from conformance.gate.rates import ANY, Rate, Study, main, rate
from conformance.gate.samples import PairSampler, RoundSampler
from conformance.gate.simulated.mix import KINDS, MIX, Mixed
from conformance.gate.simulated.samplers import SimulatedPairs, SimulatedRounds, installed
from conformance.gate.simulated.work import COPY, WORKS, Work
from conformance.gate.verdicts import Mode
from tests.unit.gate_samplers import fewest_expected, most_expected

FALSE, FOUND = 0.01, 0.95
"""What the gate promises: of A/A runs, and of runs with a cell that is slower by 2% (5% against stored times)."""
SHORTER_THAN_US = 60e6


@pytest.mark.parametrize(("mode", "runs"), [(Mode.ONE_PROCESS, 60), (Mode.TWO_PROCESSES, 60), (Mode.STORED, 10)])
def test_runs_without_a_change_accuse_nobody(mode: Mode, runs: int) -> None:
    found = rate(Study(mode, ANY, 0.0), runs)
    assert len(MIX) >= 30
    assert found.false <= most_expected(runs, FALSE)
    assert found.faster <= most_expected(runs, FALSE)
    assert max(found.seconds) <= SHORTER_THAN_US / 1e6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("mode", "slowdown", "runs"), [(Mode.ONE_PROCESS, 0.02, 20), (Mode.TWO_PROCESSES, 0.02, 20), (Mode.STORED, 0.05, 8)]
)
def test_a_planted_slowdown_is_found(mode: Mode, slowdown: float, runs: int, kind: str) -> None:
    found = rate(Study(mode, kind, slowdown), runs)
    assert found.found >= fewest_expected(runs, FOUND)
    assert found.false <= most_expected(runs, FALSE)
    assert max(found.seconds) <= SHORTER_THAN_US / 1e6


def boundary(work: Work, cells: int = 5) -> tuple[Mixed, ...]:
    return tuple(Mixed(f"{work.name} {index}", work.stream.call_us, work) for index in range(cells))


def accused_at_the_margin(work: Work, runs: int, alpha: float, seed: int = 0) -> int:
    """Runs that accuse any of five cells which are slower by exactly the margin: the worst that is not a slowdown.

    Every cell is under suspicion and the error probability is large, so that what the fresh looks and Holm's procedure
    do is seen in few runs. The lead is part of a graph and is not slowed down, so calls are slowed by that much more.
    """
    policy, cells = replace(DEFAULT, alpha=alpha, cleared=1e-9, resamples=400), boundary(work)
    calls_us = work.stream.calls * work.stream.call_us
    slower = policy.margin_one_process * (1 + work.stream.lead_us / calls_us)
    count = 0
    for index in range(runs):
        sampler = SimulatedPairs(
            cells, np.random.default_rng([seed, index]), slowdowns={c.name: slower for c in cells}, offset=0.0
        )
        count += bool(judge_paired([cell.name for cell in cells], sampler, policy).slower)
    return count


@pytest.mark.parametrize("work", WORKS, ids=lambda work: work.name)
def test_cells_at_the_margin_are_accused_no_more_often_than_alpha(work: Work) -> None:
    alpha, runs = 0.2, 40
    assert accused_at_the_margin(work, runs, alpha) <= most_expected(runs, alpha)


def test_the_margin_test_can_fail() -> None:
    """Twice the margin is a slowdown: then nearly every run accuses, which the limit above would not let pass."""
    runs = 20
    cells = boundary(COPY)
    slower = dict.fromkeys([cell.name for cell in cells], 2 * DEFAULT.margin_one_process)
    policy = replace(DEFAULT, alpha=0.2, cleared=1e-9)
    accused = sum(
        bool(
            judge_paired(
                [cell.name for cell in cells],
                SimulatedPairs(cells, np.random.default_rng([1, index]), slowdowns=slower, offset=0.0),
                policy,
            ).slower
        )
        for index in range(runs)
    )
    assert accused > most_expected(runs, policy.alpha)


def accused_of(cells: tuple[Mixed, ...], runs: int, processes: int = 1, **more: float) -> int:
    count = 0
    for index in range(runs):
        sampler = SimulatedPairs(cells, np.random.default_rng([2, index]), processes=processes, **more)
        count += bool(judge_paired([cell.name for cell in cells], sampler).slower)
    return count


def test_noise_that_follows_itself_accuses_nobody() -> None:
    """A correlation of 0.5 between successive replays, where 0.2 was assumed."""

    def stubborn(cell: Mixed) -> Mixed:
        return replace(cell, work=Work(cell.work.name, replace(cell.work.stream, correlation=0.5)))

    runs = 40
    assert accused_of(tuple(map(stubborn, MIX)), runs) <= most_expected(runs, FALSE)


def test_a_steady_offset_between_processes_accuses_nobody_and_would_without_the_margin() -> None:
    """Cells that differ by 0.15%, as measured, from one process to the other, and by nothing else."""
    runs = 40
    with_margin = accused_of(MIX, runs, processes=2)
    mistaken = 0
    for index in range(runs):
        sampler = SimulatedPairs(MIX, np.random.default_rng([2, index]), processes=2)
        policy = replace(DEFAULT, margin_two_processes=0.0)
        mistaken += bool(judge_paired([cell.name for cell in MIX], sampler, policy).slower)
    assert with_margin <= most_expected(runs, FALSE)
    assert mistaken > most_expected(runs, FALSE)


def test_twice_the_measured_noise_accuses_nobody() -> None:
    runs = 40
    assert accused_of(MIX, runs, noise=2.0) <= most_expected(runs, FALSE)


def test_the_simulated_samplers_are_samplers() -> None:
    rng = np.random.default_rng(0)
    pairs: PairSampler = SimulatedPairs(MIX, rng)
    rounds: RoundSampler = SimulatedRounds(installed(MIX, rng), rng)
    assert len(pairs.pairs(MIX[0].name, 4).a_us) == 4
    assert len(rounds.rounds(MIX[0].name, 2).cell_us) == 2


def test_a_run_is_the_same_again() -> None:
    study = Study(Mode.ONE_PROCESS, "short", 0.02)
    first, second = rate(study, 2, seed=3), rate(study, 2, seed=3)
    assert first == second
    assert first != rate(study, 2, seed=4)


def test_a_tally_keeps_found_and_false_apart() -> None:
    study = Study(Mode.ONE_PROCESS, "short", 0.05)
    cells = MIX[:3]
    sampler = SimulatedPairs(cells, np.random.default_rng(0), slowdowns={cells[0].name: 0.05, cells[1].name: 0.05})
    verdict = judge_paired([cell.name for cell in cells], sampler)
    tally = Rate(study)
    tally.add(verdict, cells[0].name)
    tally.add(verdict, "")
    assert (tally.runs, tally.found, tally.false) == (2, 1, 2)


def test_the_command_prints_a_row_for_each_study(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--runs", "1", "--mode", "one_process"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if line.startswith(Mode.ONE_PROCESS.value)]
    assert len(rows) == 1 + 3 * len(KINDS)
    assert lines[0] == f"{len(MIX)} cells a run, noise x 1, seed 0"
