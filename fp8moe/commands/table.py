"""`fp8moe table`: the kept decision table, what the code decides otherwise, and the acceptance of that."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
from rich.text import Text

from conformance.decisions.changes import Change
from conformance.decisions.decided import Decided, DecisionsError, decide_grid
from conformance.decisions.declared import once_each
from conformance.decisions.kept import FILE, Entry, Kept, read, read_any_grid
from conformance.decisions.labels import OUTCOMES, outcome_text, rule_text
from conformance.decisions.review import Review, accept, review, said
from conformance.decisions.words import in_words
from conformance.selection.axes import AXES, AXIS
from conformance.selection.grid import GRID
from conformance.selection.outcomes import NO_BACKEND
from fp8moe.commands import tables
from fp8moe.commands.question import BadInput
from fp8moe.counted import counted

Counts = dict[str, dict[str, int]]
"""By device, how many cells have each outcome; a cell of two products counts once."""

SECONDS = 5.0
"""Between two lines of progress."""


def kept_table(path: Path | None) -> Kept:
    """The kept table.

    Raises:
        BadInput: the file cannot be used.
    """
    try:
        return read(path or FILE)
    except DecisionsError as error:
        raise BadInput(str(error)) from None


def compared(path: Path | None, lines: int) -> Review:
    """A kept table beside what the code decides, in at most so many lines.

    Raises:
        BadInput: the file cannot be used.
    """
    kept_table(path)  # before a minute's work
    try:
        return review(_decided(), path or FILE, lines=lines)
    except DecisionsError as error:
        raise BadInput(str(error)) from None


def accepted(path: Path | None, reason: str) -> Entry:
    """Makes what the code decides the kept table.

    Raises:
        BadInput: no reason, nothing to accept, or a file that cannot be used.
    """
    try:
        said(reason)  # before a minute's work, as what the file holds
        if (path or FILE).exists():
            read_any_grid(path or FILE)
        return accept(_decided(), reason, path or FILE)
    except DecisionsError as error:
        raise BadInput(str(error)) from None


def _decided() -> Decided:
    last = monotonic()

    def tell(done: int, total: int) -> None:
        nonlocal last
        if monotonic() - last >= SECONDS:
            last = monotonic()
            print(f"{done:,} of {total:,} cells selected", file=sys.stderr, flush=True)

    return decide_grid(progress=tell)


def outcomes_of(kept: Kept) -> Counts:
    """How often each device has each outcome; devices in the grid's order."""
    device = AXIS["device"]
    names = AXES[device].names
    found: dict[str, Counter[int]] = {name: Counter() for name in names}
    for product, labels, once in zip(GRID, kept.table.expand().labels, once_each(GRID), strict=True):
        chosen = product.choices[device]  # the first axis, so that each device's cells are one piece
        pieces = zip(np.split(labels, len(chosen)), np.split(once, len(chosen)), strict=True)
        for value, (piece, counts) in zip(chosen, pieces, strict=True):
            outcomes, often = np.unique(piece[counts] % OUTCOMES, return_counts=True)
            found[names[value]].update(dict(zip(outcomes.tolist(), often.tolist(), strict=True)))
    return {name: {outcome_text(code): n for code, n in sorted(codes.items())} for name, codes in found.items()}


def print_summary(kept: Kept, path: Path | None) -> None:
    """Which backend each device has how often, in per cent of its cells; then the log's last line."""
    out = tables.console()
    table = tables.table(
        "decisions, in % of a device's cells", "device", "cells", "a backend", "NONE", "an error", "detail"
    )
    counts = outcomes_of(kept)
    everywhere: Counter[str] = Counter()
    for outcomes in counts.values():
        everywhere.update(outcomes)
    for device, outcomes in {**counts, "all": dict(everywhere)}.items():
        table.add_row(device, *_row(outcomes))
    out.print(table)
    last = kept.log[-1] if kept.log else None
    out.print(
        "The grid's cells are chosen to tell rules apart, not to be common: a share is one of cells, not of uses."
    )
    out.print(
        f"{counted(kept.cells, 'cell')} in {counted(len(kept.table.rules), 'rule')}: {path or FILE}", soft_wrap=True
    )
    if last is not None:
        out.print(Text(f"accepted {last.date}, {last.cells:,} cells: {last.reason}"), soft_wrap=True)


_BACKENDS = tuple(outcome_text(code) for code in range(NO_BACKEND))
_NONE = outcome_text(NO_BACKEND)


def _row(outcomes: dict[str, int]) -> tuple[str, str, str, str, Text]:
    cells = sum(outcomes.values())
    selected = {name: n for name in _BACKENDS if (n := outcomes.get(name, 0))}
    none, all_selected = outcomes.get(_NONE, 0), sum(selected.values())
    often = sorted(selected, key=lambda name: -selected[name])
    return (
        f"{cells:,}",
        _per_cent(all_selected, cells),
        _per_cent(none, cells),
        _per_cent(cells - all_selected - none, cells),
        Text(", ".join(f"{name} {_per_cent(selected[name], cells)}" for name in often)),
    )


def _per_cent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f}" if part else "-"


def print_rules(kept: Kept) -> None:
    """Every rule in words, in their order."""
    for rule in kept.table.rules:
        print(f"{rule_text(rule.label):4}{outcome_text(rule.label)}: {in_words(rule.when) or 'anywhere else'}")


def summary_json(kept: Kept, path: Path | None) -> dict[str, Any]:
    return {
        "format": tables.FORMAT,
        "file": str(path or FILE),
        "grid": kept.grid,
        "cells": kept.cells,
        "rules": len(kept.table.rules),
        "devices": outcomes_of(kept),
        "log": [asdict(entry) for entry in kept.log],
    }


def review_json(found: Review) -> dict[str, Any]:
    told = found.difference
    return {
        "format": tables.FORMAT,
        "file": str(found.path),
        "same": not found,
        "cells": found.kept.cells,
        "changed": told.cells,
        "summarised": told.summarised,
        "untold": told.untold,
        "lines": [_change_json(change) for change in told.lines],
    }


def print_entry(entry: Entry, path: Path | None) -> None:
    """What was accepted."""
    print(f"{path or FILE}: accepted, {entry.cells:,} cells: {entry.reason}")
    for text in entry.changes:
        print(f"  {text}")


def entry_json(entry: Entry) -> dict[str, Any]:
    return {"format": tables.FORMAT, **asdict(entry)}


def _change_json(change: Change) -> dict[str, Any]:
    def counts(labels: Any) -> list[dict[str, Any]]:
        return [{"outcome": outcome_text(n), "rule": rule_text(n), "cells": cells} for n, cells in labels.items()]

    return {
        "when": {axis: list(values) for axis, values in change.when.items()},
        "kept": counts(change.kept),
        "now": counts(change.now),
        "cells": change.cells,
        "text": str(change),
    }
