"""Selects: every named invariant over the declared grid, and the selector against the model over any input."""

from __future__ import annotations

import pytest
from hypothesis import given, settings

from conformance.decisions.decided import DecisionsError
from conformance.decisions.review import review
from conformance.plugin import JUDGING_KEY, RESULTS_KEY
from conformance.results import CheckResult, Status
from conformance.selection.agreement import explain_disagrees, select_disagrees
from conformance.selection.draw import Call, calls
from conformance.selection.grid import GRID, cell_keys, uncovered_pairs
from conformance.selection.judge import NAMES, REMOVALS, GridReport, judge
from conformance.selection.triples import FILE, committed, witnesses

# One worker of pytest-xdist judges the grid, in processes of its own (with --dist loadgroup).
pytestmark = [pytest.mark.selects, pytest.mark.xdist_group("selection-grid")]

CELLS = 5_000_000


@pytest.fixture(scope="module")
def report(request: pytest.FixtureRequest) -> GridReport:
    """The selector judged over the whole grid, once; beside the other tests where there are some."""
    ahead = request.config.stash.get(JUDGING_KEY, None)
    return judge() if ahead is None else ahead.result()


@pytest.mark.parametrize("invariant", NAMES)
def test_invariant(invariant: str, report: GridReport, request: pytest.FixtureRequest) -> None:
    violation = report.violations[invariant]
    status = Status.PASSED if violation is None else Status.FAILED
    result = CheckResult(
        "selects",
        f"selects.{invariant}",
        status,
        reason="" if violation is None else str(violation),
        scope=f"{report.cells:,} cells",
    )
    request.node.stash[RESULTS_KEY] = [result.to_json()]
    if violation is not None:
        pytest.fail(str(violation), pytrace=False)


def test_decisions_are_as_kept(report: GridReport, request: pytest.FixtureRequest) -> None:
    """What the selector decides in every cell, and by which rule, is what was last reviewed and accepted."""
    assert report.decided is not None
    try:
        found = review(report.decided)
        told, scope = str(found) if found else "", f"{found.kept.cells:,} cells"
    except DecisionsError as error:
        told, scope = str(error), "no cell"
    status = Status.FAILED if told else Status.PASSED
    result = CheckResult("selects", "selects.decisions_as_kept", status, reason=told, scope=scope)
    request.node.stash[RESULTS_KEY] = [result.to_json()]
    if told:
        pytest.fail(told, pytrace=False)


def test_grid_has_as_many_cells_as_declared(report: GridReport) -> None:
    keys = cell_keys(GRID)
    keys.sort()
    assert 1 + int((keys[1:] != keys[:-1]).sum()) >= CELLS
    assert report.cells == len(keys)
    assert report.removals >= REMOVALS


def test_grid_brings_every_two_values_together() -> None:
    assert uncovered_pairs(GRID) == []


def test_committed_triples_are_those_of_the_specification() -> None:
    assert tuple(witnesses()) == committed(), f"`python -m conformance.selection.triples` writes {FILE}"


@settings(max_examples=500, deadline=None)
@given(calls())
def test_any_call_agrees_with_the_specification(call: Call) -> None:
    assert select_disagrees(call) is None
    assert explain_disagrees(call) is None
