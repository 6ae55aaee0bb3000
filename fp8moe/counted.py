"""A number of things, in words."""

from __future__ import annotations


def counted(count: int, noun: str) -> str:
    """Such as "1 cell", "2,000 cells"; of a noun whose plural has an s."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"
