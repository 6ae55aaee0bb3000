"""A fault, and how it is planted in a backend's class: one override."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fp8moe.experts import FusedMoEPermuteExpertsUnpermute

ExpertsClass = type[FusedMoEPermuteExpertsUnpermute]


@dataclass(frozen=True)
class Fault:
    """One defect.

    Args:
        name: of the mutant.
        catalogue: id in the fault catalogue of real defects, or "" for one of our own.
        does: what goes wrong, one sentence.
        subtle: the output's cosine with the right one stays above 0.99 on ordinary data.
        members: from the class to plant it in, the attributes that the mutant overrides.
    """

    name: str
    catalogue: str
    does: str
    subtle: bool
    members: Callable[[ExpertsClass], dict[str, Any]]


def plant(fault: Fault, base: ExpertsClass) -> ExpertsClass:
    """`base` with the fault in it."""
    members = {"__doc__": fault.does, "__module__": base.__module__, **fault.members(base)}
    return type(f"{base.__name__}_{fault.name}", (base,), members)
