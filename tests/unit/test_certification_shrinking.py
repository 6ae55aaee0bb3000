"""Failures that shrink to the same case stay two results that can be told apart; a small one is confirmed first."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from threading import Event
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from conformance.at_work import AtWork
from conformance.cases import Case
from conformance.certification import _Run, check_backend
from conformance.contain import Job, SubjectRef, Worker
from conformance.planned import ONLY_AFTER_OTHERS, confirmed, smallest
from conformance.results import CheckResult, Status
from conformance.smaller import PLAIN_FAILS, is_as_plain, smaller
from conformance.waivers import Waivers
from tests.unit.certificates import BlockAlone

CHECK = "computes.equivalence"
SMALLEST, LARGE = "v1:M=1", "v1:M=33"


def test_two_that_come_to_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several workers may fail on a scheme at once. Were both told on the smallest case, a certificate would have it
    twice."""

    def smallest(_worker: Worker, _ref: Any, failure: CheckResult, *_: Any) -> CheckResult:
        return replace(failure, case=SMALLEST)

    monkeypatch.setattr("conformance.smaller.smallest", smallest)
    monkeypatch.setattr("conformance.smaller.confirmed", lambda _worker, _ref, found, _failure: found)
    given = ("smoke", None, "cpu", 0, None, None, False, 1, None, None, Waivers(), None, Event(), None, AtWork())
    run = _Run("TorchExperts", *given)
    run.in_force = cast(Any, SimpleNamespace(covering=lambda _check, _case: None))
    cases = ("v1:M=17", "v1:M=33")
    run.results = {
        (CHECK, case): CheckResult("computes", CHECK, Status.FAILED, "TorchExperts", "block", case, "wrong")
        for case in cases
    }
    run._shrink(cast(Worker, None))
    assert [result.case for result in run.results.values()] == [SMALLEST, "v1:M=33"]
    assert {key[1]: result.case for key, result in run.shrunk.items()} == {"v1:M=17": SMALLEST, "v1:M=33": "v1:M=33"}


class Process:
    """A worker whose backend fails on the cases that are told."""

    def __init__(self, *failing: str) -> None:
        self.failing = failing
        self.fresh = False
        self.ran: list[str] = []

    def restart(self) -> None:
        self.fresh = True

    def run(self, job: Job) -> CheckResult:
        assert self.fresh, "in a process that has run others"
        self.fresh = False
        self.ran.append(job.case)
        return result(job.case, Status.FAILED if job.case in self.failing else Status.PASSED)


def result(case: str, status: Status = Status.FAILED) -> CheckResult:
    return CheckResult("computes", CHECK, status, "TorchExperts", "block", case, "wrong")


@pytest.mark.parametrize(
    ("failing", "case", "reason", "ran"),
    [
        ((SMALLEST, LARGE), SMALLEST, "wrong", [SMALLEST]),
        ((LARGE,), LARGE, "wrong", [SMALLEST, LARGE]),
        ((), LARGE, f"wrong; {ONLY_AFTER_OTHERS}", [SMALLEST, LARGE]),
    ],
)
def test_what_a_fresh_process_does_not_confirm_is_not_told(
    failing: tuple[str, ...], case: str, reason: str, ran: list[str]
) -> None:
    process = Process(*failing)
    found = confirmed(cast(Any, process), SubjectRef.named("TorchExperts"), result(SMALLEST), result(LARGE))
    assert (found.case, found.reason, process.ran) == (case, reason, ran)


SHOWN = f"wrong; {PLAIN_FAILS}"
KNOWN = {(CHECK, LARGE): result(SMALLEST)}


@pytest.mark.parametrize(
    ("check", "statistics", "others", "plain", "reason", "asked"),
    [
        ("computes.relation.chunks", {"E1": 3.0}, {}, Status.FAILED, SHOWN, [SMALLEST]),
        ("computes.relation.chunks", {"E1": float("nan")}, {}, Status.FAILED, SHOWN, [SMALLEST]),
        ("computes.relation.chunks", {"E1": 3.0}, KNOWN, Status.PASSED, SHOWN, []),
        ("computes.relation.chunks", {"E1": 3.0}, {}, Status.PASSED, "wrong", [SMALLEST]),
        ("computes.relation.chunks", {"E1": 0.5}, {}, Status.FAILED, "wrong", []),  # two calls differ
        ("computes.relation.chunks", {}, {}, Status.FAILED, "wrong", []),  # it raised
        (CHECK, {"E1": 3.0}, {}, Status.FAILED, "wrong", []),
    ],
)
def test_a_relation_that_fails_where_a_plain_call_does_says_so(
    check: str,
    statistics: Mapping[str, float],
    others: Mapping[tuple[str, str], CheckResult],
    plain: Status,
    reason: str,
    asked: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = replace(result(SMALLEST), check=check, statistics=dict(statistics))
    monkeypatch.setattr("conformance.smaller.smallest", lambda *_: found)
    monkeypatch.setattr("conformance.smaller.confirmed", lambda *_: found)
    ran = []

    def run(job: Job) -> CheckResult:
        ran.append(job.case)
        return result(job.case, plain)

    results = {(check, LARGE): replace(found, case=LARGE), **others}
    worker = cast(Any, SimpleNamespace(run=run))
    made = smaller(
        worker, SubjectRef.named("TorchExperts"), results, dict(others), time.monotonic() + 60, lambda *_: None
    )
    ((key, told),) = made
    assert (key, told.status, told.reason, ran) == ((check, LARGE), Status.FAILED, reason, asked)
    assert is_as_plain(told) == (reason == SHOWN)


class SixthCall(BlockAlone):
    """Wrong from the sixth call of a process on."""

    calls = 0

    def apply(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        SixthCall.calls += 1
        output = super().apply(*args, **kwargs)
        return output * 2 if SixthCall.calls > 5 else output


def test_a_fault_that_depends_on_history_says_so() -> None:
    report = check_backend(SixthCall, device="cpu", budget_s=60, workers=1)
    failure = next(check for check in report.failures if check.check == CHECK)
    assert failure.reason.endswith(ONLY_AFTER_OTHERS)


class NotANumberWhereSmall:
    """A worker whose backend has two faults: NaN for few tokens, wrong numbers for more."""

    def run(self, job: Job) -> CheckResult:
        ratios = {"finite": torch.inf} if Case.parse(job.case).tokens <= 20 else {"E1": 2.0}
        return CheckResult("computes", job.check, Status.FAILED, case=job.case, statistics=ratios)


@pytest.mark.parametrize(("tokens", "expected"), [(130, 21), (20, Case().tokens)])
def test_a_small_case_has_the_fault_of_the_large_one(tokens: int, expected: int) -> None:
    worker, ref = cast(Worker, NotANumberWhereSmall()), SubjectRef("X", "X")
    failure = worker.run(Job(CHECK, f"v1:M={tokens}", ref))
    found = smallest(worker, ref, failure, 10.0)
    assert Case.parse(found.case).tokens == expected
    assert found.statistics == failure.statistics
