"""What a run plans: which backends run where, and why another does not."""

from __future__ import annotations

import pytest

from conformance.not_here import REFERENCES
from conformance.plan import Target, default_subjects, plan, reference_subjects
from conformance.results import Status
from fp8moe.platforms import PLATFORMS

GPU = Target("cuda", PLATFORMS["h100"], "cuda")


def test_the_plain_ones_run_on_a_gpu_only_where_they_are_named() -> None:
    cells = {cell.id: cell for cell in plan(default_subjects(), GPU, ["block"], named=False)}
    for name in REFERENCES:
        cell = cells[f"{name}-block"]
        assert cell.status is Status.NOT_RUN
        assert f"--fp8moe-backend={name}" in cell.reason
    assert cells["TRITON-block"].status is None
    assert all(cell.status is None for cell in plan(reference_subjects(), GPU, ["block"]))


@pytest.mark.parametrize("named", [True, False])
def test_on_a_cpu_they_always_run(named: bool) -> None:
    target = Target("cpu", PLATFORMS["cpu"], "cpu")
    assert all(cell.status is None for cell in plan(reference_subjects(), target, ["block"], named=named))
