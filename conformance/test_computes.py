"""Computes: every backend that can run here against the oracles, within the derived bound."""

from __future__ import annotations

import hypothesis
import pytest
from hypothesis import HealthCheck, Phase, given, settings

from conformance.cases import Case
from conformance.computes import check_case
from conformance.pinned import model_cases, pinned_cases
from conformance.plan import Cell
from conformance.plugin import RESULTS_KEY, session_of
from conformance.results import CheckResult, Status
from conformance.session import Session
from conformance.shrink import shrink
from conformance.strategies import cases

pytestmark = pytest.mark.computes


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for each cell of the plan that runs."""
    if "cell" in metafunc.fixturenames:
        cells = session_of(metafunc.config).runnable
        metafunc.parametrize("cell", cells, ids=[cell.id for cell in cells])


class Failing(AssertionError):
    """A case that a backend fails."""

    def __init__(self, result: CheckResult) -> None:
        super().__init__(f"{result.backend} {result.case}: {result.reason}")
        self.result = result


class Checker:
    """Runs cases on one cell, keeps their results, and turns the first failure into a small one."""

    def __init__(self, cell: Cell, session: Session, results: list[str]) -> None:
        self.cell = cell
        self.session = session
        self.results = results

    def check(self, case: Case) -> None:
        result = check_case(case, self.cell.subject, self.session.target)
        if result.status is Status.FAILED:
            raise Failing(result)
        self.results.append(result.to_json())

    def report(self, failing: Failing) -> None:
        """Shrinks the failing case and ends the test with it."""

        def fails(case: Case) -> bool:
            return check_case(case, self.cell.subject, self.session.target).status is Status.FAILED

        small = shrink(Case.parse(failing.result.case), fails)
        result = check_case(small, self.cell.subject, self.session.target)
        if result.status is not Status.FAILED:  # not repeatable: keep what was seen
            result = failing.result
        self.results.append(result.to_json())
        pytest.fail(
            f"{result.backend} does not compute {result.case}\n  {result.reason}\n"
            f"  found as: {failing.result.case}\n  reproduce: {result.reproduce}",
            pytrace=False,
        )


@pytest.fixture
def checker(cell: Cell, fp8moe_session: Session, request: pytest.FixtureRequest) -> Checker:
    results: list[str] = []
    request.node.stash[RESULTS_KEY] = results
    return Checker(cell, fp8moe_session, results)


def test_pinned(cell: Cell, checker: Checker) -> None:
    """Every routing law, every value regime, every activation, and the sizes around tile edges."""
    for case in pinned_cases(cell, small=checker.session.target.device == "cpu"):
        try:
            checker.check(case)
        except Failing as failing:
            checker.report(failing)


def test_random(cell: Cell, checker: Checker) -> None:
    """Random configurations: shape, routing law, value regime and seed are drawn, never tensors."""
    session = checker.session

    @hypothesis.seed(session.seed)
    @settings(
        max_examples=session.examples,
        phases=(Phase.generate,),
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=cases(scheme=cell.scheme, activations=cell.activations, small=session.target.device == "cpu"))
    def explore(case: Case) -> None:
        checker.check(case)

    try:
        explore()
    except Failing as failing:
        checker.report(failing)


def test_models(cell: Cell, checker: Checker) -> None:
    """Published models at the sizes that people serve, as far as their weights fit here."""
    run = 0
    for case in model_cases(cell, checker.session.target):
        run += 1
        try:
            checker.check(case)
        except Failing as failing:
            checker.report(failing)
    if not run:
        pytest.skip("no published model has this scheme and these activations at a size that fits here")
