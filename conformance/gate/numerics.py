"""The numerics gate: whether outputs changed, and whether errors grew, case by case, against a stored run.

A check passes whatever lies within the bound; a kernel that rounds once more may still lie within it. Beside its own
former self it does not: the same case, on the same kind of device, has an error that is larger in nearly every case.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from statistics import median

from fp8moe.counted import counted

ALPHA = 0.005
"""Probability that any cell of a run is called worse though its errors are drawn anew and nothing else changed; the
same again for better."""


class Change(str, Enum):
    """Of one cell, a backend on a scheme, between two runs of the same cases."""

    SAME_BITS = "same bits"
    WORSE = "worse"
    """Other bits, and errors that grew in more cases than chance makes them."""
    BETTER = "better"
    CHANGED = "other bits"
    """Other bits, and errors that are now larger, now smaller, or in too few cases to tell."""
    GONE = "gone"
    """Cases of the baseline that the backend does not run any more."""


@dataclass(frozen=True)
class CaseFigures:
    """What one case came to.

    Args:
        digest: SHA-256 of the output's bytes, the first 16 hexadecimal digits.
        error: root mean square of the output's distance from the recipe's exact result, over that result's own; 0 where
            both are 0.
        error_over_bound: the largest of an element.
    """

    digest: str
    error: float
    error_over_bound: float


@dataclass(frozen=True)
class CellChange:
    """The verdict on one cell.

    Args:
        cell: "BACKEND SCHEME".
        cases: in both runs; where they are gone, in the baseline alone.
        differing: with other bits.
        larger, smaller: with a larger or smaller error.
        chance: of at least so many larger (for better: smaller) ones, were both alike.
        before, after: medians over the cases of the error, and of the largest error/bound.
        worst: the case whose error grew most, and by how much it is multiplied.
    """

    cell: str
    change: Change
    cases: int
    differing: int
    larger: int
    smaller: int
    chance: float
    before: tuple[float, float]
    after: tuple[float, float]
    worst: tuple[str, float]

    def __str__(self) -> str:
        if self.change is Change.GONE:
            return (
                f"{self.cell}: {counted(self.cases, 'case')} of the baseline not run any more, such as {self.worst[0]}"
            )
        if self.change is Change.SAME_BITS:
            return f"{self.cell}: {self.change.value} in {counted(self.cases, 'case')}"
        return (
            f"{self.cell}: {self.change.value}: {self.differing} of {self.cases} cases have other bits, the error is "
            f"larger in {self.larger} and smaller in {self.smaller} (chance {self.chance:.2g}); median error "
            f"{self.before[0]:.3g} became {self.after[0]:.3g}, error/bound {self.before[1]:.3g} became "
            f"{self.after[1]:.3g}; most in {self.worst[0]}, times {self.worst[1]:.3g}"
        )


Cells = Mapping[str, Mapping[str, CaseFigures]]
"""By cell, then by case."""


def compare_numerics(before: Cells, after: Cells, alpha: float = ALPHA) -> list[CellChange]:
    """The verdict on each cell, by an exact sign test of the cases whose error changed, Holm's over cells.

    How much errors grow plays no part: an output outside its bound is no matter for a comparison, and gives no figures.
    In a cell of fewer than eight cases chance alone could have made all of them larger: it is never called worse.
    Under the null hypothesis that only chance moves an error (a backend that is not deterministic), it is as often
    larger as smaller, so the number of larger ones among n that changed is binomial with 1/2.

    Raises:
        ValueError: a cell or a case of `after` that is not in `before`.
    """
    found = [_change(cell, before, cases) for cell, cases in after.items()]
    gone = [
        _gone(cell, cases, after.get(cell, {}))
        for cell, cases in before.items()
        if set(cases) - set(after.get(cell, {}))
    ]
    worse = _rejected({one.cell: _tail(one.larger, one.larger + one.smaller) for one in found}, alpha)
    better = _rejected({one.cell: _tail(one.smaller, one.larger + one.smaller) for one in found}, alpha)
    return [*gone, *(_concluded(one, one.cell in worse, one.cell in better) for one in found)]


def _gone(cell: str, before: Mapping[str, CaseFigures], after: Mapping[str, CaseFigures]) -> CellChange:
    missing = [case for case in before if case not in after]
    figures = _medians([before[case] for case in missing])
    return CellChange(cell, Change.GONE, len(missing), 0, 0, 0, 1.0, figures, figures, (missing[0], 1.0))


def _change(cell: str, before: Cells, after: Mapping[str, CaseFigures]) -> CellChange:
    missing = sorted(after if cell not in before else set(after) - set(before[cell]))
    if missing:
        raise ValueError(
            f"{cell}: {counted(len(missing), 'case')} not in the baseline, such as {missing[0]}: write it anew"
        )
    pairs = {case: (before[cell][case], figures) for case, figures in after.items()}
    larger = sum(new.error > old.error for old, new in pairs.values())
    smaller = sum(new.error < old.error for old, new in pairs.values())
    differing = sum(new.digest != old.digest for old, new in pairs.values())
    growth = {case: _over(new.error, old.error) for case, (old, new) in pairs.items()}
    worst = max(growth, key=lambda case: growth[case])
    return CellChange(
        cell,
        Change.CHANGED if differing else Change.SAME_BITS,
        len(pairs),
        differing,
        larger,
        smaller,
        _tail(max(larger, smaller), larger + smaller),
        _medians([old for old, _ in pairs.values()]),
        _medians([new for _, new in pairs.values()]),
        (worst, growth[worst]),
    )


def _concluded(one: CellChange, worse: bool, better: bool) -> CellChange:
    change = Change.WORSE if worse else Change.BETTER if better else one.change
    return CellChange(**{**vars(one), "change": change})


def _over(new: float, old: float) -> float:
    return new / old if old else (1.0 if new == old else math.inf)


def _medians(figures: Sequence[CaseFigures]) -> tuple[float, float]:
    return median(one.error for one in figures), median(one.error_over_bound for one in figures)


def _tail(count: int, of: int) -> float:
    """P(at least `count` of `of`), each 1/2."""
    return float(sum(math.comb(of, k) for k in range(count, of + 1)) / 2**of)


def _rejected(chances: Mapping[str, float], alpha: float) -> set[str]:
    """Holm's step-down: from the smallest chance on, each below alpha over those that are left."""
    found: set[str] = set()
    for cell in sorted(chances, key=lambda name: chances[name]):
        if not chances[cell] <= alpha / (len(chances) - len(found)):
            break
        found.add(cell)
    return found
