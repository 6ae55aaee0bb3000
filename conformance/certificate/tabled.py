"""Tables and lists of a certificate's page: of text that nobody vouches for, and of no more than fits onto the page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import islice
from typing import Any

from fp8moe.texts import clipped, visible

FIELD = 1_000
"""Characters of one field."""
ROOM = 100_000
"""Characters of one table or list as HTML; a page has a dozen of them."""
MARKUP, PART, BAR = 60, 40, 260
"""Characters around a field, at most, around each of its parts between commas, and of a bar."""


@dataclass(frozen=True)
class Field:
    """Text on one line, and the class that it has: one of the page's own words, never the certificate's.

    Args:
        bar: a part of one, which is drawn beside the text that says it, too; None for no bar.
    """

    text: str
    kind: str = ""
    bar: float | None = None

    @property
    def size(self) -> int:
        drawn = 0 if self.bar is None else BAR
        return len(escape(self.text)) + MARKUP + PART * self.text.count(", ") + drawn

    @property
    def drawn(self) -> str:
        """The length of the bar, of 100; "" for none."""
        return "" if self.bar is None else f"{100 * min(max(self.bar, 0.0), 1.0):.1f}"


@dataclass(frozen=True)
class Table:
    """
    Args:
        caption: in words; names it to a reader of the screen, too.
        columns: their heads.
        rows: that are shown.
        left: how many more there are.
    """

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Field]]
    left: int = 0


def field(value: Any, kind: str = "") -> Field:
    """A value as one line of at most FIELD characters, what no reader sees as its escape."""
    return Field(clipped(visible(said(value)[: 2 * FIELD]), FIELD), kind)


def said(value: Any) -> str:
    """A value of JSON in words."""
    if value is None or value == "":
        return "not known"
    if isinstance(value, dict):
        return ", ".join(f"{name} {said(each)}" for name, each in islice(value.items(), FIELD)) or "none"
    if isinstance(value, (list, tuple)):
        return ", ".join(said(each) for each in islice(value, FIELD)) or "none"
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def table(
    caption: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], most: int | None = None, room: int = ROOM
) -> Table:
    """
    Args:
        rows: of Fields, or of values that become one.
        most: rows, at most; None: as many as fit.
        room: characters, as HTML.
    """
    shown, left = list[list[Field]](), 0
    for row in rows:
        if room >= 0 and (most is None or len(shown) < most):
            fields = [each if isinstance(each, Field) else field(each) for each in row]
            room -= sum(each.size for each in fields)
            if room >= 0:
                shown.append(fields)
                continue
        left += 1
    return Table(caption, columns, shown, left)


def lines(texts: Iterable[Any]) -> Table:
    """A list: a table of one column."""
    return table("", ("",), ([text] for text in texts))
