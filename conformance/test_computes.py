"""Computes: every backend that can run here against the oracles, bit for bit or within the derived bound."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import hypothesis
import pytest
from hypothesis import HealthCheck, Phase, given, settings

from conformance.cases import Case
from conformance.checks import EQUIVALENCE
from conformance.contain.worker import HUNG
from conformance.levels import relation_items
from conformance.matrix import PINNED, RANDOM
from conformance.matrix import RELATIONS as RELATIONS_PART
from conformance.pinned import is_checkpoints, model_cases, pinned_cases, simulated_cases
from conformance.plan import Cell
from conformance.plugin import RESULTS_KEY, session_of
from conformance.results import CheckResult, Evidence, Status
from conformance.session import Session
from conformance.shrink import shrink
from conformance.strategies import cases
from fp8moe.backends.torch_experts import TorchExperts

pytestmark = pytest.mark.computes

RANDOM_BYTES = 4 << 20
"""Of a random case's weights: what is large is the published models' affair."""

PLAIN_TOKENS = 64
SIMULATED_SHARE = 12
"""Triton's interpreter gets one random case where others get so many."""


def simulated(cell: Cell) -> bool:
    return cell.evidence is Evidence.SIMULATED


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for each cell of the plan that runs, and one for each published model at each size."""
    session = session_of(metafunc.config)
    if "cell" in metafunc.fixturenames:
        metafunc.parametrize("cell", session.runnable, ids=[cell.id for cell in session.runnable])
    if "model_case" in metafunc.fixturenames:
        found = [case for case in model_cases(session.target) if takers(case, session)]
        metafunc.parametrize("model_case", found, ids=[f"{case.model}-{case.scheme}-M{case.tokens}" for case in found])


def takers(case: Case, session: Session) -> list[Cell]:
    """The cells that a model's case belongs to. Triton's interpreter is left out, which takes minutes for one; backends
    in plain PyTorch get the schemes of the checkpoints, at sizes that do not try one's patience."""
    plain = is_checkpoints(case) and case.tokens <= PLAIN_TOKENS
    return [
        cell
        for cell in session.runnable
        if cell.scheme == case.scheme
        and case.activation in cell.activations
        and not simulated(cell)
        and (plain or not issubclass(cell.subject.experts_cls, TorchExperts))
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
        self.failing: Failing | None = None
        self.judged = False
        self.unjudged = ""
        """Why the last case that was not judged was not."""

    def check(self, case: Case, check: str = EQUIVALENCE) -> None:
        """Raises `Failing`, or skips the test where the budget is spent or the backend cannot be had."""
        if self.session.budget_is_spent:
            pytest.skip(f"the budget of {self.session.budget:g} s was spent before {case}")
        result = self.session.judge(case, self.cell.subject, check)
        if result.status is Status.FAILED:
            self.failing = Failing(result)
            raise self.failing
        if result.status is Status.NOT_RUN:
            pytest.skip(result.reason)
        if result.status is Status.PASSED:
            self.judged = True
        else:
            self.unjudged = result.reason
        self.results.append(result.to_json())

    def skip_if_none_was_judged(self) -> None:
        """What a backend takes in its predicate it may refuse in its constructor, case by case: that is no pass."""
        if self.unjudged and not self.judged:
            pytest.skip(f"no case was judged: {self.unjudged}")

    def told(self, failing: Failing) -> str:
        """Shrinks the failing case, and says what it is."""

        check = failing.result.check

        def fails(case: Case) -> bool:
            return self.session.judge(case, self.cell.subject, check).fails_like(failing.result)

        keep = ("scheme",) if "silu" in self.cell.activations else ("scheme", "activation")
        result = failing.result
        if HUNG not in result.measured:  # a smaller one would hold the run up for as long
            small = shrink(Case.parse(result.case), fails, keep=keep)
            again = self.session.judge(small, self.cell.subject, check)
            if again.status is Status.FAILED:  # else it is not repeatable: what was seen is kept
                result = again
        self.results.append(result.to_json())
        self.session.convicted.add(self.cell.id)
        return (
            f"{result.backend} does not compute {result.case} ({check})\n  {result.reason}\n"
            f"  found as: {failing.result.case}\n  reproduce: {result.reproduce}"
            f"{self.session.isolation.hint(self.cell.subject)}"
        )

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """One part of a cell's checks: its result, passed, failed or not run and why, is kept beside the cases'."""
        status, reason = Status.NOT_RUN, "it did not come to its end"
        try:
            yield
            self.skip_if_none_was_judged()
            status, reason = Status.PASSED, ""
        except pytest.skip.Exception as skipped:
            reason = str(skipped)
            raise
        except (Failing, hypothesis.errors.Flaky):
            assert self.failing is not None
            status, reason = Status.FAILED, str(self.failing)
            pytest.fail(self.told(self.failing), pytrace=False)
        finally:
            part = CheckResult("computes", name, status, self.cell.subject.name, self.cell.scheme, reason=reason)
            self.results.append(part.to_json())


@pytest.fixture
def checker(cell: Cell, fp8moe_session: Session, request: pytest.FixtureRequest) -> Checker:
    results: list[str] = []
    request.node.stash[RESULTS_KEY] = results
    return Checker(cell, fp8moe_session, results)


def test_pinned(cell: Cell, checker: Checker) -> None:
    """Every routing law, every value regime, every activation, and the sizes around tile edges."""
    with checker.part(PINNED):
        small = checker.session.target.device == "cpu"
        for case in simulated_cases(cell) if simulated(cell) else pinned_cases(cell, small=small):
            checker.check(case)


def test_random(cell: Cell, checker: Checker) -> None:
    """Random configurations: shape, routing law, value regime and seed are drawn, never tensors."""
    session = checker.session

    @hypothesis.seed(session.seed)
    @settings(
        max_examples=max(session.examples // SIMULATED_SHARE, 1) if simulated(cell) else session.examples,
        phases=(Phase.generate,),
        database=None,
        deadline=None,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
    @given(
        case=cases(
            cell.scheme, activations=cell.activations, small=session.target.device == "cpu", max_bytes=RANDOM_BYTES
        )
    )
    def explore(case: Case) -> None:
        checker.check(case)

    with checker.part(RANDOM):
        if cell.id in session.convicted:
            pytest.skip("it failed a pinned case already")
        explore()


def test_relations(cell: Cell, checker: Checker) -> None:
    """Each metamorphic relation on a small case of its own."""
    with checker.part(RELATIONS_PART):
        if cell.id in checker.session.convicted:
            pytest.skip("it failed a pinned case already")
        for item in relation_items(cell, range(checker.session.seed, checker.session.seed + 1)):
            checker.check(item.case, item.check)


def test_model(model_case: Case, fp8moe_session: Session, request: pytest.FixtureRequest) -> None:
    """A published model at a size that people serve, on every backend that takes it."""
    results: list[str] = []
    request.node.stash[RESULTS_KEY] = results
    cells = [cell for cell in takers(model_case, fp8moe_session) if cell.id not in fp8moe_session.convicted]
    if not cells:
        pytest.skip("every backend that takes it failed a smaller case already")
    told = []
    checkers = [Checker(cell, fp8moe_session, results) for cell in cells]
    for checker in checkers:
        try:
            checker.check(model_case)
        except Failing as failing:
            told.append(checker.told(failing))
    if told:
        pytest.fail("\n".join(told), pytrace=False)
    if not any(checker.judged for checker in checkers):
        checkers[0].skip_if_none_was_judged()
