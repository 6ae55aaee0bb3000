"""A broken invariant: which, how often, and at the simplest cell what was expected and what came."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from conformance.selection.facts import Array
from conformance.selection.grid import Product
from fp8moe.counted import counted


@dataclass(frozen=True)
class Violation:
    """One invariant that does not hold; ``cell`` is the id of the simplest cell that breaks it."""

    invariant: str
    count: int
    cell: str
    expected: str
    got: str
    options: str = ""
    """Of the reproduction, where the cell alone does not reproduce it."""

    @property
    def reproduction(self) -> str:
        """One command that shows the cell's call, the specification's answer and the selector's."""
        return f"python -m conformance.selection '{self.cell}'{self.options}"

    def __str__(self) -> str:
        times = counted(self.count, "cell")
        return (
            f"{self.invariant} is broken at {times}; the simplest:\n"
            f"  cell      {self.cell}\n"
            f"  expected  {self.expected}\n"
            f"  got       {self.got}\n"
            f"  reproduce {self.reproduction}"
        )


def simplest(product: Product, numbers: Array) -> tuple[int, int]:
    """(number of axes off their usual value, cell number) of the simplest of these cells."""
    distance = np.sum([index != 0 for index in product.indices(numbers)], axis=0)
    best = int(np.argmin(distance))
    return int(distance[best]), int(numbers[best])


def simplest_of_all(products: Sequence[Product], broken: Sequence[Array]) -> tuple[int, int, int]:
    """(count, product's index, cell number) of the simplest of the broken cells, given as numbers for each product."""
    best: tuple[int, int, int] | None = None
    for index, numbers in enumerate(broken):
        if len(numbers):
            distance, number = simplest(products[index], numbers)
            best = min(best or (distance, index, number), (distance, index, number))
    if best is None:
        raise ValueError("no cell is broken")
    return sum(len(numbers) for numbers in broken), best[1], best[2]
