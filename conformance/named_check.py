"""A check by its name, and when it demands equal bits of two results that should be the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from conformance.cases import Case

if TYPE_CHECKING:
    from conformance.trial import Trial


class Exactness(str, Enum):
    """When a check demands equal bits of two results that should be the same; a report shows it."""

    ALWAYS = "always"
    """Equal bits, of whatever backend: nothing is computed that could round otherwise."""
    DETERMINISTIC = "if deterministic"
    """Equal bits where the backend declares that it is deterministic; elsewhere the bound around the recipe."""
    ROW_BY_ROW = "if row by row"
    """Equal bits where a token's result does not depend on the other tokens (which it declares, or which is replayed);
    elsewhere the bound around the recipe."""
    BOUND = "if replayed"
    """Within the bound around the recipe's result for the changed problem; equal bits only where sums are replayed."""


@dataclass(frozen=True)
class Check:
    """One named check.

    Args:
        id: "computes." and its name; it keys results, reports and reproduction.
        says: what holds, one sentence.
        exactness: what it demands.
        run: returns where the backend passes, raises `Ended` elsewhere.
        why_not: why a case has nothing to show for it (a law, a scheme, a size), before any backend is made; "" where
            it has. Most cases show most relations.
    """

    id: str
    says: str
    exactness: Exactness
    run: Callable[[Trial], None]
    why_not: Callable[[Case], str] = lambda case: ""
