"""Compiles: our Triton kernels for devices that are not here, against what the selector's predicate claims there."""

from __future__ import annotations

import importlib.util
import sys

import pytest

from conformance.compiled.ahead import begin
from conformance.compiled.outcome import Outcome
from conformance.compiled.report import VERDICT, result_of
from conformance.compiled.runner import Pair
from conformance.compiled.targets import pairs_of
from conformance.plan import is_triton
from conformance.plugin import COMPILING_KEY, RESULTS_KEY, pairs_in, session_of
from conformance.results import CheckResult, Status

# One worker of pytest-xdist compiles, in one process of its own (with --dist loadgroup).
pytestmark = [pytest.mark.compiles, pytest.mark.xdist_group("compiles")]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for each kernel and target; where there are none, one that says why."""
    reason, wanted = _wanted(metafunc.config)
    if reason:
        metafunc.parametrize("pair", [reason], ids=["none"])
    else:
        metafunc.parametrize("pair", wanted, ids=[f"{target}-{kernel}" for target, kernel in wanted])


def _wanted(config: pytest.Config) -> tuple[str, list[Pair]]:
    """Why there is nothing to compile, or what there is."""
    mode: str = config.getoption("--fp8moe-compile")
    if mode == "none":
        return "--fp8moe-compile=none", []
    if not any(is_triton(cell.subject.experts_cls) for cell in session_of(config).cells):
        return "TRITON is not among the backends asked for", []
    if sys.platform != "linux" or importlib.util.find_spec("triton") is None:
        return f"triton is not installed (on Linux it can be; this is {sys.platform})", []
    from fp8moe.kernels.variants import VARIANTS

    return "", pairs_of(mode, tuple(VARIANTS))


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest) -> dict[Pair, Outcome]:
    """What each kernel and target of this session came to: all in one process, begun before the first of the tests."""
    begun = request.config.stash.get(COMPILING_KEY, None)
    return (begun or begin(pairs_in(request.session.items))).result()


def test_compiles(pair: Pair | str, outcomes: dict[Pair, Outcome], request: pytest.FixtureRequest) -> None:
    """Compiles within the device's limits where the predicate claims it, and is refused where it does not."""
    if isinstance(pair, str):
        result = CheckResult(VERDICT, VERDICT, Status.NOT_RUN, reason=pair)
    else:
        result = result_of(outcomes[pair])
    request.node.stash[RESULTS_KEY] = [result.to_json()]
    if result.status is Status.FAILED:
        pytest.fail(f"{result.check}: {result.reason}\n  reproduce: {result.reproduce}", pytrace=False)
    if result.status in (Status.NOT_RUN, Status.NOT_APPLICABLE):
        pytest.skip(result.reason)
