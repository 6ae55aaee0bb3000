"""What somebody may have meant who wrote a name that is not known."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

MOST = 3


def plain(name: str) -> str:
    """Without what does not count: case, and the choice between - and _."""
    return name.strip().lower().replace("_", "-")


def near(given: str, known: Iterable[str], *, cutoff: float = 0.6) -> list[str]:
    """Those of `known` that are like `given`, the likest first, three at the most.

    Args:
        cutoff: how alike, 0 to 1, as difflib has it.
    """
    spelled = {plain(name): name for name in known}
    return [spelled[match] for match in difflib.get_close_matches(plain(given), spelled, n=MOST, cutoff=cutoff)]


def remedy(given: str, known: Iterable[str]) -> str:
    """A half sentence: the near names, or all where none is near."""
    known = list(known)
    found = near(given, known)
    return f"did you mean {' or '.join(found)}?" if found else f"expected one of {', '.join(known)}"
