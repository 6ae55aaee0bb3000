"""Backends that are right and slower on purpose: what the gate for speed is tried on."""

from __future__ import annotations

from itertools import count
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from conformance.zoo.plant import ExpertsClass
from fp8moe.backends.triton_experts import TritonExperts


def slowed(base: ExpertsClass, every: int) -> ExpertsClass:
    """Each call whose number is a multiple of `every`, over all instances, is made twice: in a graph of a multiple of
    so many calls, slower by 1/every."""
    numbers = count(1)

    def apply(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        result: Tensor = base.apply(self, *args, **kwargs)
        return base.apply(self, *args, **kwargs) if next(numbers) % every == 0 else result

    members = {"__doc__": f"Slower by one call in {every}.", "__module__": base.__module__, "apply": apply}
    return type(f"{base.__name__}_slower_by_1_in_{every}", (base,), members)


SLOW = SimpleNamespace(
    by_1_in_20=slowed(TritonExperts, 20), by_1_in_50=slowed(TritonExperts, 50), by_1_in_100=slowed(TritonExperts, 100)
)
"""5%, 2% and 1%, as `conformance.zoo.slow:SLOW.by_1_in_50`."""
