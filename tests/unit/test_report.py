"""Verdicts of a report, and the file that it is kept in."""

from __future__ import annotations

import math

import pytest

from conformance.report import Report
from conformance.results import CheckResult, Evidence, Status

SELECTS = CheckResult("selects", "selects.predicate", Status.PASSED, "A")
TIMES = CheckResult("performs", "performs.times", Status.NOT_RUN, reason="not measured")


def case(status: Status, number: int = 1, error: float | None = None) -> CheckResult:
    return CheckResult(
        "computes", "computes.equivalence", status, "A", "block", f"v1:M={number}", "why", error, Evidence.HARDWARE
    )


def report(*checks: CheckResult) -> Report:
    return Report("A", "acme:A", "smoke", 0, "cpu", "a CPU", {"torch": "2"}, (SELECTS, *checks, TIMES))


@pytest.mark.parametrize(
    ("statuses", "computes", "verdict"),
    [
        ([Status.PASSED], "passed", "passed"),
        ([Status.PASSED, Status.NOT_APPLICABLE, Status.NOT_SUPPORTED], "passed", "passed"),
        ([Status.PASSED, Status.FAILED, Status.NOT_RUN], "failed", "failed"),
        ([Status.PASSED, Status.NOT_RUN], "incomplete", "incomplete"),
        ([Status.NOT_SUPPORTED], "incomplete", "incomplete"),
        ([], "not_run", "incomplete"),
    ],
)
def test_verdicts(statuses: list[Status], computes: str, verdict: str) -> None:
    found = report(*(case(status, number) for number, status in enumerate(statuses)))
    assert found.verdicts == {"selects": "passed", "computes": computes, "performs": "not_run"}
    assert found.verdict == verdict


def test_a_report_comes_back_from_its_file() -> None:
    found = report(case(Status.PASSED, 1, 0.25), case(Status.FAILED, 2, math.inf))
    again = Report.from_json(found.to_json())
    assert again == found
    assert [check.case for check in again.failures] == ["v1:M=2"]
    assert again.checks[2].error_over_bound == math.inf


def test_the_distribution_is_of_what_passed() -> None:
    found = report(*(case(Status.PASSED, n, n / 200) for n in range(1, 101)), case(Status.FAILED, 200, 7.0))
    assert found.distribution() == {"cases": 100, "median": 51 / 200, "p99": 0.5, "largest": 0.5}
    assert report(case(Status.PASSED)).distribution() == {}


def test_what_is_no_report_is_refused() -> None:
    with pytest.raises(ValueError, match="no report of check_backend in format 1"):
        Report.from_json('{"format": 0}')
