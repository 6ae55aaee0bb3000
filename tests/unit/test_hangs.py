"""A backend that hangs wherever it is called: the run gives up soon, says so, and can be gone on with."""

from __future__ import annotations

import os
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from conformance.at_work import AtWork
from conformance.certification import check_backend
from conformance.contain import Limits, SubjectRef, Worker, WorkerEnded
from conformance.contain.worker import HUNG
from conformance.hangs import IN_A_ROW, Hangs, hung_before
from conformance.left import cases_left
from conformance.planned import Plan, fingerprint_of
from conformance.probe.backend import CHECK as FINGERPRINT
from conformance.report import Report
from conformance.results import CheckResult, Status
from conformance.waivers.release import release_of
from tests.unit.certificates import BlockAlone

pytest.importorskip("cloudpickle", reason="classes that are local to a function travel by cloudpickle, a dev extra")


def ended(status: Status, seconds: float = 0.0) -> CheckResult:
    measured = {HUNG: seconds} if seconds else {}
    return CheckResult("computes", "computes.equivalence", status, reason="a reason", measured=measured)


def test_in_a_row_in_every_process() -> None:
    hangs = Hangs(processes=2)
    for seconds in (240.0, 240.0, 60.0, 60.0):
        hangs.take(ended(Status.FAILED, seconds))
        assert hangs.why_not_on == ""
    hangs.take(ended(Status.NOT_SUPPORTED))  # it was not called
    hangs.take(ended(Status.WAIVED, 60.0))
    assert hangs.why_not_on == "it hangs: 5 cases in a row did not end within 60 or 240 s"


@pytest.mark.parametrize("status", [Status.PASSED, Status.FAILED, Status.WAIVED])
def test_a_case_that_comes_to_its_end_begins_anew(status: Status) -> None:
    hangs = Hangs(processes=1)
    for seconds in (5.0, 5.0, 0.0, 5.0, 5.0):
        hangs.take(ended(Status.FAILED if seconds else status, seconds))
    assert hangs.why_not_on == ""


def test_only_more_time_makes_a_case_that_hung_worth_another_try() -> None:
    assert hung_before(ended(Status.FAILED, 5.0), 5.1)
    assert not hung_before(ended(Status.FAILED, 5.0), 5.0)
    assert not hung_before(ended(Status.FAILED), 1e9)


class Named(AtWork):
    """Keeps what a run was at, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def on(self, what: str) -> AbstractContextManager[None]:
        self.seen.append(what)
        return super().on(what)


def test_a_run_gives_up_and_is_gone_on_with(tmp_path: Path) -> None:
    mark = tmp_path / "repaired"

    class Hanging(BlockAlone):
        def apply(self, *args: Any, **kwargs: Any) -> Tensor:
            while not mark.exists():
                time.sleep(0.05)
            return super().apply(*args, **kwargs)

    named = Named()

    def checked(seconds: float, before: Report | None) -> Report:
        limits = Limits(seconds=seconds)
        return check_backend(Hanging, device="cpu", workers=1, limits=limits, resume=before, at_work=named)

    first = checked(1.0, None)
    assert first.verdict == "failed"
    hung = [check for check in first.checks if check.case]
    assert len(hung) == IN_A_ROW
    assert set(named.seen) > {f"equivalence {check.case}" for check in hung if check.check == "computes.equivalence"}
    assert named.seen[0] == "loading it, and asking what it takes"
    assert named.longest is None
    assert all("it did not end within 1 s" in check.reason and check.measured[HUNG] == 1.0 for check in hung)
    why = "it hangs: 3 cases in a row did not end within 1 s"
    assert cases_left(first.checks)[why] > 20
    assert sum(cases_left(first.checks).values()) == first.planned - IN_A_ROW
    (told,) = [check for check in first.checks if check.check == FINGERPRINT]
    assert (told.status, told.reason) == (Status.NOT_RUN, f"{why}: the fingerprint was not taken")

    mark.touch()
    kept = Report.from_json(first.to_json())
    again = checked(60.0, kept)
    assert again.verdict == "passed", [failure.reason for failure in again.failures]
    assert sum(bool(check.case) for check in again.checks) == again.planned
    assert checked(1.0, kept).verdict == "failed"  # within a second it did hang


class Asked:
    """A worker that is not there, and keeps how long it was to be waited for."""

    target_name = "cpu"

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.seconds = 0.0

    def call(self, function: object, *_arguments: object, seconds: float) -> Any:
        self.seconds = seconds
        raise LookupError(function)


REF = SubjectRef.named("TorchExperts")


@pytest.mark.parametrize(
    ("ask", "suites_own", "layers"),
    [
        (lambda worker: fingerprint_of(worker, REF), 0.0, 4),
        (lambda worker: Plan.of(worker, REF, None, "smoke", 0), 30.0, 1),
        (lambda worker: release_of(worker, REF), 30.0, 1),
    ],
    ids=["fingerprint", "plan", "release"],
)
@pytest.mark.parametrize("limits", [Limits(seconds=5.0), Limits(first_seconds=240.0)], ids=["asked for", "default"])
def test_the_limit_reaches_whatever_runs_the_backend(ask: Any, suites_own: float, layers: int, limits: Limits) -> None:
    worker = Asked(limits)
    with pytest.raises(LookupError):
        ask(worker)
    assert worker.seconds == suites_own + limits.first + (layers - 1) * limits.seconds


def test_a_backend_that_hangs_where_it_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    class Loading(BlockAlone):
        @staticmethod
        def is_supported_config(*_args: Any, **_kwargs: Any) -> Any:
            time.sleep(1000)

    monkeypatch.setattr("conformance.planned.PLAN_SECONDS", 3.0)
    report = check_backend(Loading, device="cpu", workers=1, limits=Limits(seconds=1.0))
    assert report.verdicts["selects"] == "failed"
    assert "it did not end within 4 s, in is_supported_config" in report.failures[0].reason


def test_a_worker_that_dies_is_no_hang() -> None:
    class Dying(BlockAlone):
        def apply(self, *args: Any, **kwargs: Any) -> Tensor:
            os._exit(3)

    report = check_backend(Dying, device="cpu", workers=1, limits=Limits(seconds=60.0), stop_at_first=True)
    assert any("it ended the process with status 3" in failure.reason for failure in report.failures)
    assert not any(HUNG in check.measured for check in report.checks)


def test_time_that_is_up_is_told_with_its_limit() -> None:
    with Worker("cpu") as worker:
        with pytest.raises(WorkerEnded, match=r"it did not end within 0\.5 s") as found:
            worker.call(time.sleep, 100, seconds=0.5)
        assert found.value.hung
