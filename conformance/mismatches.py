"""Where a case fails, in the case's own tokens: of a verdict by the bound, of bits that differ, of an element."""

from __future__ import annotations

import math
from dataclasses import replace

from torch import Tensor

from conformance.bits import Difference
from conformance.bounds import Judgement
from conformance.bounds.suspect import BLOCK
from conformance.results import Mismatch


def told_judgement(judgement: Judgement, tokens: Tensor) -> str:
    """Why it failed and where, in the caller's tokens."""
    worst = worst_of(judgement, tokens)
    return judgement.reason if worst is None else f"{judgement.reason}: {worst}"


def worst_of(judgement: Judgement, tokens: Tensor) -> Mismatch | None:
    """Where it failed, in the caller's tokens."""
    worst = judgement.worst
    return None if worst is None else replace(worst, token=int(tokens[worst.token]))


def in_bits(found: Difference, token: int, hidden: int) -> Mismatch:
    """Where bits differ that must be equal, as a token of the case."""
    return exactly(token, found.column, found.expected, found.got, hidden)


def exactly(token: int, column: int, expected: float, got: float, hidden: int) -> Mismatch:
    """An element that must be what is expected of it, of `hidden` columns."""
    first = column // BLOCK * BLOCK
    columns = (first, min(first + BLOCK, hidden) - 1)
    return Mismatch(token, None, column, columns, expected, got, math.inf, abs(got - expected), 0.0)
