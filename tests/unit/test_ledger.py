"""The ledger of a run's results."""

from __future__ import annotations

import pytest

from conformance.results import CheckResult, Ledger, Status

PASSED, FAILED, NOT_RUN = (
    CheckResult("computes", "computes.equivalence", status, "ACME", "block", "v1:M=1")
    for status in (Status.PASSED, Status.FAILED, Status.NOT_RUN)
)


@pytest.mark.parametrize(
    ("results", "kept"),
    [([PASSED, FAILED], FAILED), ([FAILED, PASSED], FAILED), ([FAILED, NOT_RUN], FAILED), ([NOT_RUN, PASSED], PASSED)],
)
def test_a_later_result_stands_but_for_a_failure(results: list[CheckResult], kept: CheckResult) -> None:
    ledger = Ledger()
    for result in results:
        ledger.add(result)
    assert list(ledger) == [kept]
