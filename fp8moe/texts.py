"""Texts that others wrote, an exception's say, as one line that can be shown anywhere."""

from __future__ import annotations

MOST = 4000
"""Characters of an exception's text."""


def visible(text: str) -> str:
    """The text on one line, and what no reader sees (control and direction marks, lone surrogates) as its escape.

    What is left can be a part of XML, and cannot forge a second line of a report.
    """
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in text)


def clipped(text: str, most: int) -> str:
    """At most so many characters, the last an ellipsis where there were more."""
    return text if len(text) <= most else text[: most - 1] + "…"


def text_of(error: BaseException) -> str:
    """What an exception says, its lines put together; never raises, as what it calls may."""
    try:
        text = str(error)
    except BaseException as another:
        text = f"(its text raised {type(another).__name__})"
    return visible(" ".join(line.strip() for line in clipped(text, MOST).splitlines()))


def said(error: BaseException) -> str:
    """An exception's type and text."""
    text = text_of(error)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
