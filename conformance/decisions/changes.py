"""What differs between two decisions of a grid, compressed to a few lines that a person reads.

The lines are an ordered list: the first that fits a cell holds for it. What was kept is a condition like any other, so
that a line need not say why a cell was decided as it was: ``activation = silu: TRITON [R8] -> MARLIN [R8]`` is every
cell with silu that rule R8 gave to TRITON and that no line before has taken. A cell that no line fits is unchanged.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from conformance.decisions import boxes
from conformance.decisions.decided import Decided
from conformance.decisions.declared import axis_values, cell_numbers
from conformance.decisions.labels import OUTCOMES, label_of, outcome_text, reading_order, rule_text
from conformance.decisions.merging import Merged, merge
from conformance.decisions.table import When, conditions
from conformance.decisions.words import in_words
from conformance.selection.axes import AXES
from conformance.selection.facts import Array
from conformance.selection.grid import GRID, Product
from conformance.selection.model import RULES
from fp8moe.counted import counted

LINES = 20
"""A difference has at most so many."""
NAMED = 3
"""Outcomes named on one side of a line; of more the number is told, and the commonest."""

_SCAN = label_of(0, RULES.index("R8"))


@dataclass(frozen=True)
class Change:
    """One line: in the cells that meet every condition, were decided as ``kept`` says and fit no line before.

    ``kept`` and ``now`` are labels and how many of the cells have each; ``now`` is a single one unless the difference
    is summarised.
    """

    when: When
    kept: Mapping[int, int]
    now: Mapping[int, int]

    @property
    def cells(self) -> int:
        return sum(self.now.values())

    def __str__(self) -> str:
        where = in_words(self.when) or "anywhere"
        cells = counted(self.cells, "cell")
        return f"{where}: {_labels_in_words(self.kept)} -> {_labels_in_words(self.now)} ({cells})"


@dataclass(frozen=True)
class Difference:
    """All that differs; a cell of two products counts once."""

    lines: tuple[Change, ...]
    cells: int
    """Cells that are decided otherwise."""
    untold: int
    """Those among them that no line tells of, where there would be too many lines."""
    summarised: bool
    """Whether lines tell only by which rule cells are decided now, and how often as what."""

    def __bool__(self) -> bool:
        return self.cells > 0

    def __str__(self) -> str:
        return "\n".join(self.texts)

    @property
    def texts(self) -> tuple[str, ...]:
        """The lines as texts, one more where not all is told."""
        rest = [f"and {counted(self.untold, 'cell')} more, in no pattern of a few lines"] if self.untold else []
        return (*map(str, self.lines), *rest)


def difference(kept: Decided, now: Decided, products: Sequence[Product] = GRID, lines: int = LINES) -> Difference:
    """What is decided otherwise now, in at most so many lines.

    Each line has one new decision where the lines suffice; else the new decisions of one rule, or of the scan and what
    comes of it when nothing fits (R8, R9), are taken together.
    """
    changed = kept.differs(now)
    if not any(len(numbers) for numbers in changed):
        return Difference((), 0, 0, False)
    cells = _Cells.of(kept, now, changed, products)
    found, untold = _lines(cells, _compared(kept, now, changed, products, _itself), _itself, lines)
    if not untold:
        return Difference(found, len(cells.kept), 0, False)
    # One line is left for what even these do not tell.
    found, untold = _lines(cells, _compared(kept, now, changed, products, _by_rule), _by_rule, lines - 1)
    return Difference(found, len(cells.kept), untold, True)


def _itself(label: int) -> int:
    return label


def _by_rule(label: int) -> int:
    return min(label // OUTCOMES * OUTCOMES, _SCAN)


@dataclass(frozen=True)
class _Cells:
    """The cells that are decided otherwise, each once: their axes' values and both labels."""

    values: Array
    kept: Array
    now: Array

    @classmethod
    def of(cls, kept: Decided, now: Decided, changed: Sequence[Array], products: Sequence[Product]) -> _Cells:
        cells = np.concatenate([cell_numbers(p, n) for p, n in zip(products, changed, strict=True) if len(n)])
        cells, first = np.unique(cells, return_index=True)
        before, after = (
            np.concatenate([labels[numbers] for labels, numbers in zip(decided.labels, changed, strict=True)])[first]
            for decided in (kept, now)
        )
        return cls(axis_values(cells), before, after)


