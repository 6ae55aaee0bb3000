"""Judges a selector over the grid: runs it, evaluates every named invariant, and reports what is broken."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter

import numpy as np

from conformance.decisions.decided import Decided
from conformance.selection import removal, single
from conformance.selection.explanations import Explain, ExplainedSample
from conformance.selection.facts import Array
from conformance.selection.grid import GRID, Product
from conformance.selection.invariants import INVARIANTS, View
from conformance.selection.model import expect
from conformance.selection.outcomes import Classifier, describe
from conformance.selection.runner import Job, Select, Task, by_product, default_processes, whole_grid, workers
from conformance.selection.triples import witnesses
from conformance.selection.violations import Violation, simplest_of_all
from fp8moe import BackendSpec, explain_fp8_moe_backend, select_fp8_moe_backend
from fp8moe.registry import seed_backends

Progress = Callable[[str], None]
DETERMINISTIC = "deterministic"
REASONS_AGREE = "reasons_agree_with_model"
TRIPLES = "every_permitted_triple_occurs"
NAMES = (*INVARIANTS, DETERMINISTIC, REASONS_AGREE, TRIPLES, removal.NAME, *single.CHECKS)
"""Every invariant that ``judge`` evaluates."""

REMOVALS = 520_000
RERUNS = 100_000
EXPLAINED = 25_000
TELLING = 500


@dataclass(frozen=True)
class GridReport:
    """What became of every invariant."""

    violations: dict[str, Violation | None]
    cells: int
    removals: int
    reruns: int
    explained: int
    telling: int
    """Cells at which the checks of single calls were asked."""
    seconds: dict[str, float]
    """Wall time of each step."""
    decided: Decided | None = field(default=None, repr=False, compare=False)
    """Of this version's own selector, what it decided in every cell; of another, None."""

    @property
    def passed(self) -> bool:
        return not any(self.violations.values())

    def __str__(self) -> str:
        time = ", ".join(f"{step} {seconds:.1f} s" for step, seconds in self.seconds.items())
        head = (
            f"{self.cells:,} cells, {self.removals:,} again with backends removed, {self.reruns:,} again in another "
            f"order and process, {self.explained:,} explained, {self.telling:,} asked singly ({time})"
        )
        broken = [str(violation) for violation in self.violations.values() if violation is not None]
        tail = f"{len(self.violations) - len(broken)} of {len(self.violations)} invariants hold"
        return "\n".join([head, *broken, tail])


def judge(
    select: Select = select_fp8_moe_backend,
    explain: Explain = explain_fp8_moe_backend,
    *,
    products: Sequence[Product] = GRID,
    specs: Sequence[BackendSpec] | None = None,
    explained: int = EXPLAINED,
    processes: int | None = None,
    progress: Progress | None = None,
) -> GridReport:
    """Evaluates every invariant of ``NAMES``.

    Args:
        select: the selector, called as ``select_fp8_moe_backend`` is; ``explain`` its explanation.
        products: the grid.
        specs: the registry's eleven; tells the class that belongs to each backend.
        explained: at least so many cells are explained.
        processes: worker processes; None is two where there are two cores. 0 runs in this process.
        progress: called with a line of text now and then.
    """
    # Always the eleven: what somebody has registered on this machine is not the specification's affair.
    backends = seed_backends() if specs is None else specs
    ruled = select is select_fp8_moe_backend
    select, explain = partial(select, backends=backends), partial(explain, backends=backends)
    classifier = Classifier(backends)
    task = Task(select, classifier, products, removal.subsets(backends))
    clock = _Clock(progress)
    violations: dict[str, Violation | None] = {}
    with workers(task, default_processes() if processes is None else processes) as run:
        grid = whole_grid(products, ruled=ruled)
        found = run(grid, clock.counting("cells selected"))
        outcomes = by_product(grid, [codes[0] for codes in found] if ruled else found, products)
        decided = Decided.of(outcomes, by_product(grid, [codes[1] for codes in found], products)) if ruled else None
        clock.lap("grid")
        removals = removal.jobs(products, outcomes, REMOVALS)
        removed = run(removals, clock.counting("cells selected with backends removed"))
    violations[removal.NAME] = removal.violation(products, outcomes, removals, removed)
    clock.lap("removals")
    violations |= _cell_by_cell(products, outcomes)
    clock.lap("invariants")
    # The workers ran the grid forwards; this process has not selected yet, and goes backwards.
    samples = spread(products, RERUNS)
    violations[DETERMINISTIC] = deterministic(task, outcomes, samples)
    clock.lap("reruns")
    sample = ExplainedSample(explain, classifier, products)
    numbers = spread(products, explained)
    sample.run(numbers)
    violations[REASONS_AGREE] = sample.reasons_agree_with_model()
    violations[TRIPLES] = sample.every_permitted_triple_occurs(witnesses(products))
    clock.lap("explanations")
    cells = single.telling_cells(products, numbers, TELLING)
    violations |= single.violations(single.Subject(select, explain, classifier, backends), cells)
    clock.lap("single calls")
    return GridReport(
        violations={name: violations[name] for name in NAMES},
        cells=sum(product.size for product in products),
        removals=sum(len(job.numbers) for job in removals),
        reruns=sum(len(numbers) for numbers in samples),
        explained=sample.count,
        telling=len(cells),
        seconds=clock.laps,
        decided=decided,
    )


