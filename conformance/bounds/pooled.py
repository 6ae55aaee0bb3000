"""What shows only in many cases together: a gain or a lean too small for any one of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING

import torch

from conformance.bounds.aggregates import DIRECTIONS, DirectedSums

if TYPE_CHECKING:
    from conformance.bounds.judgement import Judgement

PARTS = tuple(field.name for field in fields(DirectedSums))


def as_floats(sums: Mapping[str, DirectedSums]) -> dict[str, float]:
    """One case's sums along each direction as plain numbers: "gain.signed", "gain.slack", "gain.variance" and so on."""
    return {f"{name}.{part}": float(getattr(of, part)) for name, of in sums.items() for part in PARTS}


def pooled(cases: Iterable[Judgement | Mapping[str, float]]) -> dict[str, float]:
    """Ratios with limit 1 of all cases together, along each of `DIRECTIONS`.

    `conformance.bounds.aggregates.directed_sums` derives each case's: N = sum q c is a sum of s c, at most S (sound),
    and of X, of mean 0, sub-Gaussian with a variance V. Whatever comes before the output's rounding may lean the same
    way in every case (a truncating unit, a constant such as 1 / 448 that is itself rounded), so the S add up; the X of
    cases of different seeds are independent, so their variances add up, and of the largest terms the largest counts.
    The c are in units of each element's own deviation, so a case counts by its elements whatever its outputs' size. The
    level allows for three directions.

    Args:
        cases: judgements or their `sums`, of one backend, each case (its seed included) once. Cases without sums were
            convicted on their own, or have no tokens, and count for nothing.
    """
    given = (case if isinstance(case, Mapping) else case.sums for case in cases)
    found = [sums for sums in given if sums]

    def together(name: str, part: str) -> torch.Tensor:
        values = [sums[f"{name}.{part}"] for sums in found]
        # Rounded once, so that whoever adds them up again, in any order, finds the same.
        whole = max(values, default=0.0) if part == "largest" else math.fsum(values)
        return torch.tensor(whole, dtype=torch.float64)

    sums = {name: DirectedSums(**{part: together(name, part) for part in PARTS}) for name in DIRECTIONS}
    return {name: float(of.ratios(len(DIRECTIONS))) for name, of in sums.items()}
