"""Every number that a verdict about speed depends on, in one place, each with its derivation.

"Measured" below means on one H100, 2026-11-24, with 20 calls in a graph.
"""

from __future__ import annotations

from dataclasses import dataclass

from conformance.gate.interval import LEAST_PAIRS


@dataclass(frozen=True)
class Policy:
    """How the gate decides. Ratios are given as what they differ from 1 by: 0.01 is 1%. Times in microseconds.

    Args:
        alpha: probability that any cell of a run is called slower though none is, and the same again for faster. Half
            of the 1% that is asked for: the interval's level is nominal, and noise that follows itself (by a
            correlation of 0.3 between pairs) can double it.
        looks: parts of `alpha` for the looks at the fresh pairs of a suspect, each at twice as many as the last one.
            The first settles a slowdown of 2% on most cells, so it has half; the sum is 1.
        same_level: probability that a cell whose ratio lies at a limit of the range is taken for one inside it, on
            either side. Each cell on its own: "same" accuses nobody.
        aim: the smallest slowdown that the paired mode is after, and the range (+-) within which versions are "same".
        cleared: a cell whose whole interval lies within +- this after the screen is "same" and not measured again.
            Three quarters of the aim: what is cleared is so with room to spare, what is not costs fresh pairs.
        margin_one_process: a cell is slower if its ratio is above 1 by more than this. Two graphs in one process differ
            steadily by where their memory lies: the centres of the measured A/A ranges of the copy and the two larger
            GEMMs are off by 0.02, 0.055 and 0.045%. Taken as a standard deviation of 0.05%, times 4: one of 42 cells
            lies beyond that in 0.13% of the runs, which comes on top of `alpha`.
        margin_two_processes: the same with each version in a process of its own, on the same weights, inputs and output
            and with intermediate results in sixteen places. 66 cells of two pairs of processes were off by 0.145% (root
            mean square, noise included) and 0.45% at most (one H200, 2026-11-29). Taken as 0.15%, times 4.
        screen_us: device time that the screen gives to a cell, as far as `least_pairs` and `most_pairs` let it. Little:
            the screen accuses nobody, and where calls are long the fresh pairs of suspects need most of the budget.
            This, `least_pairs` and `cleared` were chosen among six settings on the simulated device, with seed 0 of
            `conformance.gate.rates`: figures of that seed are no evidence for them.
        least_pairs: what every cell gets. Eight blocks of two: with the widest spread measured on a long kernel (0.11%
            for a median of 10 pairs) an interval of +-0.26% at `same_level`, so that an equal cell is cleared.
        most_pairs: enough for the shortest kernel (0.3% for a median of 10 pairs): +-0.25%.
        most_dropped: part of a cell's samples that may be invalid; with more, those left are no fair sample of it.
        budget_us: device time of a run. Nothing is asked for that would exceed it if pairs were as the cell's longest
            so far; they may be longer, so it is a second below the minute that a run may take.
        resamples: of the bootstrap: the standard deviation of its 2.5% quantile is then 4% of the spread.
        seed: of the bootstrap.
        stored_aim: as `aim`, for stored times.
        margin_stored: as `margin_one_process`. Cell and yardstick both lie anew in memory in the second process: off by
            0.15% each (above), by sqrt(2) as much together. Times 4 that is 0.85%, rounded up. Processes that have the
            device to themselves find the same places again: 33 cells were off by 0.10%, 0.23% at most (as above).
        follows_other: part of a cell's time that may follow another yardstick than its own: assumed, not measured.
            Where yardsticks moved apart by d between the runs, the cell's ratio may have moved by this times d.
        most_moved: how far yardsticks may move apart; with more, runs cannot be compared. `follows_other` of it is 2%:
            beyond, no room is left to find 5% above the margin and the noise.
        visits, visit_rounds: a stored run goes through all cells so many times, with so many rounds each: a block of
            the bootstrap is then a visit, and visits lie seconds apart, so the spread has the slow changes of the
            clocks. 16 blocks are the most that the bootstrap uses.
    """

    alpha: float = 0.005
    looks: tuple[float, ...] = (0.5, 0.25, 0.25)
    same_level: float = 0.01
    aim: float = 0.01
    cleared: float = 0.0075
    margin_one_process: float = 0.002
    margin_two_processes: float = 0.006
    screen_us: float = 100_000.0
    least_pairs: int = LEAST_PAIRS
    most_pairs: int = 96
    most_dropped: float = 0.5
    budget_us: float = 59e6
    resamples: int = 1000
    seed: int = 0
    stored_aim: float = 0.05
    margin_stored: float = 0.01
    follows_other: float = 0.25
    most_moved: float = 0.08
    visits: int = 16
    visit_rounds: int = 2

    def __post_init__(self) -> None:
        for name in ("alpha", "same_level", "aim", "cleared", "stored_aim", "most_dropped", "follows_other"):
            self._require(name, 0 < getattr(self, name) < 1, "between 0 and 1")
        for name in ("margin_one_process", "margin_two_processes", "margin_stored", "most_moved", "screen_us"):
            self._require(name, getattr(self, name) >= 0, "0 or more")
        self._require("alpha", self.alpha <= 0.5, "at most 0.5")
        self._require("same_level", self.same_level <= 0.5, "at most 0.5")
        self._require("looks", bool(self.looks) and min(self.looks) > 0, "positive parts, at least one")
        self._require("looks", sum(self.looks) <= 1, "parts of alpha, with a sum of at most 1")
        self._require("cleared", self.cleared <= self.aim, "at most the aim")
        self._require("least_pairs", self.least_pairs >= LEAST_PAIRS, f"at least {LEAST_PAIRS}")
        self._require("most_pairs", self.most_pairs >= self.least_pairs, "at least least_pairs")
        self._require("budget_us", self.budget_us > 0, "above 0")
        self._require("resamples", self.resamples >= 200, "at least 200, or the 2.5% quantile is a guess")
        for name in ("least_pairs", "most_pairs", "visit_rounds"):
            self._require(name, getattr(self, name) > 0 and getattr(self, name) % 2 == 0, "even, for both orders")
        self._require("visits", self.visits * self.visit_rounds >= LEAST_PAIRS, f"{LEAST_PAIRS} rounds or more in all")

    def _require(self, name: str, holds: bool, what: str) -> None:
        if not holds:
            raise ValueError(f"Policy.{name}: {what}, not {getattr(self, name)!r}")

    def margin(self, processes: int) -> float:
        """For a sampler whose two versions live in one process or in two.

        Raises:
            ValueError: another number of processes.
        """
        margins = {1: self.margin_one_process, 2: self.margin_two_processes}
        if processes not in margins:
            raise ValueError(f"processes: 1 (both versions in one) or 2 (one each), not {processes!r}")
        return margins[processes]


DEFAULT = Policy()
