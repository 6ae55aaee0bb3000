"""What `fp8moe check` prints of a report."""

from __future__ import annotations

from dataclasses import replace

import pytest

from conformance.results import Status
from fp8moe.commands.check import print_report
from tests.unit.certificates import invented


def test_a_failure_tells_the_case_that_it_was_found_as(capsys: pytest.CaptureFixture[str]) -> None:
    report = invented(failing=1)
    failure = next(check for check in report.checks if check.status is Status.FAILED)
    print_report(replace(report, unshrunk={f"{failure.check} {failure.case}": "v1:M=999"}))
    told = capsys.readouterr().out.splitlines()
    at = next(number for number, line in enumerate(told) if line.startswith(f"FAILED {failure.check}"))
    assert told[at + 1 : at + 3] == ["  E1 = 3 > 1", "  found as: v1:M=999"]


def test_one_that_is_as_it_was_found_tells_none(capsys: pytest.CaptureFixture[str]) -> None:
    print_report(invented(failing=1))
    assert "found as" not in capsys.readouterr().out
