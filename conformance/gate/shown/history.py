"""A cell's time over its yardstick's from run to run: which runs are comparable, and what the last one changed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from statistics import fmean

from conformance.gate.baseline import Baseline
from conformance.gate.policy import DEFAULT
from conformance.gate.record import CellRecord, Record

LEVEL = DEFAULT.same_level
"""With which either limit of a run is wrong; the limits are those of the noise within one process."""


@dataclass(frozen=True)
class Dated:
    """One run of a history.

    Args:
        date: ISO 8601; without an offset it counts as UTC.
        record: of one process.
    """

    date: str
    record: Record

    @property
    def when(self) -> float:
        """Seconds since the epoch.

        Raises:
            ValueError: not ISO 8601.
        """
        try:
            at = datetime.fromisoformat(self.date.replace("Z", "+00:00"))
        except ValueError:
            raise ValueError(f"date={self.date!r}: expected ISO 8601, such as 2026-11-24T03:17:00+00:00") from None
        return (at if at.tzinfo else at.replace(tzinfo=timezone.utc)).timestamp()


def dated(baselines: Iterable[Baseline]) -> list[Dated]:
    """All records of some baselines, each with its baseline's date."""
    return [Dated(baseline.date, record) for baseline in baselines for record in baseline.speed]


@dataclass(frozen=True)
class Point:
    """One cell in one run; points are comparable where `kind`, the setting and the yardstick, is the same."""

    date: str
    when: float
    kind: Mapping[str, str]
    found: CellRecord

    @property
    def measured(self) -> bool:
        return math.isfinite(self.found.log_ratio)

    @property
    def ratio(self) -> float:
        """Time over the yardstick's."""
        return math.exp(self.found.log_ratio)

    @property
    def limits(self) -> tuple[float, float]:
        """Of the ratio; where no spread is known, the ratio itself."""
        at = self.found.estimate
        return (math.exp(at.low(LEVEL)), math.exp(at.high(LEVEL))) if math.isfinite(at.spread) else (self.ratio,) * 2

    def what_changed(self, before: Point) -> str:
        """In words, by name; "" where both are comparable."""
        names = [name for name in {**before.kind, **self.kind} if before.kind.get(name) != self.kind.get(name)]
        return "; ".join(f"{name} {before.kind.get(name)} became {self.kind.get(name)}" for name in names)


@dataclass(frozen=True)
class History:
    """One cell's points, by date; at least one."""

    cell: str
    points: Sequence[Point]

    @property
    def last(self) -> list[Point]:
        """Those of the last date."""
        return [point for point in self.points if point.when == self.points[-1].when]

    @property
    def mean_before(self) -> float | None:
        """The mean log ratio of all before the last date that are comparable with it; None where there is none."""
        last = self.points[-1]
        older = [point for point in self.points if point.when < last.when and point.kind == last.kind]
        ratios = [point.found.log_ratio for point in older if point.measured]
        return fmean(ratios) if ratios else None

    @property
    def change(self) -> float:
        """By how much the log ratio of the last date exceeds the mean before it; NaN where that cannot be said."""
        ratios = [point.found.log_ratio for point in self.last if point.measured]
        before = self.mean_before
        return fmean(ratios) - before if ratios and before is not None else math.nan

    def __str__(self) -> str:
        if not math.isnan(self.change):
            return f"last {math.expm1(self.change):+.2%} against the mean before"
        if any(point.measured for point in self.last):
            return "nothing to compare the last run with"
        return "in the last run too few rounds were valid"


def histories(runs: Iterable[Dated]) -> dict[str, History]:
    """Of every cell that any run has, by its name; runs may come in any order.

    Raises:
        ValueError: a bad date.
    """
    points: dict[str, list[Point]] = {}
    for run in sorted(runs, key=lambda run: run.when):
        for cell, found in run.record.cells.items():
            kind = {**run.record.setting, "yardstick": found.yardstick}
            points.setdefault(cell, []).append(Point(run.date, run.when, kind, found))
    return {cell: History(cell, of_cell) for cell, of_cell in points.items()}


def worst(found: Mapping[str, History], most: int) -> list[History]:
    """The few whose last date lies highest over what was before it; where that cannot be said, they come last."""

    def key(history: History) -> float:
        return math.inf if math.isnan(history.change) else -history.change

    return sorted(found.values(), key=key)[:most]
