"""Times of a device that nothing watched: no verdict on them, whatever they are, unless that is asked for."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from conformance.gate import run
from conformance.gate.baseline import Baseline
from conformance.gate.record import Record
from conformance.gate.result import EXIT, Decisions, Status
from conformance.gate.run import Asked
from conformance.gate.verdicts import Outcome, Reason
from conformance.timing.state import STATE, Watch
from conformance.versions import versions
from fp8moe.cli import app
from fp8moe.commands.gate import print_result
from fp8moe.detection import describe_device
from tests.unit import gate_runs

OUTCOMES = (Outcome.SLOWER, Outcome.FASTER, Outcome.SAME, Outcome.INCONCLUSIVE)
VERDICT = gate_runs.verdicts(["X a", "X b", "X c", "X d"], OUTCOMES)
UNWATCHED = {STATE: "not watched: pynvml is not there: install nvidia-ml-py"}
WATCHED = {"SM clock, MHz": "1980 to 1980, median 1980"}
ASKED = Asked(("X",))


def test_no_verdict_remains_and_figures_do() -> None:
    found = VERDICT.unwatched()
    assert [cell.outcome for cell in found.cells] == [Outcome.INCONCLUSIVE] * 4
    assert not found.slower
    for before, cell in zip(VERDICT.cells, found.cells, strict=True):
        assert replace(cell, outcome=before.outcome, reason=before.reason) == before
    assert replace(found, cells=VERDICT.cells) == VERDICT
    assert [cell.outcome for cell in VERDICT.cells] == list(OUTCOMES)


@pytest.mark.parametrize("reason", [one for one in Reason if one is not Reason.UNWATCHED])
def test_reasons_that_were_there_stay(reason: Reason) -> None:
    cells = (VERDICT.cells[0], replace(VERDICT.cells[3], reason=reason))
    found = replace(VERDICT, cells=cells).unwatched()
    assert [cell.reason for cell in found.cells] == [Reason.UNWATCHED, reason]


@pytest.mark.parametrize(
    ("told", "asked", "stays"),
    [
        (UNWATCHED, ASKED, False),
        ({STATE: "not watched to the end: the watch ended", **WATCHED}, ASKED, False),
        (WATCHED, ASKED, True),
        (UNWATCHED, replace(ASKED, unwatched=True), True),
        (WATCHED, replace(ASKED, unwatched=True), True),
    ],
)
def test_verdicts_stay_where_the_device_was_watched_or_that_is_waived(
    told: dict[str, str], asked: Asked, stays: bool
) -> None:
    assert run._as_watched(VERDICT, told, asked) == (VERDICT if stays else VERDICT.unwatched())


@pytest.mark.parametrize(
    ("waived", "status", "code"), [(False, Status.INCONCLUSIVE, 2), (True, Status.FAILED, 1)], ids=["", "waived"]
)
def test_a_slower_cell_that_was_not_watched_is_no_failure(
    waived: bool, status: Status, code: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    watch = Watch(polls=[], why_not="pynvml is not there: install nvidia-ml-py")
    found = run._paired("A with B", VERDICT, {}, watch, replace(ASKED, unwatched=waived))
    assert found.parts["speed"] is status
    assert replace(found, decisions=Decisions(Status.PASSED)).status is status
    assert replace(found, decisions=Decisions(Status.FAILED)).status is Status.FAILED
    assert found.told == UNWATCHED
    assert (print_result(found), EXIT[status]) == (code, code)
    told = capsys.readouterr().out
    assert "device state: not watched: pynvml is not there: install nvidia-ml-py" in told
    remedy = "no verdict on times: remedy what the device state says, or give --unwatched"
    assert (remedy in told) is not waived
    assert (Reason.UNWATCHED.value in told.replace(UNWATCHED[STATE], "")) is not waived


@pytest.mark.parametrize(
    ("state", "waived", "outcome", "reason"),
    [
        (UNWATCHED, False, Outcome.INCONCLUSIVE, Reason.UNWATCHED),
        (UNWATCHED, True, Outcome.SLOWER, None),
        (WATCHED, False, Outcome.SLOWER, None),
    ],
)
def test_times_beside_a_baseline_have_a_verdict_only_where_they_were_watched(
    monkeypatch: pytest.MonkeyPatch, state: dict[str, str], waived: bool, outcome: Outcome, reason: Reason | None
) -> None:
    def timed(*_: object) -> tuple[Record, dict[str, str]]:
        return gate_runs.record({"TorchExperts v1:M=1": math.log(1.2)}), state

    monkeypatch.setattr(run, "_timed", timed)
    monkeypatch.setattr(run, "setting", lambda: {"driver": "1"})
    speed = [gate_runs.record({"TorchExperts v1:M=1": 0.0})]
    device = describe_device().name
    baseline = Baseline("2026-11-28T22:05:42+00:00", "cuda", device, versions(), 0, "", "", {}, speed, [WATCHED])
    asked = Asked(("TorchExperts",), ("speed",), unwatched=waived)
    result, here = run.compared_with(baseline, Path("baseline.json"), asked, lambda text: None)
    assert result.speed is not None
    (cell,) = result.speed.cells
    assert (cell.outcome, cell.reason) == (outcome, reason)
    assert (result.told, here.states) == (state, [state])


def test_a_baseline_is_written_without_that_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["gate", "--write", "baseline.json", "--unwatched"])
    assert result.exit_code == 64
    assert (
        "--unwatched has no meaning with --write: it goes with --baseline and --against and --against-backend; leave it"
        in " ".join(result.stderr.split())
    )
    assert not list(tmp_path.iterdir())


def test_a_baseline_that_nothing_watched_is_no_ground_either(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "_timed", lambda *_: (gate_runs.record({"TorchExperts v1:M=1": math.log(1.2)}), WATCHED))
    monkeypatch.setattr(run, "setting", lambda: {"driver": "1"})
    speed = [gate_runs.record({"TorchExperts v1:M=1": 0.0})]
    named = ("2026-11-28T22:05:42+00:00", "cuda", describe_device().name, versions(), 0, "", "", {}, speed)
    asked = Asked(("TorchExperts",), ("speed",))
    result, _ = run.compared_with(Baseline(*named, [UNWATCHED]), Path("baseline.json"), asked, lambda text: None)
    assert result.speed is not None
    assert [cell.reason for cell in result.speed.cells] == [Reason.UNWATCHED]
    assert result.told[STATE] == f"{UNWATCHED[STATE]}, in the baseline"
