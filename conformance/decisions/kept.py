"""The kept decision table: a JSON file with the grid it speaks of, its rules, why it changed, and a digest of it all.

The same decisions and the same log give the same bytes. A file that was cut off, edited, or is of another format or
grid is refused with what is wrong and what to do.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conformance.decisions.decided import DecisionsError
from conformance.decisions.declared import grid_digest
from conformance.decisions.labels import outcome_text, parse_label, rule_text
from conformance.decisions.table import Rule, Table, When, indices
from conformance.selection.axes import AXES, AXIS
from conformance.selection.grid import GRID, Product
from conformance.untrusted import Malformed, bytes_of, json_of, shown

FILE = Path(__file__).parents[1] / "decisions.json"
FORMAT, VERSION = "fp8moe decisions", 1
BYTES_AT_MOST = 500_000
MOST_BYTES = 16 * BYTES_AT_MOST
"""Of a file that is read; another version may write a larger one."""
ACCEPT = "fp8moe table --write --reason TEXT"
"""The command that makes the current decisions the kept ones."""

_ABOUT = (
    "What the selector decides in every cell of the grid that conformance/selection declares, and by which rule. "
    "Of the rules below the first holds whose conditions a cell meets: an axis has one of the values, or none of those "
    "under `not`; an axis that is not named may have any. Of cells outside the grid they say nothing. "
    f"Do not edit: `{ACCEPT}` rewrites the file."
)
_RESTORE = f"restore it from version control, or delete it and make it anew with `{ACCEPT}`"


class OtherGrid(DecisionsError):
    """The file speaks of another grid than the one that is declared now."""


@dataclass(frozen=True)
class Entry:
    """Why the table was changed: one line of its log."""

    date: str
    reason: str
    cells: int
    """Cells that were decided otherwise than before; of a first table, all."""
    changes: tuple[str, ...]
    """The difference in words; of a first table or a new grid, a line before it that says so."""


@dataclass(frozen=True)
class Kept:
    """What the file holds."""

    table: Table
    grid: str
    """Digest of the grid."""
    cells: int
    """The grid's cells; one of two products counts once."""
    log: tuple[Entry, ...]

    def render(self) -> str:
        """The file's text: one rule a line, ASCII, ending in a line feed."""
        told = self._told()
        lists = {name: ",\n".join(f"  {json.dumps(one)}" for one in told.pop(name)) for name in ("rules", "log")}
        head = ",\n".join(f" {json.dumps(name)}: {json.dumps(value)}" for name, value in told.items())
        body = ",\n".join(f' "{name}": [\n{lines}\n ]' for name, lines in lists.items())
        return f'{{\n{head},\n{body},\n "digest": "{_digest(self._told())}"\n}}\n'

    def _told(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "version": VERSION,
            "about": _ABOUT,
            "grid": {"digest": self.grid, "cells": self.cells},
            "rules": [_rule_told(rule) for rule in self.table.rules],
            "log": [
                {"date": entry.date, "reason": entry.reason, "cells": entry.cells, "changes": list(entry.changes)}
                for entry in self.log
            ],
        }

    def write(self, path: Path) -> None:
        """Puts the file in its place at once. Where it would be too large, the oldest entries lose their changes.

        Raises:
            DecisionsError: the rules alone are too large, or the file cannot be written.
        """
        kept = self
        while len(text := kept.render()) > BYTES_AT_MOST:
            longest = next((number for number, entry in enumerate(kept.log) if entry.changes), None)
            if longest is None:
                raise DecisionsError(f"{path}: the decisions take {len(text):,} bytes, more than {BYTES_AT_MOST:,}")
            kept = kept._without_changes(longest)
        made = path.with_name(f"{path.name}.{os.getpid()}")
        try:
            made.write_text(text, encoding="ascii", newline="\n")
            os.replace(made, path)
        except OSError as error:
            made.unlink(missing_ok=True)
            raise DecisionsError(f"{path}: {error.strerror}; a checkout that can be written to is needed") from None

    def _without_changes(self, number: int) -> Kept:
        entry = self.log[number]
        shorter = Entry(entry.date, entry.reason, entry.cells, ())
        return Kept(self.table, self.grid, self.cells, (*self.log[:number], shorter, *self.log[number + 1 :]))


