"""A comparison in words: the table, and which cells cost more than they may."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

MOST = 1.03
"""Our adapters may cost 3% over vLLM's class."""


@dataclass(frozen=True)
class Compared:
    """A cell's times; a ratio is ours over vLLM's.

    Args:
        ours_us, theirs_us: of a call, interquartile means.
        low, high: limits of the ratio, each wrong with a probability of `conformance.timing.side_by_side.LEVEL`.
        pairs: that the ratio rests on; `dropped` ones were disturbed.
        apart: the norm of the difference of both outputs over that of vLLM's: two honest ways to compute one thing.
    """

    shape: str
    title: str
    scheme: str
    tokens: int
    ours: str
    theirs: str
    ours_us: float
    theirs_us: float
    ratio: float
    low: float
    high: float
    pairs: int
    dropped: int
    apart: float
    seconds: float = 0.0

    @property
    def name(self) -> str:
        return f"{self.shape} M={self.tokens} {self.ours}"

    @property
    def above(self) -> bool:
        return self.ratio > MOST

    @property
    def surely_above(self) -> bool:
        """The whole interval is."""
        return self.low > MOST


@dataclass
class Result:
    """A run.

    Args:
        compared: in the order in which they were timed.
        left: why a cell, or a backend, was not timed.
        about: device, versions, command, what the watch saw.
    """

    compared: list[Compared] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "about": self.about,
            "limit": MOST,
            "worst": None if not self.compared else worst(self.compared).name,
            "above": [one.name for one in self.compared if one.above],
            "surely_above": [one.name for one in self.compared if one.surely_above],
            "compared": [vars(one) for one in self.compared],
            "left": dict(self.left),
        }


def worst(compared: Sequence[Compared]) -> Compared:
    return max(compared, key=lambda one: one.ratio)


HEAD = f"{'shape':16s} {'M':>6s} {'backend':13s} {'ours us':>10s} {'vLLM us':>10s} {'ratio':>6s}  interval"


def row(one: Compared) -> str:
    mark = " ABOVE" if one.surely_above else " above" if one.above else ""
    return (
        f"{one.shape:16s} {one.tokens:6d} {one.ours:13s} {one.ours_us:10.1f} {one.theirs_us:10.1f} {one.ratio:6.3f}  "
        f"{one.low:.3f} to {one.high:.3f}{mark}"
    )


def table(compared: Sequence[Compared]) -> str:
    """By shape, then backend, then number of tokens."""
    places: dict[str, int] = {}
    for one in compared:
        places.setdefault(one.shape, len(places))
    return "\n".join([HEAD, *map(row, sorted(compared, key=lambda one: (places[one.shape], one.ours, one.tokens)))])


def verdict(compared: Sequence[Compared], left: Mapping[str, str]) -> str:
    """The worst ratio, the cells above the limit, what was not timed and why."""
    lines = []
    if not compared:
        lines.append("nothing was timed")
    else:
        most, above = worst(compared), [one for one in compared if one.above]
        lines.append(f"worst: {most.ratio:.3f} ({most.low:.3f} to {most.high:.3f}), {most.name}")
        sure = sum(one.surely_above for one in above)
        if above:
            lines.append(f"above {MOST}: {len(above)} of {len(compared)}, {sure} of them with their whole interval:")
            lines += [f"  {one.ratio:.3f} {one.name}" for one in sorted(above, key=lambda one: -one.ratio)]
        else:
            lines.append(f"above {MOST}: none of {len(compared)}")
    reasons: dict[str, list[str]] = {}
    for name, why in left.items():
        reasons.setdefault(why, []).append(name)
    lines += [f"not timed: {why}: {len(names)}: {', '.join(names)}" for why, names in reasons.items()]
    return "\n".join(lines)
