"""The gate as tests: decisions, numbers and speed beside a baseline, which pytest-benchmark's storage can keep.

Collected only where `--fp8moe-gate` or `--fp8moe-gate-write` asks for it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from conformance.gate.baseline import Baseline
from conformance.gate.result import GateResult, Status
from conformance.gate.run import GATE_ERRORS, PARTS, Asked, baseline_of, compared_with, default_backends
from conformance.gate.verdicts import Outcome
from conformance.plan import target_name
from conformance.plugin import RESULTS_KEY, session_of
from conformance.results import CheckResult
from conformance.results import Status as CheckStatus

pytestmark = pytest.mark.gate

BESIDE_OTHERS = "not timed beside other processes of pytest-xdist: run -m gate without -n"
VERDICTS = {"decisions": "selects", "numerics": "computes", "speed": "performs"}
"""The question that a part answers."""


@pytest.fixture(scope="module")
def result(request: pytest.FixtureRequest) -> GateResult:
    """Everything that can be compared, once."""
    config = request.config
    if not config.getoption("--fp8moe-gate"):
        pytest.skip("no baseline is given: --fp8moe-gate FILE")
    path = Path(config.getoption("--fp8moe-gate"))
    try:
        baseline = Baseline.load(path)
        asked = Asked(
            _backends(config) or baseline.backends,
            [part for part in PARTS if part != "speed" or _alone(config)],
            unwatched=config.getoption("--fp8moe-gate-unwatched"),
        )
        return compared_with(baseline, path, asked, _quiet)[0]
    except GATE_ERRORS as error:
        pytest.fail(f"--fp8moe-gate: {error}", pytrace=False)


@pytest.mark.parametrize("part", PARTS)
def test_gate(part: str, result: GateResult, request: pytest.FixtureRequest) -> None:
    """Nothing is worse than the baseline; what cannot be told is skipped and says why."""
    status, reason = result.parts[part], _reason(part, result, request.config)
    kept = {Status.PASSED: CheckStatus.PASSED, Status.FAILED: CheckStatus.FAILED}.get(status, CheckStatus.NOT_RUN)
    told = CheckResult(VERDICTS[part], f"gate.{part}", kept, reason=reason, scope=result.compared)
    request.node.stash[RESULTS_KEY] = [told.to_json()]
    if status is Status.FAILED:
        pytest.fail(reason, pytrace=False)
    if status is not Status.PASSED:
        pytest.skip(reason)


def test_write_baseline(request: pytest.FixtureRequest) -> None:
    """Gathers a baseline into the extra information of a benchmark, which `--benchmark-save` keeps."""
    config = request.config
    if not config.getoption("--fp8moe-gate-write"):
        pytest.skip("no baseline is asked for: --fp8moe-gate-write")
    if not config.pluginmanager.has_plugin("benchmark"):
        pytest.fail("--fp8moe-gate-write keeps the baseline in pytest-benchmark's storage: install it", pytrace=False)
    target = target_name(config.getoption("--fp8moe-device"))
    asked = Asked(
        _backends(config) or default_backends(target),
        [part for part in PARTS if part != "speed" or _alone(config)],
    )
    seed = session_of(config).seed
    benchmark: Any = request.getfixturevalue("benchmark")
    command = " ".join(["pytest", *sys.argv[1:]])
    try:
        found = benchmark.pedantic(baseline_of, args=(asked, target, seed, 1, command, _quiet), rounds=1)
    except GATE_ERRORS as error:
        pytest.fail(f"no baseline: {error}", pytrace=False)
    benchmark.extra_info |= {Baseline.KEY: json.loads(found.to_json())}


def _reason(part: str, result: GateResult, config: pytest.Config) -> str:
    if part in result.left:
        return result.left[part] if part != "speed" or _alone(config) else BESIDE_OTHERS
    if part == "decisions" and result.decisions is not None:
        return "\n".join(result.decisions.lines) or result.decisions.reason
    if part == "numerics":
        return "\n".join(str(cell) for cell in result.numerics or () if cell.change.value != "same bits")
    if result.speed is None:
        return ""
    return "\n".join(str(cell) for cell in result.speed.cells if cell.outcome is not Outcome.SAME)


def _backends(config: pytest.Config) -> list[str]:
    return list(config.getoption("--fp8moe-backend"))


def _alone(config: pytest.Config) -> bool:
    return not (hasattr(config, "workerinput") or config.getoption("numprocesses", None))


def _quiet(text: str) -> None:
    """pytest has its own progress."""