def read(path: Path = FILE, products: Sequence[Product] = GRID) -> Kept:
    """The kept table.

    Raises:
        OtherGrid: it speaks of another grid than ``products``.
        DecisionsError: there is no such file, or it is cut off, edited, or of another format.
    """
    kept = read_any_grid(path)
    here = grid_digest(products)
    if kept.grid != here:
        there = ascii(kept.grid[:12])[1:-1]
        raise OtherGrid(
            f"{path}: it is the table of another grid (digest {there}, {kept.cells:,} cells) than is declared "
            f"here (digest {here[:12]}); make the table of this one with `{ACCEPT}`"
        )
    try:
        for rule in kept.table.rules:
            indices(rule.when)
    except ValueError as error:
        raise DecisionsError(f"{path}: {error}; {_RESTORE}") from None
    return kept


def read_any_grid(path: Path) -> Kept:
    """The kept table, whatever grid it speaks of.

    Raises:
        DecisionsError: there is no such file, or it is cut off, edited, or of another format.
    """
    try:
        content = bytes_of(path, MOST_BYTES, path)
    except Malformed as error:
        remedy = "name a file that can be read" if path.exists() else f"make it with `{ACCEPT}`"
        raise DecisionsError(f"{error}; {remedy}") from None
    try:
        told = json_of(content, path.name)
    except Malformed as error:
        raise DecisionsError(f"{path}: cut off or edited, it is no JSON of ours ({error}); {_RESTORE}") from None
    if not isinstance(told, dict) or told.get("format") != FORMAT:
        found = f"its format is {shown(told.get('format'))}" if isinstance(told, dict) else "it holds no object"
        raise DecisionsError(f"{path}: no decision table, {found} where {FORMAT!r} is expected; name another file")
    if told.get("version") != VERSION:
        version = shown(told.get("version"))
        raise DecisionsError(f"{path}: its version is {version}, and {VERSION} is known here; use the fp8moe it is of")
    digest = told.pop("digest", None)
    if digest != _digest(told):
        raise DecisionsError(
            f"{path}: edited, its digest {str(digest)[:12]!r} is not that of what it holds; {_RESTORE}"
        )
    try:
        return _parsed(told)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        why = f"{type(error).__name__}: {error}"
        raise DecisionsError(f"{path}: it holds what no table holds ({why}); {_RESTORE}") from None


def _parsed(told: Mapping[str, Any]) -> Kept:
    rules = tuple(Rule(_when_parsed(rule["when"]), parse_label(rule["then"], rule["by"])) for rule in told["rules"])
    log = tuple(Entry(e["date"], e["reason"], int(e["cells"]), tuple(map(str, e["changes"]))) for e in told["log"])
    return Kept(Table(rules), str(told["grid"]["digest"]), int(told["grid"]["cells"]), log)


def _rule_told(rule: Rule) -> dict[str, Any]:
    when: dict[str, Any] = {}
    for name, values in rule.when.items():
        rest = [value for value in AXES[AXIS[name]].names if value not in values]
        when[name] = {"not": rest} if len(rest) < len(values) else list(values)
    return {"when": when, "then": outcome_text(rule.label), "by": rule_text(rule.label)}


def _when_parsed(told: Mapping[str, Any]) -> When:
    """Conditions as values; of an axis that does not exist now as they stand, since another grid may have it."""
    when = {}
    for name, values in told.items():
        known = AXES[AXIS[name]].names if name in AXIS else ()
        left_out = values["not"] if isinstance(values, dict) else None
        when[name] = tuple(values) if left_out is None else tuple(value for value in known if value not in left_out)
    return when


def _digest(told: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(told, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
