"""The ratio of times of every cell with its limits and the margin, as an SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from conformance.gate.shown import svg, words
from conformance.gate.shown.svg import CHAR, LINE, box, line, mark, text
from conformance.gate.verdicts import CellVerdict, Outcome, RunVerdict
from fp8moe.counted import counted

ROWS = 60
"""Cells shown, unless told otherwise: a picture of some 2,000 pixels."""
WIDTH, PAD = 1100.0, 16.0
NAME_COLUMNS, NAME_LINES = 46, 4
LEFT = PAD + NAME_COLUMNS * CHAR + PAD
"""Where the plotting area begins."""
ACROSS = 380.0
"""Its width."""
RIGHT = LEFT + ACROSS + 2 * PAD
"""Where the outcome in words stands."""
WORD_COLUMNS = 32
TOP = 98.0
IN_SCALE = math.log(1.1)
"""Log ratios up to 10% are never beyond the axis, however small the others are."""
MOST_CELLS, ROOM = 0.8, 2
"""The axis spans at most so many times what most cells stay within; what is farther is an arrow at its end."""
TICKS = 4
"""On each side of 1, at most."""
DASHED, THICK = 'stroke-dasharray="2 3"', 'stroke-width="2"'


@dataclass(frozen=True)
class _Axis:
    """Log ratios from -half to half, over the plotting area."""

    half: float

    def at(self, log_ratio: float) -> float:
        """The pixel of a log ratio; the nearer end where it is beyond the axis."""
        return LEFT + ACROSS * (min(max(log_ratio / self.half, -1.0), 1.0) + 1) / 2

    def holds(self, log_ratio: float) -> bool:
        return abs(log_ratio) <= self.half

    @classmethod
    def over(cls, cells: Sequence[CellVerdict]) -> _Axis:
        extents = [max(abs(math.log(value)) for value in _values(cell)) for cell in cells if _values(cell)]
        margins = [3 * math.log1p(cell.margin) for cell in cells]
        most = max([IN_SCALE / 10, *extents])
        typical = max(ROOM * sorted(extents)[math.ceil(MOST_CELLS * len(extents)) - 1], IN_SCALE) if extents else most
        return cls(max([min(most, typical), *margins]) * 1.05)

    @property
    def wide(self) -> bool:
        """Whether half and double have room on it."""
        return self.half > math.log(2)

    def ticks(self) -> list[float]:
        """Ratios at round numbers of percent, or at powers of two where they have room; 1 among them."""
        if self.wide:
            stride = math.ceil(self.half / math.log(2) / TICKS)
            return [2.0 ** (stride * k) for k in range(-TICKS, TICKS + 1) if self.holds(stride * k * math.log(2))]
        step = round_step(math.expm1(self.half) / TICKS)
        count = int(math.expm1(self.half) / step)
        return [1 + step * k for k in range(-count, count + 1) if 1 + step * k > 0 and self.holds(math.log1p(step * k))]


def ratio_plot(verdict: RunVerdict, rows: int = ROWS) -> str:
    """A row a cell: name, a mark at the ratio, a whisker between the limits, the margin as a band, its outcome.

    Args:
        rows: at most; those that are the same are left out first, and a line says how many.

    Raises:
        ValueError: no row.
    """
    if rows < 1:
        raise ValueError(f"rows={rows}: at least 1")
    cells = words.by_outcome(verdict.cells)
    shown = cells[:rows]
    axis = _Axis.over(shown)
    labels = [svg.wrapped(cell.cell, NAME_COLUMNS, NAME_LINES) for cell in shown]
    said = [_said(cell) for cell in shown]
    heights = [max(len(label), len(lines)) * LINE + 9 for label, lines in zip(labels, said, strict=True)]
    bottom = TOP + sum(heights)
    counts = ", ".join(f"{len(verdict.of(outcome))} {outcome.value}" for outcome in words.OUTCOMES)
    title = f"Ratio of times of {counted(len(cells), 'cell')}: {counts}"
    body = [text(PAD, 26, title, "f8-ink f8-title"), *_legend(verdict)]
    y = TOP
    for cell, height in zip(shown, heights, strict=True):
        body.append(_band(cell, axis, y, height))
        y += height
    body += _scale(axis, bottom)
    y = TOP
    for cell, label, lines, height in zip(shown, labels, said, heights, strict=True):
        body += ["<g>", f"<title>{svg.safe(str(cell))}</title>", *_row(cell, label, lines, axis, y, height), "</g>"]
        y += height
    height = bottom + 40
    if len(cells) > len(shown):
        left = cells[len(shown) :]
        same = sum(cell.outcome is Outcome.SAME for cell in left)
        more = f"{counted(len(left), 'cell')} more, of which {same} the same: not drawn here"
        body.append(text(PAD, height, more, "f8-muted"))
        height += 24
    slower = ", ".join(cell.cell for cell in verdict.slower[:5]) or "none"
    told = (
        f"{title}. Slower: {slower}. Every cell is a row: its name, its ratio with both limits, its outcome in words."
    )
    return svg.document("f8-ratios", (WIDTH, height), title, told, body)


def round_step(about: float) -> float:
    """The least of 1, 2 and 5 times a power of ten that is not below."""
    power = 10.0 ** math.floor(math.log10(about))
    return min(times * power for times in (1, 2, 5, 10) if times * power >= about)


def _values(cell: CellVerdict) -> list[float]:
    return [value for value in (cell.ratio, cell.low, cell.high) if math.isfinite(value) and value > 0]


def _said(cell: CellVerdict) -> list[str]:
    """The outcome in words and figures, as lines."""
    figures = [words.NOT_MEASURED if math.isnan(cell.ratio) else f"{cell.ratio:.4f}  ({words.limits(cell)})"]
    return figures if cell.reason is None else [*figures, *svg.wrapped(cell.reason.value, WORD_COLUMNS, 2)]


def _legend(verdict: RunVerdict) -> list[str]:
    body, x = [], PAD
    for outcome in words.OUTCOMES:
        body += [mark(x + 6, 46, outcome), text(x + 18, 50, outcome.value)]
        x += 18 + 7 * len(outcome.value) + 22
    body += [box(x, 39, 26, 14, "f8-band"), text(x + 34, 50, "within the margin")]
    body += [line(x, 39, x, 53, "f8-muted", DASHED), line(x + 26, 39, x + 26, 53, "f8-muted", DASHED)]
    x += 34 + 7 * len("within the margin") + 22
    return [*body, text(x, 50, words.OF_WHAT[verdict.mode], "f8-muted")]


def _band(cell: CellVerdict, axis: _Axis, y: float, height: float) -> str:
    low, high = axis.at(-math.log1p(cell.margin)), axis.at(math.log1p(cell.margin))
    edges = [line(x, y, x, y + height, "f8-muted", DASHED) for x in (low, high)]
    return "".join([box(low, y, high - low, height, "f8-band"), *edges])


def _scale(axis: _Axis, bottom: float) -> list[str]:
    """Grid lines with their figures above and below, 1 with a line of its own."""
    body = [
        text(LEFT, TOP - 26, "← less time", "f8-muted"),
        text(LEFT + ACROSS, TOP - 26, "more time →", "f8-muted", "end"),
        text(PAD, TOP - 10, "cell", "f8-muted"),
        text(RIGHT, TOP - 10, "outcome, ratio (limits)", "f8-muted"),
    ]
    for tick in axis.ticks():
        label = f"{tick:.3g}" if axis.wide else f"{100 * (tick - 1):+.3g}%"
        x, one = axis.at(math.log(tick)), float(label.strip("%")) == (1 if axis.wide else 0)
        label = "1" if one else label
        body.append(line(x, TOP - 6, x, bottom + 6, "f8-ink" if one else "f8-grid"))
        body += [text(x, y, label, "f8-ink" if one else "f8-muted", "middle") for y in (TOP - 10, bottom + 20)]
    return body


def _row(
    cell: CellVerdict, label: Sequence[str], said: Sequence[str], axis: _Axis, y: float, height: float
) -> list[str]:
    middle = y + height / 2
    body = [line(PAD, y, WIDTH - PAD, y, "f8-grid")]
    first = middle - LINE * (len(label) - 1) / 2 + 4
    body += [text(PAD, first + LINE * k, name, "f8-ink f8-mono") for k, name in enumerate(label)]
    first = middle - LINE * (len(said) - 1) / 2 + 4
    strong = "f8-ink" if cell.outcome is Outcome.SAME else f"f8-{cell.outcome.value} f8-strong"
    body += [mark(RIGHT + 6, first - 4, cell.outcome), text(RIGHT + 18, first, cell.outcome.value, strong)]
    body += [text(RIGHT + 118, first + LINE * k, words_, "f8-ink") for k, words_ in enumerate(said)]
    if not any(map(math.isnan, (cell.ratio, cell.low, cell.high))):
        body += [*_whisker(cell, axis, middle), mark(axis.at(_log(cell.ratio)), middle, cell.outcome)]
    return body


def _whisker(cell: CellVerdict, axis: _Axis, y: float) -> list[str]:
    """Between the limits, with an end at each; an arrow where a limit is beyond the axis."""
    style = f"f8-{cell.outcome.value}"
    ends = [_log(cell.low), _log(cell.high)]
    body = [line(axis.at(ends[0]), y, axis.at(ends[1]), y, style, THICK)]
    for end in ends:
        x, way = axis.at(end), math.copysign(1, end)
        if axis.holds(end):
            body.append(line(x, y - 5, x, y + 5, style, THICK))
        else:
            points = f"M{x + 3 * way:.1f},{y - 5:.1f} l{6 * way:g},5 l{-6 * way:g},5"
            body.append(f'<path class="{style}" d="{points}" fill="none" stroke="currentColor" {THICK}/>')
    return body


def _log(value: float) -> float:
    return math.log(value) if value > 0 else -math.inf
