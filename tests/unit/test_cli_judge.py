"""`fp8moe check` and `fp8moe zoo`: what they print, and the status that they end with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from conformance.zoo import BACKEND_MUTANTS
from conformance.zoo.known import KNOWN_SURVIVORS
from conformance.zoo.score import ACCIDENT, ERROR, KILLED, NOT_HERE, SURVIVED, Verdict
from fp8moe.commands.zoo import print_score
from tests.unit.command_line import no_variables, run  # noqa: F401 (a fixture)

KNOWN = next(iter(KNOWN_SURVIVORS))


def test_a_run_without_time_is_incomplete_and_says_what_is_left(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    told = run("check", "TorchExperts", "--device", "cpu", "--budget", "0", "--report", str(report), status=2).stdout
    assert "TorchExperts at level smoke on cpu" in told
    assert "the budget of 0 s was spent" in told
    assert told.splitlines()[-1] == "incomplete: selects passed, computes incomplete, performs not_run"
    assert json.loads(report.read_text())["verdict"] == "incomplete"


def test_the_zoo_is_listed() -> None:
    told = run("zoo").stdout
    assert "gate_up_swapped" in told
    assert "up rows are taken for gate rows" in told
    assert f"{len(BACKEND_MUTANTS)} backend mutants" in told


@pytest.mark.parametrize(
    ("name", "outcome", "status"),
    [
        ("a", KILLED, 0),
        ("a", NOT_HERE, 0),
        (KNOWN, SURVIVED, 0),
        ("a", SURVIVED, 1),
        (KNOWN, ERROR, 1),
        (KNOWN, ACCIDENT, 1),
    ],
)
def test_a_score_passes_only_with_survivors_that_are_known(
    name: str, outcome: str, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    killed = Verdict("b", "backend", "smoke", KILLED, "computes.equivalence", "v1:M=1")
    assert print_score([killed, Verdict(name, "backend", "smoke", outcome, reason="why")]) == status
    told = capsys.readouterr().out
    assert f"backend: {1 + (outcome == KILLED)} of {1 + (outcome != NOT_HERE)} killed" in told
    assert outcome == KILLED or f"{outcome}: {name}: " in told
