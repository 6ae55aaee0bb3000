"""Text that nobody vouches for, such as a backend's name, in Markdown: shown as it is by GitHub and GitLab."""

from __future__ import annotations

import re

from fp8moe.texts import clipped, visible

_MEANS_SOMETHING = re.compile(r"[&<>|\\`*\[\]~$@#!]|(?<![^\W_])_|_(?![^\W_])|:(?=//)|(?<=www)\.")
"""What begins or ends markup, a cell of a table, a mention, or a link; within a word an underscore does not."""
FIELD = 300
"""Characters of one field; more is an accident, and would push everything else out of the comment."""


def prose(text: str, most: int = FIELD) -> str:
    """On one line and with no markup in it.

    A numeric character reference never begins markup (CommonMark, section 2.5) nor ends a cell of a table, which a
    backslash does not ensure: before the pipe of a text that itself ends in one, it is the text's own that counts.
    """
    shown = clipped(visible(text), most)
    return _MEANS_SOMETHING.sub(_reference, shown)


def _reference(found: re.Match[str]) -> str:
    # Mentions and references to issues are sought in what is already shown, where a comment still parts the two.
    return f"&#{ord(found[0])};" + ("<!-- -->" if found[0] in "@#" else "")


def code(text: str, most: int = FIELD) -> str:
    """The same as code, where GitHub looks for neither mentions nor references to issues.

    An element and not backticks, inside which a character reference is shown as it is written.
    """
    return f"<code>{prose(text, most)}</code>"
