"""Scripted samplers and honest limits for the tests of the gate."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np

from conformance.gate.samples import Rounds, Samples

SURPRISE = 1e-3
"""Probability with which a test of an error rate may fail though the rate is as promised."""


def most_expected(runs: int, rate: float) -> int:
    """The largest count that a rate explains: more have a probability of at most `SURPRISE` in so many runs."""
    left, count = 1.0, -1
    while left > SURPRISE:
        count += 1
        ways = math.lgamma(runs + 1) - math.lgamma(count + 1) - math.lgamma(runs - count + 1)
        left -= math.exp(ways + count * math.log(rate) + (runs - count) * math.log1p(-rate))
    return count


def fewest_expected(runs: int, rate: float) -> int:
    """The smallest count that a rate explains."""
    return runs - most_expected(runs, 1 - rate)


class ScriptedPairs:
    """Pairs whose log ratio is `ratio(cell, call)` with independent noise; `calls` has every request.

    Args:
        ratio: of a cell, and of how many requests for it there were before.
        noise: standard deviation of a log ratio.
        flags: of a cell and of how many requests there were before: what each pair has.
        pair_us: device time of a pair.
    """

    def __init__(
        self,
        ratio: Callable[[str, int], float],
        *,
        processes: int = 1,
        noise: float = 0.002,
        flags: Callable[[str, int, int], np.ndarray] | None = None,
        pair_us: Mapping[str, float] | float = 2000.0,
        seed: int = 0,
    ) -> None:
        self.processes, self.ratio, self.noise, self.flags, self.pair_us = processes, ratio, noise, flags, pair_us
        self.rng, self.calls = np.random.default_rng(seed), list[tuple[str, int]]()

    def pairs(self, cell: str, count: int) -> Samples:
        before = sum(name == cell for name, _ in self.calls)
        self.calls.append((cell, count))
        half = (self.pair_us if isinstance(self.pair_us, float) else self.pair_us[cell]) / 2
        log_ratios = self.ratio(cell, before) + self.rng.normal(0.0, self.noise, count)
        flags = np.zeros(count, np.uint8) if self.flags is None else self.flags(cell, before, count)
        return Samples(np.full(count, half), half * np.exp(log_ratios), flags)


class ScriptedRounds:
    """A process whose cells and yardsticks have the log times given, with independent noise."""

    def __init__(
        self,
        cells: Mapping[str, float],
        yardsticks: Mapping[str, float],
        *,
        own: str = "memory",
        noise: float = 0.001,
        flag: int = 0,
        setting: Mapping[str, str] | None = None,
        seed: int = 0,
    ) -> None:
        self.cells, self.yardsticks, self.own, self.noise, self.flag = cells, yardsticks, own, noise, flag
        self.setting: Mapping[str, str] = {"device": "scripted"} if setting is None else setting
        self.rng = np.random.default_rng(seed)

    def yardstick(self, cell: str) -> str:
        return self.own

    def rounds(self, cell: str, count: int) -> Rounds:
        def times(log_us: float) -> np.ndarray:
            return np.exp(log_us + self.rng.normal(0.0, self.noise, count))

        yardsticks = {name: times(log_us) for name, log_us in self.yardsticks.items()}
        return Rounds(times(self.cells[cell]), yardsticks, np.full(count, self.flag, np.uint8))
