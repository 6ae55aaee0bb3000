"""The measured figures that the simulated device has to reproduce, and the same experiments on it.

Measured on one H100, 2026-11-24. A verdict is the median of the ratios of some pairs; a naive median is that of 200
single replays, between events, of one version after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from conformance.gate.simulated.device import Array, Device, Stream, in_turn
from conformance.gate.simulated.work import (
    COPY,
    DEVICE,
    GEMM,
    LARGE_GEMM,
    OFFSET_ONE_PROCESS,
    OFFSET_TWO_PROCESSES,
    SHORT_GEMM,
    WORKS,
    Work,
)

WARM_US = 1e6
"""The paired experiments ran on a device that had long been at work, the naive ones on one that had not."""


@dataclass(frozen=True)
class Verdicts:
    """The range of verdicts in one experiment.

    Args:
        works: the kinds of work it was over, `count` verdicts each.
        calls: in the graph of B; A has 20.
        pairs: in a verdict.
        offset: standard deviation of the steady log ratio of two equal versions.
        low, high: the smallest and the largest verdict measured.
    """

    works: tuple[Work, ...]
    calls: int
    pairs: int
    count: int
    offset: float
    low: float
    high: float

    def simulate(self, rng: np.random.Generator, device: Device = DEVICE) -> tuple[float, float]:
        """The smallest and the largest verdict of the same experiment on the simulated device."""
        verdicts = np.concatenate([self._of(rng, device, work) for work in self.works])
        return float(verdicts.min()), float(verdicts.max())

    def _of(self, rng: np.random.Generator, device: Device, work: Work) -> Array:
        versions = [work.stream, replace(work.stream, calls=self.calls, offset=rng.normal(0.0, self.offset))]
        order = in_turn(self.pairs * self.count)
        times, _ = device.replay(rng, versions, order, WARM_US)
        ratios = times[order == 1] / times[order == 0]
        verdicts: Array = np.median(ratios.reshape(self.count, self.pairs), axis=1)
        return verdicts


def _one(works: Sequence[Work], calls: int, pairs: int, low: float, high: float) -> Verdicts:
    return Verdicts(tuple(works), calls, pairs, 100, OFFSET_ONE_PROCESS, low, high)


def _two(work: Work, calls: int, low: float, high: float) -> Verdicts:
    return Verdicts((work,), calls, 10, 60, OFFSET_TWO_PROCESSES, low, high)


PAIRED = (
    _one([COPY], 20, 10, 0.9991, 1.0005),
    _one([COPY], 21, 10, 1.0491, 1.0507),
    _one([LARGE_GEMM], 20, 10, 0.9968, 1.0021),
    _one([LARGE_GEMM], 21, 10, 1.0460, 1.0516),
    _one([GEMM], 20, 10, 0.9979, 1.0012),
    _one([GEMM], 21, 10, 1.0474, 1.0495),
    _one([SHORT_GEMM], 20, 10, 0.9940, 1.0090),
    _one([SHORT_GEMM], 21, 10, 1.0390, 1.0514),
    _one(WORKS, 20, 40, 0.9981, 1.0045),
    _one(WORKS, 21, 40, 1.0426, 1.0505),
    _two(COPY, 20, 0.9983, 0.9994),
    _two(COPY, 21, 1.0495, 1.0507),
    _two(LARGE_GEMM, 20, 0.9951, 1.0019),
    _two(LARGE_GEMM, 21, 1.0490, 1.0552),
)


@dataclass(frozen=True)
class Naive:
    """Medians of single replays, one after the other.

    Args:
        work: the graph with a single call in it.
        spread: the largest of 60 medians over the smallest, minus 1.
        low, high: the smallest and the largest ratio of a median to the one before.
    """

    work: Stream
    spread: float
    low: float
    high: float
    medians: int = 60
    replays: int = 200

    def simulate(self, rng: np.random.Generator, device: Device = DEVICE) -> tuple[float, float, float]:
        """`spread`, `low` and `high` of the same experiment on the simulated device."""
        order = np.zeros((1, self.medians * self.replays), dtype=np.intp)
        times, _ = device.replay(rng, [self.work], order, 0.0)
        medians = np.median(times.reshape(self.medians, self.replays), axis=1)
        ratios = medians[1:] / medians[:-1]
        return float(medians.max() / medians.min() - 1), float(ratios.min()), float(ratios.max())


def _single(work: Work, call_us: float) -> Stream:
    """One call a replay. The gap is all that is left of the lead: nothing before has left the caches cold."""
    return replace(work.stream, call_us=call_us, calls=1, lead_us=1.2)


NAIVE = (
    Naive(_single(COPY, 443.0), 0.0004, 0.9998, 1.0003),
    Naive(_single(LARGE_GEMM, 112.0), 0.39, 0.86, 1.10),
    Naive(_single(SHORT_GEMM, 10.3), 0.55, 0.94, 1.54),
)
