"""Mutants that are known to survive, and why: a figure that is published with its exceptions."""

from __future__ import annotations

from collections.abc import Mapping

_FAITHFUL = (
    "a bound must allow any faithful rounding of the output, and outputs that lie exactly between two numbers are all "
    "that this one rounds otherwise; equality of bits convicts it in a backend whose arithmetic is declared"
)

KNOWN_SURVIVORS: Mapping[str, Mapping[str, str]] = {
    "output_half_away": {"smoke": _FAITHFUL, "quick": _FAITHFUL, "certify": _FAITHFUL},
}
"""By mutant and level, the reason."""
