"""Removing a backend that was not chosen never changes the choice: the cells, the candidates left, the comparison.

Each cell is run again with one backend fewer, and again with nothing left but what was chosen. Compared is the whole
outcome: the same backend and class, or the same error. One thing may change: where a demanded backend failed and is
itself among the removed, the error names it with NOT_ALLOWED instead of its own reason.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from conformance.selection.facts import Array
from conformance.selection.grid import Product
from conformance.selection.model import NOT_ALLOWED
from conformance.selection.outcomes import FIRST_FAILURE, describe
from conformance.selection.predicates import BACKENDS, REASONS
from conformance.selection.runner import CHUNK, Job, Subset
from conformance.selection.violations import Violation, simplest_of_all
from fp8moe import BackendSpec

COUNT = len(BACKENDS)
NAME = "removing_an_unchosen_backend_never_changes_the_choice"


def subsets(specs: Sequence[BackendSpec]) -> tuple[Subset, ...]:
    """Without each backend; then each backend alone; then none."""
    by_backend = {spec.backend: spec for spec in specs}
    ordered = [by_backend[backend] for backend in BACKENDS]
    without = [(*ordered[:index], *ordered[index + 1 :]) for index in range(COUNT)]
    return (*without, *((spec,) for spec in ordered), ())


def removed_by(subset: Array) -> Array:
    """For each subset of ``subsets`` and each backend whether it is missing: shape (cells, backends)."""
    backend = np.arange(COUNT)
    chosen = subset[:, None]
    without, alone = chosen == backend, chosen - COUNT != backend
    return np.where(chosen < COUNT, without, alone)


def jobs(products: Sequence[Product], outcomes: Sequence[Array], at_least: int) -> list[Job]:
    """At least so many cells, evenly spread, alternately with one backend less and with only the chosen one left."""
    step = max(1, sum(product.size for product in products) // at_least)
    numbers = [
        np.arange(index % step if product.size > step else 0, product.size, step)
        for index, product in enumerate(products)
    ]
    return jobs_at(outcomes, numbers)


def jobs_at(outcomes: Sequence[Array], numbers_of: Sequence[Array]) -> list[Job]:
    """The cells with these numbers of each product, alternately as ``jobs`` has them."""
    found = []
    for index, numbers in enumerate(numbers_of):
        chosen = outcomes[index].reshape(-1)[numbers].astype(np.int64)
        has_choice = chosen < COUNT
        # A different backend at each cell, stepping over the chosen one.
        candidate = (numbers * 7 + numbers // COUNT) % COUNT
        candidate = np.where(candidate == chosen, (candidate + 1) % COUNT, candidate)
        alone = COUNT + np.where(has_choice, chosen, COUNT)
        subset = np.where(np.arange(len(numbers)) % 2, alone, candidate)
        cuts = range(0, len(numbers), CHUNK)
        found += [Job(index, numbers[at : at + CHUNK], subset[at : at + CHUNK]) for at in cuts]
    return found


def violation(
    products: Sequence[Product], outcomes: Sequence[Array], run: Sequence[Job], got: Sequence[Array]
) -> Violation | None:
    """The comparison with the outcomes of all candidates."""
    broken: list[list[Array]] = [[] for _ in products]
    details = {}
    for job, codes in zip(run, got, strict=True):
        if job.subsets is None:
            raise ValueError("a job without subsets removes nothing")
        before = outcomes[job.product].reshape(-1)[job.numbers]
        expected = after_removal(before, removed_by(job.subsets))
        wrong = np.flatnonzero(codes != expected)
        broken[job.product].append(job.numbers[wrong])
        for at in wrong:
            details[job.product, int(job.numbers[at])] = (int(expected[at]), int(codes[at]), int(job.subsets[at]))
    numbers = [np.concatenate(parts) if parts else np.asarray([], dtype=np.int64) for parts in broken]
    if not any(len(part) for part in numbers):
        return None
    count, index, number = simplest_of_all(products, numbers)
    want, code, subset = details[index, number]
    left = (
        f" --without {BACKENDS[subset].value}"
        if subset < COUNT
        else " --only " + (BACKENDS[subset - COUNT].value if subset < 2 * COUNT else "nothing")
    )
    cell = str(products[index].cell(number))
    return Violation(NAME, count, cell, f"{describe(want)} ({left.strip()})", describe(code), left)


def after_removal(outcome: Array, removed: Array) -> Array:
    """What an outcome becomes when backends are removed that were not chosen."""
    failed = (outcome >= FIRST_FAILURE) & (outcome < FIRST_FAILURE + COUNT * len(REASONS))
    backend = np.clip((outcome.astype(np.int64) - FIRST_FAILURE) // len(REASONS), 0, COUNT - 1)
    gone = failed & np.take_along_axis(removed, backend[:, None], axis=1)[:, 0]
    return np.where(gone, FIRST_FAILURE + backend * len(REASONS) + NOT_ALLOWED, outcome)
