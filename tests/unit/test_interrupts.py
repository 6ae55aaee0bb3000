"""Signals that come when a run is all but over: what was run is kept, and the exit status says that it was ended."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import typer

from conformance.certification import check_backend
from conformance.report import Report
from conformance.results import CheckResult
from fp8moe.commands import interrupts
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
    done = run("check", "TOY", "--report", str(path), status=143)
    assert done.stdout.splitlines()[-1].startswith("passed: ")
    assert Report.from_json(path.read_text()).verdict == "passed"


@pytest.mark.usefixtures("late")
def test_a_certificate_is_left_to_the_next_call(tmp_path: Path) -> None:
    done = run("certify", "TOY", "--out", str(tmp_path / "certificate"), status=143)
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
