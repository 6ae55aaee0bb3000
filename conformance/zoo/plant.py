"""A fault, and how it is planted in a backend's class: one override."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from conformance.cases import Case
from fp8moe.experts import FusedMoEPermuteExpertsUnpermute

ExpertsClass = type[FusedMoEPermuteExpertsUnpermute]
ORDINARY = Case(tokens=64, experts=8, top_k=4, seed=5)
SHOWS = ("output", "second call", "repeat", "input", "raises")
"""The output of a first call; that of a second call on other inputs; that of the same call again; an input that was
changed; an exception."""


@dataclass(frozen=True)
class Fault:
    """One defect.

    Args:
        name: of the mutant.
        catalogue: id in the fault catalogue of real defects, or "" for one of our own.
        does: what goes wrong, one sentence.
        subtle: the output's cosine with the right one stays above 0.99 on ordinary data.
        members: from the class to plant it in, the attributes that the mutant overrides.
        witness: a case on which the mutant does something else than the honest backend: no mutant is a no-op.
        shows: what differs there, one of `SHOWS`.
        needs: "cuda" where only such a device shows it; "" where a CPU does.
        format: "Standard" where it is planted in `TorchExperts`, "Batched" where in `BatchedTorchExperts`.
    """

    name: str
    catalogue: str
    does: str
    subtle: bool
    members: Callable[[ExpertsClass], dict[str, Any]]
    witness: Case = ORDINARY
    shows: str = "output"
    format: str = "Standard"
    needs: str = ""


def plant(fault: Fault, base: ExpertsClass) -> ExpertsClass:
    """`base` with the fault in it."""
    members = {"__doc__": fault.does, "__module__": base.__module__, **fault.members(base)}
    return type(f"{base.__name__}_{fault.name}", (base,), members)
