"""The interval of a ratio of times: an interquartile mean of log ratios, and a block bootstrap of its spread.

Why not the mean: the largest disturbances are the commonest cause of a false alarm, and the interquartile mean does not
see a quarter of the pairs at either end. Why not the median: it has 64% of the mean's efficiency on normal noise, the
interquartile mean has 84%, so it needs a quarter fewer pairs; and the bootstrap of a median takes few values.

Why blocks: pairs that follow each other may err alike. A block of consecutive pairs keeps that, and blocks grow with
the number of pairs, so that in the limit any dependence of short range is covered.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from conformance.gate.student import normal_quantile, quantile

MOST_BATCHES = 16
"""Blocks in n pairs, at most; at least half as many once there are 16 pairs. 10 to 30 batches are what Schmeiser (Batch
size effects in the analysis of simulation output, 1982) finds worth having: with more the interval hardly narrows, and
shorter ones keep less of the dependence."""
LEAST_PAIRS = 16
"""Eight blocks of two. Below, quantiles of t are so large that any interval is useless."""
HALF_WIDTH = 0.025
"""The bootstrap's own tail from which the spread is read: deep enough to see skew, with resamples enough beyond it."""
TIMER_US = 0.5
"""Resolution of device events (CUDA runtime API, cudaEventElapsedTime: around 0.5 microseconds)."""


@dataclass(frozen=True)
class Estimate:
    """Of a log ratio, and how sure it is.

    Args:
        log_ratio: the interquartile mean of the log ratios.
        spread: of `log_ratio`, a standard deviation: the wider half of the bootstrap's central 95% over the normal's
            1.96, times sqrt(b / (b - 1)) because a resample varies around the sample's own mean.
        freedom: degrees of freedom, b - 1 for b blocks. Limits are `log_ratio` -+ t(freedom) x `spread`, which is the
            expanded percentile interval of Hesterberg (What Teachers Should Know About the Bootstrap, 2015, section
            3.2), extrapolated from 2.5% to the deep tails of a family of tests by Student's t.
    """

    log_ratio: float
    spread: float
    freedom: int

    def low(self, level: float) -> float:
        """The lower limit of the log ratio: it lies above the truth with probability `level`."""
        return self.log_ratio - quantile(level, self.freedom) * self.spread

    def high(self, level: float) -> float:
        """The upper limit of the log ratio: it lies below the truth with probability `level`."""
        return self.log_ratio + quantile(level, self.freedom) * self.spread


def block_length(pairs: int) -> int:
    """Pairs in a block: even, so that a block has both orders alike, and at most `MOST_BATCHES` blocks."""
    return 2 * -(-pairs // (2 * MOST_BATCHES))


def interquartile_mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of the last axis: the mean of what is left without the lowest and the highest quarter (rounded down)."""
    cut = values.shape[-1] // 4
    middle: NDArray[np.float64] = np.sort(values, axis=-1)[..., cut : values.shape[-1] - cut]
    return np.asarray(middle.mean(axis=-1))


@lru_cache(maxsize=64)
def resampled(pairs: int, resamples: int, seed: int) -> NDArray[np.intp]:
    """(resamples, b x L) indices into n pairs: blocks of L around a circle, each beginning at an even pair.

    The same for every cell and call, so that a verdict depends on the samples alone.
    """
    length = block_length(pairs)
    blocks = pairs // length
    starts = 2 * np.random.default_rng([seed, pairs]).integers(pairs // 2, size=(resamples, blocks, 1))
    indices: NDArray[np.intp] = ((starts + np.arange(length)) % pairs).reshape(resamples, -1)
    return indices


def estimate(row: NDArray[np.float64], floor: float, resamples: int, seed: int) -> Estimate:
    """From the (n,) log ratios of one cell, in the order in which they were measured.

    Args:
        floor: the least spread, from the timer's resolution (`timer_floor`).

    Raises:
        ValueError: fewer than `LEAST_PAIRS` pairs, or an odd number.
    """
    pairs = len(row)
    if pairs < LEAST_PAIRS or pairs % 2:
        raise ValueError(f"row: an even number of at least {LEAST_PAIRS} log ratios, not {pairs}: sample more")
    centre = float(interquartile_mean(row))
    means = np.sort(interquartile_mean(row[resampled(pairs, resamples, seed)]))
    below, above = means[round(HALF_WIDTH * resamples)], means[-1 - round(HALF_WIDTH * resamples)]
    half = max(centre - float(below), float(above) - centre) / normal_quantile(HALF_WIDTH)
    blocks = pairs // block_length(pairs)
    return Estimate(centre, max(half * math.sqrt(blocks / (blocks - 1)), floor), blocks - 1)


def timer_floor(*times_us: NDArray[np.float64]) -> float:
    """The standard deviation that rounding to the timer's steps gives to a log ratio of such times.

    Each time errs uniformly within half a step. Where noise is wider than a step the errors average out and the
    bootstrap sees the rest; where every replay reads the same, they do not, and this is all that is known.
    """
    return math.sqrt(sum((TIMER_US / float(np.median(times))) ** 2 / 12 for times in times_us))
