"""Signals that come when a run is all but over: what was run is kept, and the exit status says that it was ended."""

from __future__ import annotations

import os
import signal
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer

from conformance.certification import check_backend
from conformance.report import Report
from conformance.results import CheckResult, Status
from fp8moe.commands import interrupts
from fp8moe.commands.check import tell_interrupted
from fp8moe.commands.interrupts import held, interruptible
from tests.unit.certificates import BlockAlone, invented
from tests.unit.command_line import no_variables, run  # noqa: F401 (a fixture)


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of which a report is being made when SIGTERM comes, twice."""

    def over(*_arguments: object, **_options: object) -> Report:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
        return invented()

    monkeypatch.setattr("fp8moe.commands.check.check_backend", over)


@pytest.mark.usefixtures("late")
def test_the_report_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    done = run("check", "TorchExperts", "--report", str(path), status=143)
    assert done.stdout.splitlines()[-1].startswith("passed: ")
    assert Report.from_json(path.read_text()).verdict == "passed"


@pytest.mark.parametrize("is_asked_for", [True, False])
def test_how_to_go_on_is_told(is_asked_for: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no report was asked for, too: hours may be in it."""
    left = CheckResult("computes", "computes.relation.chunks (relations)", Status.NOT_RUN, "TOY", "block")
    report = invented()
    report = replace(report, checks=[*report.checks, replace(left, reason="it was interrupted")])

    def ended(*_arguments: object, **_options: object) -> Report:
        os.kill(os.getpid(), signal.SIGTERM)
        return report

    monkeypatch.setattr("fp8moe.commands.check.check_backend", ended)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    asked = ("--report", str(tmp_path / "asked.json")) if is_asked_for else ()
    told = run("check", "TorchExperts", *asked, status=143).stderr.splitlines()[-1]
    (kept,) = tmp_path.iterdir()
    assert told == f"interrupted{'' if is_asked_for else ', without --report'}: --resume {kept} goes on with it"
    assert Report.from_json(kept.read_text()) == Report.from_json(report.to_json())


def test_that_nothing_is_kept_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("fp8moe.commands.check.kept_elsewhere", lambda *_: None)
    left = CheckResult("computes", "computes.relation.chunks (relations)", Status.NOT_RUN, "TOY", "block")
    tell_interrupted(replace(invented(), checks=[left]), None)
    assert capsys.readouterr().err == "interrupted, without --report: nothing is kept, since no place took it\n"
    tell_interrupted(invented(), None)
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("late")
def test_a_certificate_is_left_to_the_next_call(tmp_path: Path) -> None:
    done = run("certify", "TorchExperts", "--device", "cpu", "--out", str(tmp_path / "certificate"), status=143)
    assert done.stderr.splitlines()[-1] == "fp8moe: interrupted"
    assert [path.name for path in tmp_path.iterdir()] == ["certificate.partial.json.gz"]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_one_with_nothing_to_keep(number: signal.Signals, status: int) -> None:
    before = signal.getsignal(number)

    @interruptible()
    def command() -> None:
        os.kill(os.getpid(), number)
        raise AssertionError("it went on")

    with pytest.raises(typer.Exit) as ended:
        command()
    assert ended.value.exit_code == status
    assert signal.getsignal(number) is before


def test_one_that_does_not_end_can_be_interrupted_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interrupts, "GRACE", -1.0)

    @interruptible()
    def command() -> None:
        with held() as interrupted:
            os.kill(os.getpid(), signal.SIGINT)
            assert interrupted.is_set()
            os.kill(os.getpid(), signal.SIGINT)
            raise AssertionError("it went on")

    with pytest.raises(typer.Exit):
        command()


def test_another_thread_has_no_handlers() -> None:
    ended: list[Any] = []

    def command() -> None:
        with interruptible():
            ended.append(True)

    thread = threading.Thread(target=command)
    thread.start()
    thread.join()
    assert ended == [True]


def test_an_event_ends_a_run() -> None:
    interrupted = threading.Event()

    def after_five(done: int, _planned: int, _result: CheckResult, _left: float | None) -> None:
        if done == 5:
            interrupted.set()

    report = check_backend(BlockAlone, device="cpu", workers=1, progress=after_five, interrupted=interrupted)
    assert report.verdict == "incomplete"
    assert sum(bool(check.case) for check in report.checks) == 5
    assert any(check.reason == "it was interrupted: the fingerprint was not taken" for check in report.checks)
    with pytest.raises(KeyboardInterrupt):
        check_backend(BlockAlone, device="cpu", interrupted=interrupted)
