"""Sections of README.md, so that nothing is written down twice."""

from __future__ import annotations

import re
from pathlib import Path

README = Path(__file__).parents[3] / "README.md"
PAGES = {"docs/vendors.md": "vendors.md"}
"""Pages of the site, by the README's links to them."""
LINK = re.compile(r"\[(?P<text>[^\]]+)\]\((?P<target>[^)]+)\)")
FENCE = re.compile(r"(^```.*?^```[ \t]*$)", re.MULTILINE | re.DOTALL)


def readme(title: str) -> str:
    """What stands below a heading of README.md, up to the next one of its level.

    Raises:
        LookupError: there is no such heading.
    """
    found = re.search(
        rf"^(?P<level>#+) {re.escape(title)}\n(?P<body>.*?)(?=^(?P=level) |\Z)",
        README.read_text(encoding="utf-8"),
        re.MULTILINE | re.DOTALL,
    )
    if found is None:
        raise LookupError(f"{README.name} has no heading {title!r}")
    pieces = FENCE.split(found["body"].strip())
    return "".join(piece if piece.startswith("```") else LINK.sub(_linked, piece) for piece in pieces)


def introduction() -> str:
    """What stands between the title and the first heading."""
    return readme("fp8moe").partition("\n## ")[0].strip()


def _linked(found: re.Match[str]) -> str:
    """A link to a page of the site, or to elsewhere; of a file of the repository its name."""
    target = found["target"]
    if target in PAGES:
        return f"[{found['text']}]({PAGES[target]})"
    return found[0] if "://" in target else f"`{target}`"
