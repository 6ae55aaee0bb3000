"""From a failing case to a small one: fields back to their defaults, then sizes down, as long as it still fails.

Hypothesis finds failures; this makes them small. It knows that a case is a handful of named fields, so it needs some
dozens of runs where a general shrinker needs hundreds, and it serves cases that no strategy drew.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import fields, replace

from conformance.cases import LAWS, VALUES, Case, InvalidCase

SIZES = ("tokens", "inter", "hidden", "experts", "top_k")
SECONDS_AT_MOST = 60.0
FEW = 2
"""Non-default fields that are few enough: with more, the plain cases are tried first."""


def shrink(
    case: Case, fails: Callable[[Case], bool], *, keep: tuple[str, ...] = (), seconds: float = SECONDS_AT_MOST
) -> Case:
    """The smallest case found that still fails; stops when no step helps, or after `seconds`.

    Fields named in `keep` stay as they are.
    """
    deadline = time.monotonic() + seconds
    if len(non_default_fields(case)) > FEW:
        # A fault may show in a case for a lesser reason than its own: weights that sum to 1 but for a rounding, say,
        # in the one large case where that rounding is seen. Then no step from there leads to the law that shows it.
        for plain in _plain(case, keep):
            if time.monotonic() < deadline and fails(plain):
                case = plain
                break
    improved = True
    while improved:
        improved = False
        for smaller in _steps(case, keep):
            if time.monotonic() > deadline:
                return case
            if fails(smaller):
                case, improved = smaller, True
                break
    return case


def _plain(case: Case, keep: tuple[str, ...]) -> Iterator[Case]:
    """Cases with one field beside those of `keep` that is no default: each of the case's own, each law, each regime."""
    base = Case(**{name: getattr(case, name) for name in keep})
    own = [(name, getattr(case, name)) for name in non_default_fields(case) if name not in keep]
    others = [("law", law) for law in LAWS] + [("values", values) for values in VALUES]
    for name, value in dict.fromkeys([("seed", 0), *own, *others]):
        try:
            yield replace(base, **{name: value})
        except InvalidCase:  # that field needs others
            continue


def _steps(case: Case, keep: tuple[str, ...]) -> Iterator[Case]:
    """Simpler cases, the boldest first; those that the constructor refuses are left out."""
    default = Case()
    changed = [field.name for field in fields(Case) if getattr(case, field.name) != getattr(default, field.name)]
    for name in (name for name in changed if name not in keep):
        yield from _valid(case, name, getattr(default, name))
    for name in SIZES:
        value, floor = getattr(case, name), getattr(default, name)
        for candidate in (floor + (value - floor) // 2, value - 1):
            if value > floor and candidate < value:
                yield from _valid(case, name, candidate)


def _valid(case: Case, name: str, value: object) -> Iterator[Case]:
    try:
        simpler = replace(case, **{name: value})  # type: ignore[arg-type]
    except ValueError:
        return
    if simpler.weight_bytes <= max(case.weight_bytes, Case().weight_bytes):  # a model without its split is far larger
        yield simpler


def non_default_fields(case: Case) -> list[str]:
    """Names of the fields that differ from the default case."""
    default = Case()
    return [field.name for field in fields(Case) if getattr(case, field.name) != getattr(default, field.name)]
