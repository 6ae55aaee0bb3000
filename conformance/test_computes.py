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
from conformance.results import CheckResult, Evidence, Status
from conformance.session import Session
from conformance.shrink import shrink
from conformance.strategies import cases

pytestmark = pytest.mark.computes

RANDOM_BYTES = 4 << 20
"""Of a random case's weights: what is large is the published models' affair."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for each cell of the plan that runs, and one for each published model at each size."""
    session = session_of(metafunc.config)
    if "cell" in metafunc.fixturenames:
        metafunc.parametrize("cell", session.runnable, ids=[cell.id for cell in session.runnable])
    if "model_case" in metafunc.fixturenames:
        found = [case for case in model_cases(session.target) if takers(case, session)]
        metafunc.parametrize("model_case", found, ids=[f"{case.model}-{case.scheme}-M{case.tokens}" for case in found])


def takers(case: Case, session: Session) -> list[Cell]:
    """The cells that a model's case belongs to. Triton's interpreter is left out: it takes minutes for one."""
    return [
        cell
        for cell in session.runnable
        if cell.scheme == case.scheme
        and case.activation in cell.activations
        and cell.evidence is not Evidence.SIMULATED
    ]


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
        if self.session.budget_is_spent:
            pytest.skip(f"the budget of {self.session.budget:g} s was spent before {case}")
        result = check_case(case, self.cell.subject, self.session.target)
        if result.status is Status.FAILED:
            raise Failing(result)
        self.results.append(result.to_json())

    def report(self, failing: Failing) -> None:
        """Ends the test with the failing case made small."""
        pytest.fail(self.told(failing), pytrace=False)

    def told(self, failing: Failing) -> str:
        """Shrinks the failing case, and says what it is."""

        def fails(case: Case) -> bool:
            return check_case(case, self.cell.subject, self.session.target).status is Status.FAILED

        small = shrink(Case.parse(failing.result.case), fails)
        result = check_case(small, self.cell.subject, self.session.target)
        if result.status is not Status.FAILED:  # not repeatable: keep what was seen
            result = failing.result
        self.results.append(result.to_json())
        self.session.convicted.add(self.cell.id)
        return (
            f"{result.backend} does not compute {result.case}\n  {result.reason}\n"
            f"  found as: {failing.result.case}\n  reproduce: {result.reproduce}"
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
    if cell.id in session.convicted:
        pytest.skip("it failed a pinned case already")

    @hypothesis.seed(session.seed)
    @settings(
        max_examples=session.examples,
        phases=(Phase.generate,),
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(
        case=cases(
            cell.scheme, activations=cell.activations, small=session.target.device == "cpu", max_bytes=RANDOM_BYTES
        )
    )
    def explore(case: Case) -> None:
        checker.check(case)

    try:
        explore()
    except Failing as failing:
        checker.report(failing)


def test_model(model_case: Case, fp8moe_session: Session, request: pytest.FixtureRequest) -> None:
    """A published model at a size that people serve, on every backend that takes it."""
    results: list[str] = []
    request.node.stash[RESULTS_KEY] = results
    told = []
    cells = [cell for cell in takers(model_case, fp8moe_session) if cell.id not in fp8moe_session.convicted]
    if not cells:
        pytest.skip("every backend that takes it failed a smaller case already")
    for cell in cells:
        checker = Checker(cell, fp8moe_session, results)
        try:
            checker.check(model_case)
        except Failing as failing:
            told.append(checker.told(failing))
    if told:
        pytest.fail("\n".join(told), pytrace=False)
