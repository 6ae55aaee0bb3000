"""A gate run as Markdown: a comment under a pull request, cut to what GitHub takes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from conformance.gate.numerics import CellChange, Change
from conformance.gate.result import GateResult
from conformance.gate.shown import words
from conformance.gate.shown.escapes import code, prose
from conformance.gate.verdicts import CellVerdict, Outcome
from fp8moe.counted import counted

MARK = "<!-- fp8moe gate -->"
"""The first line, by which a later run finds the comment that it replaces."""
MOST = 60_000
"""Characters. GitHub takes 65,536 in a comment; the rest is room for what a workflow adds."""
ROOM = 60
"""For the line that tells what was left out."""
LINE = 500
"""Characters of one rule or reason."""


@dataclass(frozen=True)
class _Block:
    """A heading, rows of which as many are shown as there is room for, and what comes behind them."""

    head: str
    rows: Sequence[str] = ()
    tail: str = ""
    noun: str = "row"

    def text(self, count: int) -> str:
        left = len(self.rows) - count
        more = f"\n\n{counted(left, self.noun)} left out here, for want of room.\n" if left else ""
        return self.head + "".join(self.rows[:count]) + more + self.tail

    @property
    def least(self) -> int:
        return len(self.head) + len(self.tail) + (ROOM if self.rows else 0)


def markdown(result: GateResult, most: int = MOST) -> str:
    """The whole run; what is worse stands first and is the last to be left out.

    Args:
        most: characters, at most. What is too much is left out, and a line says how many rows that were.

    Raises:
        ValueError: fewer than even the headings take.
    """
    blocks = [_top(result), *_decisions(result), *_numerics(result), *_speed(result), *_left(result), _facts(result)]
    counts = _shares(blocks, most)
    return "\n".join(block.text(count).rstrip("\n") + "\n" for block, count in zip(blocks, counts, strict=True))


def _shares(blocks: Sequence[_Block], most: int) -> list[int]:
    """Rows of each block that fit: first in an equal share for each, so that none is silent, then in what is over."""
    room = most - sum(block.least + 2 for block in blocks)
    if room < 0:
        raise ValueError(f"most={most}: at least {most - room} characters, which the headings take")
    counts = [0] * len(blocks)
    used = 0
    for allowed in (room // len(blocks), room):
        for number, block in enumerate(blocks):
            here = sum(map(len, block.rows[: counts[number]]))
            while counts[number] < len(block.rows):
                size = len(block.rows[counts[number]])
                if here + size > allowed or used + size > room:
                    break
                counts[number], here, used = counts[number] + 1, here + size, used + size
    return counts


def _table(columns: Sequence[str]) -> str:
    return _row(columns) + _row(["---"] * len(columns))


def _row(fields: Sequence[str]) -> str:
    return f"| {' | '.join(fields)} |\n"


def _folded(summary: str, head: str, rows: Sequence[str]) -> _Block:
    # GitHub reads Markdown inside an element only behind an empty line.
    return _Block(f"<details><summary>{summary}</summary>\n\n{head}", rows, "\n</details>\n")


def _top(result: GateResult) -> _Block:
    rows = [
        _row([part, f"**{words.STATUSES[status]}**", prose(words.found(result, part), LINE)])
        for part, status in result.parts.items()
    ]
    head = f"{MARK}\n## fp8moe gate: {prose(words.headline(result))}\n\n"
    compared = f"Compared: {prose(result.compared)}; on {prose(result.device)}\n\n"
    return _Block(f"{head}{compared}{_table(('part', 'verdict', 'found'))}{''.join(rows)}")


def _decisions(result: GateResult) -> list[_Block]:
    if result.decisions is None or not result.decisions.lines:
        return []
    rows = [f"- {code(line, LINE)}\n" for line in result.decisions.lines]
    return [_Block("### Decisions\n\nDecided otherwise, the first line that fits a cell:\n\n", rows, noun="line")]


NUMERICS = ("cell", "change", "other bits", "error larger / smaller", "median error", "error/bound", "grew most in")
SPEED = ("cell", "outcome", "ratio", "limits", "margin", "samples")


def _numerics(result: GateResult) -> list[_Block]:
    if not result.numerics:
        return []
    cells = words.by_change(result.numerics)
    same = [cell for cell in cells if cell.change is Change.SAME_BITS]
    rows = [_row(_change(cell)) for cell in cells if cell.change is not Change.SAME_BITS]
    blocks = [_Block(f"### Numerics\n\n{_table(NUMERICS)}", rows)] if rows else [_Block("### Numerics\n")]
    if same:
        folded = [_row([code(cell.cell), str(cell.cases)]) for cell in same]
        blocks.append(_folded(f"{counted(len(same), 'cell')} with the same bits", _table(("cell", "cases")), folded))
    return blocks


def _change(cell: CellChange) -> list[str]:
    grown = "" if math.isnan(cell.worst[1]) else f" times {cell.worst[1]:.3g}"
    return [
        code(cell.cell),
        f"**{cell.change.value}**" if cell.change in (Change.WORSE, Change.GONE) else cell.change.value,
        f"{cell.differing} of {cell.cases}",
        f"{cell.larger} / {cell.smaller} (chance {cell.chance:.2g})",
        words.before_after((cell.before[0], cell.after[0])),
        words.before_after((cell.before[1], cell.after[1])),
        code(cell.worst[0]) + grown,
    ]


def _speed(result: GateResult) -> list[_Block]:
    if result.speed is None:
        return []
    cells = words.by_outcome(result.speed.cells)
    same = [_row(_verdict(cell)) for cell in cells if cell.outcome is Outcome.SAME]
    rows = [_row(_verdict(cell)) for cell in cells if cell.outcome is not Outcome.SAME]
    head = f"### Speed\n\n{prose(words.speed_note(result), LINE)}\n\n"
    blocks = [_Block(head + (_table(SPEED) if rows else ""), rows)]
    if same:
        blocks.append(_folded(f"{counted(len(same), 'cell')} the same", _table(SPEED), same))
    return blocks


def _verdict(cell: CellVerdict) -> list[str]:
    outcome = cell.outcome.value if cell.reason is None else f"{cell.outcome.value}: {cell.reason.value}"
    return [
        code(cell.cell),
        f"**{outcome}**" if cell.outcome is Outcome.SLOWER else outcome,
        words.ratio(cell),
        words.limits(cell),
        f"{cell.margin:.2%}",
        prose(words.samples(cell)),
    ]


def _left(result: GateResult) -> list[_Block]:
    rows = [f"- **{prose(name)}**: {prose(why, LINE)}\n" for name, why in words.left(result)]
    return [_Block("### Not run\n\n", rows, noun="line")] if rows else []


def _facts(result: GateResult) -> _Block:
    rows = [_row([prose(name), prose(value, LINE)]) for name, value in words.facts(result)]
    return _Block(f"### Device and versions\n\n{_table(('', ''))}", rows)
