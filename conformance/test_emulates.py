"""Emulated: our recipe in the arithmetic of each device of a table, within the bound derived for that arithmetic.

The replay computes what a unit does, the bound says what a unit may do, and neither was made from the other: an output
outside its bound is a fault of one of them. Which devices are emulated does not depend on the device that is here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from conformance.cases import Case
from conformance.emulated import (
    BACKEND,
    BOUNDS_CHECK,
    CHECK,
    DEVICES,
    EMULATED_SCHEMES,
    Emulation,
    check_device,
    emulate,
    looser_bounds,
)
from conformance.plan import is_triton
from conformance.plugin import RESULTS_KEY, session_of
from conformance.results import CheckResult, Evidence, Status
from conformance.session import Session

pytestmark = pytest.mark.computes

NOT_ASKED_FOR = "TRITON with an FP8 scheme is not among the backends and schemes asked for"


def emulated_cases(scheme: str) -> Iterator[Case]:
    """Small ones: K ends within a scale block in both GEMMs, at either tile height.

    Values of one sign, because accumulators differ most there: what they cut off adds up.
    """
    small = Case(scheme=scheme, tokens=5, experts=4, top_k=2, hidden=272, inter=136)
    large = Case(scheme=scheme, tokens=17, experts=1, top_k=1, hidden=144, inter=136)
    yield replace(small, values="same_sign", seed=1)
    yield replace(small, values="block_scales", seed=2)
    yield replace(large, values="same_sign", seed=3)
    yield replace(large, values="iid", seed=4)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for each case; one that says why where TRITON is not judged in this run."""
    if "emulated_case" not in metafunc.fixturenames:
        return
    asked = {cell.scheme for cell in session_of(metafunc.config).cells if is_triton(cell.subject.experts_cls)}
    found = [case for scheme in EMULATED_SCHEMES if scheme in asked for case in emulated_cases(scheme)]
    ids = [f"{case.scheme}-{case.values}-M{case.tokens}" for case in found]
    metafunc.parametrize("emulated_case", found or [None], ids=ids or ["none"])


def test_emulated(emulated_case: Case | None, fp8moe_session: Session, request: pytest.FixtureRequest) -> None:
    """Every device's output holds its bound, and a unit that keeps more bits is held to a tighter one."""
    why = NOT_ASKED_FOR if emulated_case is None else ""
    if fp8moe_session.budget_is_spent:
        why = why or f"the budget of {fp8moe_session.budget:g} s was spent"
    if why or emulated_case is None:
        not_run = CheckResult("computes", CHECK, Status.NOT_RUN, BACKEND + "emulated devices", reason=why)
        request.node.stash[RESULTS_KEY] = [not_run.to_json()]
        pytest.skip(why)
    emulation = emulate(emulated_case)
    results = [*(check_device(emulation, name) for name in DEVICES), bounds_result(emulation)]
    request.node.stash[RESULTS_KEY] = [result.to_json() for result in results]
    failed = [result for result in results if result.status is Status.FAILED]
    if failed:
        told = [f"{result.backend} {result.case}: {result.reason}\n  {result.reproduce}" for result in failed]
        pytest.fail("\n".join(told), pytrace=False)


def bounds_result(emulation: Emulation) -> CheckResult:
    """Whether bounds follow the units' order."""
    looser = looser_bounds(emulation)
    return CheckResult(
        "computes",
        BOUNDS_CHECK,
        Status.FAILED if looser else Status.PASSED,
        BACKEND + "emulated devices",
        emulation.case.scheme,
        str(emulation.case),
        "; ".join(looser),
        evidence=Evidence.SIMULATED,
        reproduce=f"python -m fp8moe emulate {emulation.case}" if looser else "",
    )
