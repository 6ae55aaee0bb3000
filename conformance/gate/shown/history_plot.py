"""The history of a few cells as an SVG: a panel each, a dot with limits for each run, over dates."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from statistics import fmean

from conformance.gate.shown import svg, words
from conformance.gate.shown.history import LEVEL, Dated, History, Point, histories, worst
from conformance.gate.shown.plots import THICK, round_step
from conformance.gate.shown.svg import CHAR, LINE, line, text
from fp8moe.counted import counted

MOST = 6
"""Panels, unless cells are named."""
WIDTH, PAD, LEFT, RIGHT = 1000.0, 16.0, 80.0, 984.0
HEAD, PANEL, ABOVE, BETWEEN = 70.0, 120.0, 24.0, 36.0
BESIDE = 8.0
"""Pixels between runs of one date."""
LABEL = 120.0
"""Pixels that a date takes."""
NAME_COLUMNS, NOTE_COLUMNS = 140, 140
KEY = (
    f"Dot: a run, large on the last date; whisker: the noise within its process, either limit wrong at {LEVEL:.0%}; "
    "x: too few valid rounds.",
    "Dashed: the mean of all before the last date that are comparable with it. Dotted: what is on its sides is not.",
)
TICKS = 5
"""Figures beside a panel, at most one more."""


def history_plot(runs: Iterable[Dated], cells: Sequence[str] | None = None, most: int = MOST) -> str:
    """A panel for each cell; a dot is a run, with its limits, and a line goes through the means of dates.

    Runs of another setting (device, driver, versions) or with another yardstick are not comparable: the line is broken
    there, and a numbered note says what changed.

    Args:
        runs: in any order.
        cells: their names; None: the few whose last run lies highest over what was before it.
        most: panels, where `cells` is None.

    Raises:
        ValueError: no run, a bad date, or a cell that no run has.
    """
    runs = list(runs)
    found = histories(runs)
    unknown = [cell for cell in cells or () if cell not in found]
    if not found or unknown:
        expected = f"expected some of {sorted(found)[:5]}" if found else "there is no run with a cell to draw"
        raise ValueError(f"cells={unknown}: {expected}")
    drawn = worst(found, max(most, 1)) if cells is None else [found[cell] for cell in cells]
    dates = _Dates.of(runs)
    notes: dict[str, int] = {}
    body, y = list[str](), HEAD
    for history in drawn:
        panel = _Panel.of(history, dates, y)
        body += panel.drawn(notes)
        y = panel.bottom + BETWEEN
    y += 8 * bool(notes)
    for note, number in notes.items():
        for part in svg.wrapped(f"[{number}] {note}", NOTE_COLUMNS, 3):
            body.append(text(PAD, y, part, "f8-muted"))
            y += LINE
    title = f"Time over the yardstick's, {counted(len(runs), 'run')}, {dates.said}"
    told = f"{title}. " + " ".join(f"{history.cell}: {history}." for history in drawn)
    if len(drawn) < len(found):
        title += f": {len(drawn)} of {counted(len(found), 'cell')}"
    head = [text(PAD, 26, title, "f8-ink f8-title")]
    head += [text(PAD, 46 + LINE * number, said, "f8-muted") for number, said in enumerate(KEY)]
    return svg.document("f8-history", (WIDTH, y), title, told, [*head, *body])


@dataclass(frozen=True)
class _Dates:
    """The axis that all panels share."""

    first: float
    last: float
    room: float
    said: str

    @classmethod
    def of(cls, runs: Sequence[Dated]) -> _Dates:
        times = sorted(run.when for run in runs)
        dates = [run.date[:10] for run in sorted(runs, key=lambda run: run.when)]
        beside = max(times.count(time) for time in times) - 1
        said = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
        return cls(times[0], times[-1], RIGHT - LEFT - 28 - BESIDE * beside, words.visible(said))

    def at(self, when: float) -> float:
        """The pixel of a time."""
        part = (when - self.first) / (self.last - self.first) if self.last > self.first else 0.5
        return LEFT + 14 + self.room * part


@dataclass(frozen=True)
class _Panel:
    """One cell's. Its names stand above `top`, values from `low` to `high` between there and `bottom`."""

    history: History
    dates: _Dates
    names: Sequence[str]
    start: float
    top: float
    low: float
    high: float

    @classmethod
    def of(cls, history: History, dates: _Dates, start: float) -> _Panel:
        names = svg.wrapped(history.cell, NAME_COLUMNS, 3)
        values = [value for point in history.points if point.measured for value in point.limits] or [1.0]
        middle, half = (min(values) + max(values)) / 2, (max(values) - min(values)) / 2
        half = max(1.12 * half, 0.002 * middle)  # with room for marks; not so near that nothing looks like a jump
        return cls(history, dates, names, start, start + LINE * (len(names) + 1) + ABOVE, middle - half, middle + half)

    @property
    def bottom(self) -> float:
        return self.top + PANEL

    def at(self, value: float) -> float:
        """The pixel of a ratio."""
        return self.bottom - PANEL * (value - self.low) / (self.high - self.low)

    def drawn(self, notes: dict[str, int]) -> list[str]:
        """Everything; what changed between runs is added to the notes."""
        y, points = self.start + LINE, self.history.points
        body = [text(PAD, y + LINE * k, name, "f8-ink f8-mono") for k, name in enumerate(self.names)]
        below = f"time over that of the yardstick {points[-1].found.yardstick}; {self.history}"
        body.append(text(PAD, y + LINE * len(self.names), below, "f8-muted"))
        body += [*self._figures(), *self._date_labels(), *self._changes(notes)]
        before = self.history.mean_before
        if before is not None:
            first = min(self.dates.at(point.when) for point in points if point.kind == points[-1].kind)
            level = self.at(math.exp(before))
            body.append(line(first, level, RIGHT, level, "f8-ink", 'stroke-dasharray="6 4"'))
        return [*body, *self._joined(), *self._dots()]

    def _figures(self) -> list[str]:
        step = round_step((self.high - self.low) / TICKS)
        digits = max(0, -math.floor(math.log10(step)))
        body = [line(LEFT, self.bottom, RIGHT, self.bottom, "f8-muted")]
        for count in range(math.ceil(self.low / step), math.floor(self.high / step) + 1):
            y = self.at(count * step)
            body.append(line(LEFT, y, RIGHT, y))
            body.append(text(LEFT - 8, y + 4, f"{count * step:.{digits}f}", "f8-muted", "end"))
        return body

    def _date_labels(self) -> list[str]:
        """Of as many dates as have room; the last always has one."""
        body, taken = list[str](), math.inf
        firsts = [of_date[0] for of_date in self._by_date()]
        length = 10 if len({point.date[:10] for point in firsts}) == len(firsts) else 16
        for point in reversed(firsts):
            x = self.dates.at(point.when)
            body.append(line(x, self.bottom, x, self.bottom + 4, "f8-muted"))
            if x + LABEL <= taken:
                taken = x
                said = point.date[:length].replace("T", " ")
                body.append(text(min(x, WIDTH - 4 - CHAR * length / 2), self.bottom + 18, said, "f8-muted", "middle"))
        return body

    def _changes(self, notes: dict[str, int]) -> list[str]:
        body = []
        for before, after in pairwise(self.history.points):
            changed = after.what_changed(before)
            if changed:
                number = notes.setdefault(changed, len(notes) + 1)
                x = (self.dates.at(before.when) + self.dates.at(after.when)) / 2
                body.append(line(x, self.top - 4, x, self.bottom, "f8-inconclusive", 'stroke-dasharray="2 3"'))
                body.append(text(x, self.top - 8, f"[{number}]", "f8-inconclusive", "middle"))
        return body

    def _by_date(self) -> list[list[Point]]:
        return [list(of_date) for _, of_date in groupby(self.history.points, key=lambda point: point.when)]

    def _x(self, place: int, point: Point) -> float:
        return self.dates.at(point.when) + BESIDE * place

    def _joined(self) -> list[str]:
        """A line through the means of dates, broken where runs are not comparable."""
        ends = []
        for of_date in self._by_date():
            measured = [(place, point) for place, point in enumerate(of_date) if point.measured]
            if measured:
                x = fmean(self._x(place, point) for place, point in measured)
                ends.append((x, self.at(fmean(point.ratio for _, point in measured)), [point for _, point in measured]))
        return [
            line(x1, y1, x2, y2, "f8-muted")
            for (x1, y1, before), (x2, y2, after) in pairwise(ends)
            if all(point.kind == after[0].kind for point in (*before, *after))
        ]

    def _dots(self) -> list[str]:
        last = self.history.points[-1].when
        return [
            self._dot(point, self._x(place, point), 4.5 if point.when == last else 3)
            for of_date in self._by_date()
            for place, point in enumerate(of_date)
        ]

    def _dot(self, point: Point, x: float, radius: float) -> str:
        date = svg.safe(point.date)
        if not point.measured:
            arms = f"M{x - 4:.1f},{self.bottom - 12:.1f} l8,8 m0,-8 l-8,8"
            told = f"<title>{date}: too few valid rounds</title>"
            return f'<path class="f8-muted" d="{arms}" fill="none" stroke="currentColor" {THICK}>{told}</path>'
        low, high = point.limits
        ends = [line(x - 3, self.at(end), x + 3, self.at(end), "f8-ink") for end in (low, high)]
        told = f"<title>{date}: {point.ratio:.5g} ({low:.5g} to {high:.5g})</title>"
        y = self.at(point.ratio)
        dot = f'<circle class="f8-ink" cx="{x:.1f}" cy="{y:.1f}" r="{radius}" fill="currentColor">{told}</circle>'
        return "".join([line(x, self.at(low), x, self.at(high), "f8-ink"), *ends, dot])
