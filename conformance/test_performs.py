"""Performs: the time of the selected backend on published models, beside the least that the device allows."""

from __future__ import annotations

from concurrent.futures import wait
from typing import Any

import pytest
import torch

from conformance.performs import CHECK, VERDICT, Selected, id_of, time_case, timed_cases
from conformance.plugin import COMPILING_KEY, OWN_GPU_KEY, RESULTS_KEY, session_of
from conformance.rates import rates_of
from conformance.results import CheckResult, Status
from conformance.session import Session
from conformance.timing.measured_rates import measured_rates
from conformance.timing.regrets import regret_result

pytestmark = pytest.mark.performs

ROUNDS = 20
NO_RATES = "unknown: conformance/rates.py has no such device"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for each model, scheme and size; where nothing can be timed, one that says why."""
    session = session_of(metafunc.config)
    reason = _why_none(metafunc.config, session)
    if reason:
        metafunc.parametrize("selected", [reason], ids=["none"])
        return
    schemes, backends = {cell.scheme for cell in session.cells}, {cell.subject.name for cell in session.cells}
    found = timed_cases(session.target, schemes, backends)
    if found:
        metafunc.parametrize("selected", found, ids=[id_of(selected.case) for selected in found])
    else:
        metafunc.parametrize("selected", ["no published model is for what was asked for"], ids=["none"])


def _why_none(config: pytest.Config, session: Session) -> str:
    if session.target.device != "cuda":
        return f"no CUDA or ROCm device in this run ({session.target.name}): nothing is timed"
    if hasattr(config, "workerinput") and not config.stash.get(OWN_GPU_KEY, False):
        return "not timed where workers of pytest-xdist share a GPU: run -m performs without -n, or with -n auto"
    return ""


def why_not_timed(backend: str, session: Session) -> str:
    """Why it is not timed now; "" where it is."""
    if session.budget_is_spent:
        return f"the budget of {session.budget:g} s was spent before"
    ended = session.isolation.ended.get(backend, "")
    return ended and f"{ended} when it was judged, and times are taken in pytest's own"


def test_time(selected: Selected | str, fp8moe_session: Session, request: pytest.FixtureRequest) -> None:
    """Times it; fails where a promise is broken on the way, or where less time was taken than the work needs."""
    if isinstance(selected, str):
        _keep(request, CheckResult(VERDICT, CHECK, Status.NOT_RUN, reason=selected))
        pytest.skip(selected)
    reason = why_not_timed(selected.backend, fp8moe_session)
    if reason:
        _keep(request, CheckResult(VERDICT, CHECK, Status.NOT_RUN, selected.backend, reason=reason))
        pytest.skip(reason)
    compiling = request.config.stash.get(COMPILING_KEY, None)
    if compiling is not None:
        wait([compiling])  # nothing else is to work while time is measured
    reached = measured_rates()
    measured = time_case(selected, fp8moe_session.target, reached.rates)
    results = [measured.result]
    if measured.result.status is Status.PASSED:
        results.append(regret_result(selected.case, selected.backend, fp8moe_session.target))
    _keep(request, *results)
    if measured.result.status is Status.NOT_RUN:
        pytest.skip(measured.result.reason)
    if measured.stopwatch is not None and request.config.pluginmanager.has_plugin("benchmark"):
        # Not in the signature: the plug-in may be missing, and a test that was skipped above has no use for it.
        benchmark: Any = request.getfixturevalue("benchmark")
        benchmark.pedantic(measured.stopwatch.once, rounds=ROUNDS, warmup_rounds=1)
        device = torch.cuda.get_device_name(0)
        rates = rates_of(device)
        benchmark.extra_info |= {
            "case": measured.result.case,
            "backend": selected.backend,
            "device": device,
            "method": measured.stopwatch.method,
            "floor_us": None,
            "floor_by": measured.floor_by or None,
            "rates": NO_RATES if rates is None else rates.source,
            "measured_rates": reached.told,
            **measured.result.measured,
        }
    measured.stopwatch = None  # what a failed test keeps in its traceback must not be the weights
    if measured.result.status is Status.FAILED:
        pytest.fail(f"{measured.result.backend} {measured.result.case}: {measured.result.reason}", pytrace=False)


def _keep(request: pytest.FixtureRequest, *results: CheckResult) -> None:
    request.node.stash[RESULTS_KEY] = [result.to_json() for result in results]