@dataclass(frozen=True)
class _Compared:
    """Merged cells in which something that changes somewhere was decided; one more axis than ``AXES``: what was."""

    merged: Merged
    columns: Array
    before: tuple[int, ...]
    """The labels of that axis's classes."""
    after: tuple[int, ...]
    """Kinds of decisions that are new."""
    kinds: Array
    """For each cell the index into ``after`` plus one; 0 where it is unchanged."""

    @property
    def sizes(self) -> tuple[int, ...]:
        return (*self.merged.sizes, len(self.before))


def _compared(
    kept: Decided, now: Decided, changed: Sequence[Array], products: Sequence[Product], kind: Callable[[int], int]
) -> _Compared:
    before = _met(kept, changed)
    new = _met(now, changed)
    after = tuple(sorted({kind(label) for label in new}, key=reading_order))
    # One code for both: 0 where what was kept never changes, so that such cells need not be told apart.
    first = np.zeros(1 << 16, dtype=np.int32)
    first[list(before)] = 1 + np.arange(len(before)) * (len(after) + 1)
    second = np.zeros(1 << 16, dtype=np.int32)
    second[list(new)] = [1 + after.index(kind(label)) for label in new]
    codes = []
    for was, is_now in zip(kept.labels, now.labels, strict=True):
        code = first[was]
        codes.append(np.where((was != is_now) & (code > 0), code + second[is_now], code))
    merged = merge(products, codes)
    concerned = merged.labels > 0
    was, kinds = np.divmod(merged.labels[concerned] - 1, len(after) + 1)
    columns = np.concatenate([merged.columns[:, concerned], was[None].astype(np.uint16)])
    return _Compared(merged, columns, before, after, kinds)


def _met(decided: Decided, changed: Sequence[Array]) -> tuple[int, ...]:
    found = {int(c) for labels, n in zip(decided.labels, changed, strict=True) for c in np.unique(labels[n])}
    return tuple(sorted(found, key=reading_order))


def _lines(
    cells: _Cells, compared: _Compared, kind: Callable[[int], int], at_most: int
) -> tuple[tuple[Change, ...], int]:
    """At most so many lines, and how many cells they leave untold."""
    found: list[Change] = []
    left = np.ones(len(cells.kept), dtype=bool)
    taken = np.zeros(len(compared.kinds), dtype=bool)
    merged, kinds = compared.merged, compared.kinds
    columns = np.stack([classes[values] for classes, values in zip(merged.classes, cells.values, strict=True)])
    positions = np.searchsorted(np.sort(compared.before), cells.kept)
    was = np.argsort(compared.before)[positions]
    columns = np.concatenate([columns, was[None].astype(np.uint16)])
    for number, after in enumerate(compared.after, 1):
        here = kinds == number
        # A cell that was decided so before and still is contradicts no line that says it is.
        as_said = (kinds == 0) & (np.asarray(compared.before)[compared.columns[-1]] == after) & (kind is _itself)
        wanted, unwanted = compared.columns[:, here], compared.columns[:, ~(here | taken | as_said)]
        for box, held in islice(boxes.cover(wanted, unwanted, compared.sizes), at_most - len(found) + 1):
            if len(found) == at_most:
                return tuple(found), int(np.count_nonzero(left))
            smallest = boxes.met(wanted[:, held], compared.sizes)
            fits = left & boxes.holds(smallest, columns)
            left &= ~fits
            seen = boxes.met(cells.values[:, fits], [len(axis) for axis in AXES])
            when = conditions((seen, merged.values(smallest[:-1]), merged.values(box[:-1])))
            found.append(Change(when, _counted(cells.kept[fits]), _counted(cells.now[fits])))
        taken |= here
    return tuple(found), int(np.count_nonzero(left))


def _counted(labels: Array) -> Mapping[int, int]:
    found, counts = np.unique(labels, return_counts=True)
    told = dict(zip(found.tolist(), counts.tolist(), strict=True))
    return {label: told[label] for label in sorted(told, key=reading_order)}


def _labels_in_words(labels: Mapping[int, int]) -> str:
    """``DEEPGEMM or TRITON [R8]``; where they are many, how many and the commonest."""
    by_rule: dict[str, list[int]] = {}
    for label in labels:
        by_rule.setdefault(rule_text(label), []).append(label)
    if len(labels) <= NAMED:
        return " or ".join(f"{' or '.join(map(outcome_text, found))} [{rule}]" for rule, found in by_rule.items())
    texts: Counter[str] = Counter()
    for label, count in labels.items():
        texts[outcome_text(label)] += count
    commonest = ", ".join(f"{text} {count:,}" for text, count in texts.most_common(NAMED))
    return f"{len(texts)} outcomes [{', '.join(by_rule)}], most often {commonest}"
