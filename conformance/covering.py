"""Covering arrays: few cases in which every possible combination of values of any two, or three, axes occurs.

Greedy, one row at a time: of some candidates the one with the most combinations that no row has yet. A candidate has
one such combination for certain and is random elsewhere, within what goes together (Cohen, Dalal, Fredman, Patton: The
AETG system, IEEE Transactions on Software Engineering 23(7), 1997).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from conformance.axes import Space

CANDIDATES = 40
Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Coverage:
    """How many of the combinations of `strength` axes' values occur, of those that are possible."""

    strength: int
    covered: int
    possible: int

    @property
    def share(self) -> float:
        return self.covered / self.possible if self.possible else 1.0

    def __str__(self) -> str:
        kind = {2: "pairs", 3: "triples"}.get(self.strength, f"{self.strength}-tuples")
        share = "all" if self.covered == self.possible else f"{100 * self.share:.2f}%"
        return f"{share} of {self.possible:,} {kind} of values"


class Tally:
    """Which combinations of the values of any `strength` axes some row has had."""

    def __init__(self, space: Space, strength: int) -> None:
        self.strength = strength
        sizes = np.asarray(space.sizes)
        self.places = np.asarray(list(combinations(range(len(sizes)), strength)))
        lengths = sizes[self.places]
        # Each combination of axes has its stretch of one vector, and row-major places within it.
        self.strides = np.concatenate([lengths[:, 1:], np.ones((len(lengths), 1), dtype=int)], axis=1)
        self.strides = self.strides[:, ::-1].cumprod(axis=1)[:, ::-1]
        ends = lengths.prod(axis=1).cumsum()
        self.starts = np.concatenate([[0], ends[:-1]])
        self.possible = np.concatenate([space.together(tuple(places)).reshape(-1) for places in self.places.tolist()])
        self.missing = self.possible.copy()

    def indices(self, rows: Rows) -> Rows:
        """(rows, combinations of axes): where each row's combinations are."""
        found: Rows = (rows[:, self.places] * self.strides).sum(axis=2) + self.starts
        return found

    def add(self, rows: Rows) -> None:
        self.missing[self.indices(rows)] = False

    def add_all(self, rows: Sequence[Sequence[int]]) -> None:
        if rows:
            self.add(np.asarray(rows))

    def gains(self, rows: Rows) -> Rows:
        """(rows,) how many combinations each would add."""
        found: Rows = self.missing[self.indices(rows)].sum(axis=1)
        return found

    @property
    def coverage(self) -> Coverage:
        possible = int(self.possible.sum())
        return Coverage(self.strength, possible - int(self.missing.sum()), possible)

    def combination(self, index: int) -> dict[int, int]:
        """Axis to place, of the combination at an index."""
        which = int(np.searchsorted(self.starts, index, side="right")) - 1
        rest = index - self.starts[which]
        places = {}
        for axis, stride in zip(self.places[which].tolist(), self.strides[which].tolist(), strict=True):
            places[axis], rest = divmod(rest, stride)
        return places


def covering_rows(space: Space, strength: int, seed: int, *, share: float = 1.0) -> Iterator[list[int]]:
    """Rows of places, one for each axis, until `share` of the possible combinations of `strength` axes occur."""
    random = np.random.RandomState([seed % 2**32, strength])  # of numpy's, the one whose numbers stay as they are
    tally = Tally(space, strength)
    possible = np.argwhere(space.possible)
    while tally.coverage.share < share:
        missing = np.flatnonzero(tally.missing)
        wanted = tally.combination(int(missing[random.randint(len(missing))]))
        rows = _candidates(space, possible, wanted, random)
        best = rows[tally.gains(rows).argmax()]
        tally.add(best[None])
        yield best.tolist()


def _candidates(space: Space, possible: Rows, wanted: dict[int, int], random: np.random.RandomState) -> Rows:
    """Random rows that have the wanted combination."""
    fits = np.ones(len(possible), dtype=bool)
    for at, place in enumerate(space.constrained):
        if place in wanted:
            fits &= possible[:, at] == wanted[place]
    chosen = possible[fits]
    rows = np.stack([random.randint(size, size=CANDIDATES) for size in space.sizes], axis=1)
    rows[:, space.constrained] = chosen[random.randint(len(chosen), size=CANDIDATES)]
    for place, value in wanted.items():
        rows[:, place] = value
    return rows
