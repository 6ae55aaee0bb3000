"""Markdown from data: tables and code, escaped."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

SPECIAL = "\\`*_{}[]<>|&#"
LITERAL = re.compile(r"`([^`]+)`")


def text(value: object) -> str:
    """As plain text, on one line."""
    return _escaped(" ".join(str(value).split()))


def prose(words: str) -> str:
    """Likewise, but for what stands between backticks, which is code."""
    pieces = LITERAL.split(" ".join(words.split()))
    return "".join(code(piece) if place % 2 else _escaped(piece) for place, piece in enumerate(pieces))


def code(value: object) -> str:
    """As code, also where it has backticks or a cell's bar."""
    return f"<code>{text(value)}</code>"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """
    Args:
        heads: plain texts.
        rows: cells in Markdown, on one line each.

    Raises:
        ValueError: a row of another length.
    """
    lines = [tuple(map(text, heads)), ("---",) * len(heads)]
    for row in rows:
        if len(row) != len(heads):
            raise ValueError(f"a row of {len(row)} cells below {len(heads)} heads: {row}")
        lines.append(tuple(row))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def listed(items: Iterable[str]) -> str:
    """A list of texts in Markdown."""
    return "\n".join(f"- {item}" for item in items)


def fenced(lines: Iterable[str], language: str = "") -> str:
    return "\n".join((f"```{language}", *lines, "```"))


def _escaped(words: str) -> str:
    return "".join(f"&#{ord(sign)};" if sign in SPECIAL else sign for sign in words)
