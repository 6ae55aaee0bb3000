"""Quantiles of Student's t and of the normal distribution, exact, without a library of statistics."""

from __future__ import annotations

import math
from functools import lru_cache
from statistics import NormalDist


def tail(t: float, freedom: int) -> float:
    """P(T > t) for t >= 0 and whole degrees of freedom: the series of Abramowitz and Stegun, 26.7.3 and 26.7.4."""
    cosine_squared = freedom / (freedom + t * t)
    sine = t / math.sqrt(freedom + t * t)
    if freedom % 2:
        term = math.sqrt(cosine_squared) * sine
        within = math.atan(t / math.sqrt(freedom))
        for k in range(1, (freedom - 1) // 2 + 1):
            within += term
            term *= cosine_squared * 2 * k / (2 * k + 1)
        within *= 2 / math.pi
    else:
        term, within = sine, 0.0
        for k in range(1, freedom // 2 + 1):
            within += term
            term *= cosine_squared * (2 * k - 1) / (2 * k)
    return (1 - within) / 2


@lru_cache(maxsize=4096)
def quantile(level: float, freedom: int) -> float:
    """The t that is exceeded with probability `level`, by bisection to the last bit.

    Raises:
        ValueError: a level that is not in (0, 0.5], or fewer than one degree of freedom.
    """
    if not 0 < level <= 0.5:
        raise ValueError(f"level: a probability above 0 and at most 0.5, not {level!r}")
    if freedom < 1:
        raise ValueError(f"freedom: at least 1, not {freedom!r}: an interval needs two batches or more")
    low, high = 0.0, 1.0
    while tail(high, freedom) > level:
        low, high = high, 2 * high
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if tail(middle, freedom) > level else (low, middle)
    return high


def normal_quantile(level: float) -> float:
    """The z that a standard normal exceeds with probability `level`."""
    return NormalDist().inv_cdf(1 - level)
