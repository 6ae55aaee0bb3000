"""What a selector decides in every cell of a grid: the outcome, and the rule that came to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from conformance.decisions.labels import OUTCOMES
from conformance.selection.facts import Array
from conformance.selection.grid import GRID, Product
from conformance.selection.outcomes import Classifier
from conformance.selection.runner import Select, Task, by_product, default_processes, whole_grid, workers
from fp8moe import select_fp8_moe_backend
from fp8moe.registry import seed_backends

Progress = Callable[[int, int], None]


class DecisionsError(ValueError):
    """Decisions that make no table, or a table that cannot be used; one line that says why and what to do."""


@dataclass(frozen=True)
class Decided:
    """One flat array of labels (``labels.label_of``) a product, in the order in which it numbers its cells."""

    labels: tuple[Array, ...]

    @classmethod
    def of(cls, outcomes: Sequence[Array], rules: Sequence[Array]) -> Decided:
        """From codes of ``outcomes`` and indices into ``RULES``, one array of each a product."""
        pairs = zip(outcomes, rules, strict=True)
        return cls(
            tuple((rule.astype(np.uint16) * np.uint16(OUTCOMES) + outcome).reshape(-1) for outcome, rule in pairs)
        )

    def differs(self, other: Decided) -> tuple[Array, ...]:
        """For each product the numbers of the cells that the other decides otherwise."""
        return tuple(np.flatnonzero(a != b) for a, b in zip(self.labels, other.labels, strict=True))


def decide_grid(
    select: Select = select_fp8_moe_backend,
    *,
    products: Sequence[Product] = GRID,
    processes: int | None = None,
    progress: Progress | None = None,
) -> Decided:
    """Asks the selector about every cell; on the declared grid about a minute of one core.

    Args:
        select: the selector; it is given the eleven backends, whatever else is registered.
        products: the grid.
        processes: worker processes; None is two where there are two cores. 0 runs in this process.
        progress: called with the number of cells done and of all.
    """
    backends = seed_backends()
    task = Task(partial(select, backends=backends), Classifier(backends), products)
    jobs = whole_grid(products, ruled=True)
    with workers(task, default_processes() if processes is None else processes) as run:
        found = run(jobs, progress)
    return Decided.of(*(by_product(jobs, [codes[row] for codes in found], products) for row in (0, 1)))
