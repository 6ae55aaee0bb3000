"""The check of the kept table against what a selector decides now, and the acceptance of what it decides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from conformance.decisions.changes import LINES, Difference, difference
from conformance.decisions.decided import Decided, DecisionsError
from conformance.decisions.declared import distinct_cells, grid_digest
from conformance.decisions.kept import ACCEPT, FILE, Entry, Kept, read, read_any_grid
from conformance.decisions.table import Table
from conformance.selection.grid import GRID, Product


@dataclass(frozen=True)
class Review:
    """A kept table beside what is decided now."""

    path: Path
    kept: Kept
    difference: Difference

    def __bool__(self) -> bool:
        """Whether something differs."""
        return bool(self.difference)

    def __str__(self) -> str:
        if not self:
            return f"every one of {self.kept.cells:,} cells is decided as {self.path.name} says"
        found = self.difference
        how = "; the first line that fits a cell holds" if len(found.lines) > 1 else ""
        how += "; summed up by the rule that decides now" if found.summarised else ""
        head = f"{found.cells:,} of {self.kept.cells:,} cells are decided otherwise than {self.path.name} says{how}:"
        tail = f"If that is meant, `{ACCEPT}` accepts it; commit the file."
        return "\n".join([head, *(f"  {text}" for text in found.texts), tail])


def review(now: Decided, path: Path = FILE, products: Sequence[Product] = GRID, lines: int = LINES) -> Review:
    """What is decided otherwise now than a kept table says, in so many lines; where nothing is, it takes a second.

    Raises:
        DecisionsError: the file cannot be used.
    """
    kept = read(path, products)
    return Review(path, kept, difference(kept.table.expand(products), now, products, lines))


def accept(
    now: Decided, reason: str, path: Path = FILE, products: Sequence[Product] = GRID, date: str | None = None
) -> Entry:
    """Makes what is decided now the kept table, and logs why; the entry.

    Args:
        reason: one sentence for whoever reads the log.
        date: of the entry, such as 2026-01-31; default: today, by UTC.

    Raises:
        DecisionsError: no reason, nothing to accept, or a file that cannot be used.
    """
    reason = said(reason)
    digest = grid_digest(products)
    log: tuple[Entry, ...] = ()
    cells = distinct_cells(products)
    changed = cells
    changes: tuple[str, ...] = ("the first table",)
    if path.exists():
        before = read_any_grid(path)
        log = before.log
        if before.grid == digest:
            found = review(now, path, products)
            if not found:
                raise DecisionsError(f"{path}: {found}; there is nothing to accept, and the file is as it was")
            changed, changes = found.difference.cells, found.difference.texts
        else:
            # A change of decisions must not pass unseen because the grid is changed along with it.
            by_old_rules = difference(before.table.adapted().expand(products), now, products)
            changed = by_old_rules.cells
            how = f"another grid than before, then of {before.cells:,} cells; by the rules kept for that one"
            changes = (how, *by_old_rules.texts) if by_old_rules else (f"{how}, nothing differs",)
    entry = Entry(date or datetime.now(timezone.utc).date().isoformat(), reason, changed, changes)
    Kept(Table.of(now, products), digest, cells, (*log, entry)).write(path)
    return entry


def said(reason: str) -> str:
    """A reason in one line.

    Raises:
        DecisionsError: there is none.
    """
    line = " ".join(reason.split())
    if not line:
        raise DecisionsError("--reason is empty; say in a sentence why the decisions change")
    return line
