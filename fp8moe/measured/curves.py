"""Times between measured numbers of tokens: log(time) is piecewise linear in log(tokens), and ends where the rows end.

Powers of the number of tokens are straight lines there: constant where the time is that of reading weights, slope 1
where it is that of arithmetic, and an MoE layer passes from one to the other over some decades of tokens. Outside the
measured range there is no time: the slope at an end says nothing about what follows it.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable
from typing import NamedTuple


class Curve(NamedTuple):
    """The rows of one backend on one layer, by ascending number of tokens. Times in microseconds."""

    backend: str
    tokens: tuple[int, ...]
    us: tuple[float, ...]
    log_tokens: tuple[float, ...]
    log_us: tuple[float, ...]

    @classmethod
    def of(cls, backend: str, rows: Iterable[tuple[int, float]]) -> Curve:
        """From (tokens, microseconds) in any order, each number of tokens once."""
        tokens, us = zip(*sorted(rows), strict=True)
        return cls(backend, tokens, us, tuple(map(math.log, tokens)), tuple(map(math.log, us)))

    def log_time(self, tokens: int, log_tokens: float) -> float | None:
        """log of the microseconds at `tokens`, whose log is given; None outside the measured range."""
        place = bisect_left(self.tokens, tokens)
        if place == len(self.tokens):
            return None
        if self.tokens[place] == tokens:
            return self.log_us[place]
        if place == 0:
            return None
        x, y = self.log_tokens, self.log_us
        part = (log_tokens - x[place - 1]) / (x[place] - x[place - 1])
        return y[place - 1] + part * (y[place] - y[place - 1])

    def around(self, tokens: int) -> tuple[int, ...]:
        """The measured numbers of tokens that a time at `tokens` comes from: one, two, or none outside the range."""
        place = bisect_left(self.tokens, tokens)
        if place == len(self.tokens):
            return ()
        if self.tokens[place] == tokens:
            return (tokens,)
        return self.tokens[place - 1 : place + 1] if place else ()

    def time(self, tokens: int) -> float | None:
        """Microseconds at `tokens`: as measured, or interpolated; None outside the measured range."""
        if tokens in self.tokens:
            return self.us[self.tokens.index(tokens)]
        found = self.log_time(tokens, math.log(tokens))
        return None if found is None else math.exp(found)
