"""`python -m conformance.gate.rates --runs N --seed S`: the gate's error rates on the simulated device, as a table."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from conformance.gate.paired import judge_paired
from conformance.gate.policy import DEFAULT, Policy
from conformance.gate.record import measure
from conformance.gate.simulated.mix import GRAPH_US, KINDS, MIX, cells_of
from conformance.gate.simulated.samplers import SimulatedPairs, SimulatedRounds, installed
from conformance.gate.stored import judge_stored
from conformance.gate.verdicts import Mode, Outcome, RunVerdict
from fp8moe.counted import counted

ANY = "any"
SLOWDOWNS: dict[Mode, tuple[float, ...]] = {
    Mode.ONE_PROCESS: (0.01, 0.02, 0.05),
    Mode.TWO_PROCESSES: (0.01, 0.02, 0.05),
    Mode.STORED: (0.01, 0.02, 0.05),
}


@dataclass(frozen=True)
class Study:
    """A kind of run: one cell of a kind of work is slower by so much; kind "any" with 0 is A/A."""

    mode: Mode
    kind: str
    slowdown: float


@dataclass
class Rate:
    """What `runs` runs came to.

    Args:
        found: runs in which the slow cell was called slower.
        false: runs in which any other cell was.
        faster: runs in which any cell was called faster; none ever is.
        undecided: cells that were inconclusive, over all runs.
        seconds: of simulated device time, each run's.
    """

    study: Study
    runs: int = 0
    found: int = 0
    false: int = 0
    faster: int = 0
    undecided: int = 0
    seconds: tuple[float, ...] = ()

    def add(self, verdict: RunVerdict, slow: str) -> None:
        """Counts a run whose slow cell has this name, "" for none."""
        accused = {cell.cell for cell in verdict.slower}
        self.runs += 1
        self.found += slow in accused
        self.false += bool(accused - {slow})
        self.faster += bool(verdict.of(Outcome.FASTER))
        self.undecided += len(verdict.of(Outcome.INCONCLUSIVE))
        self.seconds += (verdict.spent_us / 1e6,)

    def line(self) -> str:
        """A row of the table."""
        found = "-" if not self.study.slowdown else f"{self.found / self.runs:.1%}"
        return (
            f"{self.study.mode.value:22}{self.study.kind:15}{self.study.slowdown:>8.0%}{self.runs:>7}{found:>9}"
            f"{self.false / self.runs:>9.2%}{self.faster / self.runs:>9.2%}"
            f"{self.undecided / self.runs:>11.2f}{np.median(self.seconds):>9.1f}{max(self.seconds):>8.1f}"
        )


HEADER = (
    f"{'mode':22}{'slow cell':15}{'slower':>8}{'runs':>7}{'found':>9}{'false':>9}{'faster':>9}"
    f"{'undecided':>11}{'median s':>9}{'worst s':>8}"
)


def studies(modes: Sequence[Mode]) -> Iterator[Study]:
    """A/A of each mode, then each kind of work with each slowdown."""
    for mode in modes:
        yield Study(mode, ANY, 0.0)
        for kind in KINDS:
            for slowdown in SLOWDOWNS[mode]:
                yield Study(mode, kind, slowdown)


def simulate(
    study: Study, seed: Sequence[int], noise: float = 1.0, graph_us: float = GRAPH_US, policy: Policy = DEFAULT
) -> tuple[RunVerdict, str]:
    """One run over the whole mix, and the name of its slow cell ("" in A/A)."""
    rng = np.random.default_rng(seed)
    slow = "" if study.kind == ANY else str(rng.choice([cell.name for cell in cells_of(study.kind)]))
    slowdowns = {slow: study.slowdown}
    names = [cell.name for cell in MIX]
    if study.mode is Mode.STORED:
        here = installed(MIX, rng)
        before = measure(names, SimulatedRounds(here, rng, noise=noise, graph_us=graph_us), policy)
        now = measure(names, SimulatedRounds(here, rng, slowdowns=slowdowns, noise=noise, graph_us=graph_us), policy)
        return judge_stored(now, [before], policy), slow
    processes = 1 if study.mode is Mode.ONE_PROCESS else 2
    sampler = SimulatedPairs(MIX, rng, processes=processes, slowdowns=slowdowns, noise=noise, graph_us=graph_us)
    return judge_paired(names, sampler, policy), slow


def rate(
    study: Study,
    runs: int,
    seed: int = 0,
    noise: float = 1.0,
    graph_us: float = GRAPH_US,
    policy: Policy = DEFAULT,
) -> Rate:
    """So many runs; run i of a study is the same whatever `runs` is."""
    tally = Rate(study)
    for index in range(runs):
        tally.add(*simulate(study, [seed, index, *study_seed(study)], noise, graph_us, policy))
    return tally


def study_seed(study: Study) -> tuple[int, ...]:
    """Numbers of its own for each study."""
    kinds = (ANY, *KINDS)
    return list(Mode).index(study.mode), kinds.index(study.kind), round(study.slowdown * 1e4)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table; 0."""
    parser = argparse.ArgumentParser(prog="python -m conformance.gate.rates", description=__doc__)
    parser.add_argument("--runs", type=int, default=200, metavar="N", help="of each row with a slow cell")
    parser.add_argument("--same-runs", type=int, default=None, metavar="N", help="of each A/A row; as --runs without")
    parser.add_argument("--seed", type=int, default=0, metavar="S")
    parser.add_argument("--noise", type=float, default=1.0, metavar="F", help="factor on the measured noise")
    parser.add_argument(
        "--graph-us", type=float, default=GRAPH_US, metavar="US", help="longest graph; inf: always 20 calls"
    )
    parser.add_argument("--mode", nargs="*", choices=[mode.name.lower() for mode in Mode], metavar="MODE")
    given = parser.parse_args(arguments)
    modes = [mode for mode in Mode if not given.mode or mode.name.lower() in given.mode]
    began = time.perf_counter()
    print(f"{counted(len(MIX), 'cell')} a run, noise x {given.noise:g}, seed {given.seed}\n{HEADER}")
    for study in studies(modes):
        runs = given.runs if study.slowdown or given.same_runs is None else given.same_runs
        print(rate(study, runs, given.seed, given.noise, given.graph_us).line(), flush=True)
    print(f"{time.perf_counter() - began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
