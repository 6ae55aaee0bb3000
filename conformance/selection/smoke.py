"""The checks of the selector on a sample of the grid, in this process, one broken invariant after the other.

For judging many selectors: what the specification says is computed once for all of them, and who asks for the first
broken invariant pays for nothing after it. Of the grid every pair of axes is run whole, and some corners; the rest
evenly. Every named invariant of ``judge`` is evaluated.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import numpy as np

from conformance.selection import removal, single
from conformance.selection.axes import WELL_FORMED
from conformance.selection.explanations import Explain, ExplainedSample
from conformance.selection.facts import Array, Facts
from conformance.selection.grid import MAIN, PAIRS, Product
from conformance.selection.invariants import INVARIANTS, View
from conformance.selection.judge import deterministic, spread
from conformance.selection.model import Expectation, expect
from conformance.selection.outcomes import Classifier, describe
from conformance.selection.runner import Job, Select, Task
from conformance.selection.triples import witnesses
from conformance.selection.violations import Violation, simplest
from fp8moe.registry import seed_backends

SELECTED, REPEATED, EXPLAINED, TELLING = 15_000, 8, 8, 150
"""Cells of the main products; of the sample one in so many is run again, and one in so many explained; cells asked
singly, at least."""
FIRST = "arguments_are_left_alone"
"""Of the single checks: before anything else, and nothing after it where it is broken, since cells share arguments."""

CORNERS: tuple[Product, ...] = (
    Product.over(
        "TRTLLM's routing and logits",
        device=("sm100", "sm103"),
        scheme=("block", "tensor_static", "tensor_dyn"),
        parallel=("single", "single-eplb", "dp2-ep-pplx"),
        routing="*",
        logits="*",
        VLLM_USE_FLASHINFER_MOE_FP8=("unset", "1"),
        VLLM_FLASHINFER_MOE_BACKEND=("unset", "latency"),
    ),
    Product.over(
        "AITER on demand",
        device=("sm90", "gfx942", "gfx942-features", "gfx950", "gfx90a", "gfx908", "gfx940", "gfx1100"),
        libraries=("all", "none"),
        scheme="*",
        parallel=("single", "dp2-ep-flashinfer_all2allv"),
        VLLM_ROCM_USE_AITER=("unset", "1"),
    ),
    Product.over(
        "CUTLASS allowed",
        device=("sm90", "sm90-cuda11.8", "sm100", "sm100-cuda12.10", "sm100-cuda13.0", "sm110"),
        libraries=("all", "vllm", "none"),
        scheme=("block", "tensor_static", "tensor_dyn", "channel_tok"),
        parallel="*",
        allow_vllm_cutlass="yes",
    ),
    Product.over(
        "demands",
        device=("sm75", "sm90", "sm100", "gfx942", "gfx1030", "xpu"),
        scheme=("block", "tensor_static", "tensor_dyn", "none"),
        parallel=("single", "dp2-ep-deepep_low_latency"),
        VLLM_USE_FLASHINFER_MOE_FP8=("unset", "0", "1"),
        VLLM_FLASHINFER_MOE_BACKEND=WELL_FORMED["VLLM_FLASHINFER_MOE_BACKEND"],
        VLLM_USE_DEEP_GEMM=("unset", "1"),
        VLLM_TEST_FORCE_FP8_MARLIN=("unset", "1"),
    ),
)
"""Where three and more values must meet for a rule or a check to show; parts of the main products, run whole."""


class Smoke:
    """A sample of the grid and what the specification says of it.

    Args:
        products: run whole, before ``main``, of which ``selected`` cells are run.
    """

    def __init__(
        self, products: Sequence[Product] = PAIRS + CORNERS, main: Sequence[Product] = MAIN, selected: int = SELECTED
    ) -> None:
        self.specs = seed_backends()
        self.products = (*products, *main)
        whole = [np.arange(product.size) for product in products]
        self.numbers: list[Array] = [*whole, *spread(main, selected)]
        self.facts: list[Facts] = [p.facts_at(n) for p, n in zip(self.products, self.numbers, strict=True)]
        self.expected: list[Expectation] = [expect(facts) for facts in self.facts]
        self.want = [
            np.broadcast_to(expected.outcome, (len(numbers),))
            for expected, numbers in zip(self.expected, self.numbers, strict=True)
        ]
        self.telling = single.telling_cells(self.products, self.numbers, TELLING)
        self.triples = witnesses(self.products)
        for index in range(len(self.products)):
            # So that outcomes equal to the specification's need no look at the other invariants.
            if self._broken_cells(index, self.want[index]) is not None:
                raise AssertionError(f"the specification's own outcomes break an invariant: {self.products[index]}")

    def first_violation(self, select: Select, explain: Explain) -> Violation | None:
        """The first broken invariant that ``violations`` meets."""
        return next(self.violations(select, explain), None)

    def violations(self, select: Select, explain: Explain) -> Iterator[Violation]:
        """Broken invariants: of each product the first; after the products the others, each once."""
        subject = single.Subject(select, explain, Classifier(self.specs), self.specs)
        spoils = single.violation(FIRST, subject, self.telling)
        if spoils is not None:
            yield spoils
            return
        task = Task(_with(select, self.specs), subject.classifier, self.products, removal.subsets(self.specs))
        outcomes = [np.zeros(product.size, dtype=np.uint8) for product in self.products]
        for index, numbers in enumerate(self.numbers):
            got = task.outcomes(Job(index, numbers))
            outcomes[index][numbers] = got
            if not np.array_equal(got, self.want[index]):
                yield from _found(self._broken_cells(index, got))
        for name in single.CHECKS:
            if name != FIRST:
                yield from _found(single.violation(name, subject, self.telling))
        yield from _found(deterministic(task, outcomes, [numbers[::REPEATED] for numbers in self.numbers]))
        jobs = removal.jobs_at(outcomes, [numbers[::REPEATED] for numbers in self.numbers])
        removed = [task.outcomes(job) for job in jobs]
        yield from _found(removal.violation(self.products, outcomes, jobs, removed))
        yield from self._explained(_with(explain, self.specs), subject.classifier)

    def _broken_cells(self, index: int, got: Array) -> Violation | None:
        product, numbers = self.products[index], self.numbers[index]
        view = View(self.facts[index], self.expected[index], got)
        for name, check in INVARIANTS.items():
            broken = np.flatnonzero(np.broadcast_to(check(view), got.shape))
            if len(broken):
                _, number = simplest(product, numbers[broken])
                at = int(np.flatnonzero(numbers == number)[0])
                want = describe(int(self.want[index][at]))
                return Violation(name, len(broken), str(product.cell(number)), want, describe(int(got[at])))
        return None

    def _explained(self, explain: Explain, classifier: Classifier) -> Iterator[Violation]:
        for product, numbers in zip(self.products, self.numbers, strict=True):
            sample = ExplainedSample(explain, classifier, [product])
            sample.run([numbers[::EXPLAINED]])
            yield from _found(sample.reasons_agree_with_model())
        sample = ExplainedSample(explain, classifier, self.products)
        yield from _found(sample.every_permitted_triple_occurs(self.triples))


@cache
def smoke() -> Smoke:
    """The sample of the declared grid."""
    return Smoke()


def _found(violation: Violation | None) -> Iterator[Violation]:
    if violation is not None:
        yield violation


def _with(function: Any, specs: Any) -> Any:
    def call(*arguments: Any, backends: Any = specs, **keywords: Any) -> Any:
        return function(*arguments, backends=backends, **keywords)

    return call