def spread(products: Sequence[Product], at_least: int) -> list[Array]:
    """Numbers of at least so many cells: small products whole, the others evenly, at a step that meets every value."""
    step = max(1, sum(product.size for product in products) // at_least)
    # A step that shares no factor with the axes' lengths does not keep meeting the same values of the last axes.
    while step > 1 and any(step % prime == 0 for prime in (2, 3, 5, 7)):
        step -= 1
    small = 600
    return [np.arange(0, product.size, step if product.size > small else 1) for product in products]


def _cell_by_cell(products: Sequence[Product], outcomes: Sequence[Array]) -> dict[str, Violation | None]:
    broken: dict[str, list[Array]] = {name: [] for name in INVARIANTS}
    models = []
    for product, outcome in zip(products, outcomes, strict=True):
        facts = product.facts()
        view = View(facts, expect(facts), outcome)
        models.append(view.expected.outcome)
        for name, check in INVARIANTS.items():
            broken[name].append(np.flatnonzero(np.broadcast_to(check(view), product.shape)))
    found: dict[str, Violation | None] = dict.fromkeys(INVARIANTS)
    for name, numbers in broken.items():
        if any(len(part) for part in numbers):
            count, index, number = simplest_of_all(products, numbers)
            want = np.broadcast_to(models[index], products[index].shape).reshape(-1)[number]
            got = outcomes[index].reshape(-1)[number]
            cell = str(products[index].cell(number))
            found[name] = Violation(name, count, cell, describe(int(want)), describe(int(got)))
    return found


def deterministic(task: Task, outcomes: Sequence[Array], samples: Sequence[Array]) -> Violation | None:
    """The cells with these numbers again, from the last to the first: the same outcomes as before."""
    again = [np.asarray([], dtype=np.uint8)] * len(samples)
    for index in reversed(range(len(samples))):
        again[index] = task.outcomes(Job(index, samples[index][::-1]))[::-1]
    before = [outcome.reshape(-1)[numbers] for outcome, numbers in zip(outcomes, samples, strict=True)]
    changed = [n[a != b] for n, a, b in zip(samples, again, before, strict=True)]
    if not any(len(numbers) for numbers in changed):
        return None
    count, index, number = simplest_of_all(task.products, changed)
    at = int(np.flatnonzero(samples[index] == number)[0])
    cell = str(task.products[index].cell(number))
    return Violation(
        DETERMINISTIC, count, cell, f"{describe(int(before[index][at]))} again", describe(int(again[index][at]))
    )


class _Clock:
    """Wall time of steps, and a line of progress at most every other second."""

    def __init__(self, progress: Progress | None) -> None:
        self.laps: dict[str, float] = {}
        self._progress = progress
        self._last = self._said = perf_counter()

    def lap(self, step: str) -> None:
        now = perf_counter()
        self.laps[step], self._last = now - self._last, now

    def counting(self, what: str) -> Callable[[int, int], None] | None:
        progress = self._progress
        if progress is None:
            return None

        def say(done: int, total: int) -> None:
            now = perf_counter()
            if now - self._said >= 2 or done == total:
                self._said = now
                progress(f"{done:,} of {total:,} {what}")

        return say
