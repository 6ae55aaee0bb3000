"""Holm's step-down over the cells of a run, on limits instead of p-values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from conformance.gate.interval import Estimate


def beyond(estimates: Mapping[str, Estimate], margin: float, level: float, family: int) -> dict[str, float]:
    """Cells whose log ratio is above `margin`, with the level of each one's limit; P(any is false) is at most `level`.

    With k cells of the family not yet rejected, reject those whose lower limit at level / k is above the margin, and
    begin again with the smaller k until none is. That is Holm's procedure (A simple sequentially rejective multiple
    test procedure, 1979): a lower limit at level / k above the margin is a p-value below level / k.

    Args:
        estimates: of log ratios; those for the other direction are the same with their sign changed (`mirrored`).
        family: cells in the family, at least as many as there are estimates: those without one are never rejected.
    """
    found: dict[str, float] = {}
    while len(found) < family:
        at = level / (family - len(found))
        more = [cell for cell, of in estimates.items() if cell not in found and of.low(at) > margin]
        if not more:
            break
        found |= dict.fromkeys(more, at)
    return found


def mirrored(estimates: Mapping[str, Estimate]) -> dict[str, Estimate]:
    """A over B instead of B over A."""
    return {cell: Estimate(-of.log_ratio, of.spread, of.freedom) for cell, of in estimates.items()}


def checked_names(cells: Iterable[str]) -> tuple[str, ...]:
    """The cells of a run.

    Raises:
        ValueError: none, or one twice: a family counts each once.
    """
    names = tuple(cells)
    if not names or len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"cells: at least one, each once, not {f'{twice} twice' if twice else 'none'}")
    return names
