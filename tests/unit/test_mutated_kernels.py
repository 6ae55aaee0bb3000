"""The texts that mutations of our kernels replace are there, also of those that only a device runs."""

from __future__ import annotations

import pytest

import conformance.zoo
from conformance.zoo.mutated import EDITED, mutated

assert conformance.zoo  # which plants every fault


@pytest.mark.parametrize("name", EDITED)
def test_no_mutation_is_stale(name: str) -> None:
    kernel, edits = EDITED[name]
    assert mutated(kernel, name, edits).__name__ == f"{kernel}_mutant_{name}"


def test_there_are_mutations() -> None:
    assert {"reads_unwritten_rows", "never_promoted", "weighted_product_rounded"} <= set(EDITED)
