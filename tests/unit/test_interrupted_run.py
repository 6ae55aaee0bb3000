"""A run that is interrupted after its last case is not complete."""

from __future__ import annotations

import pytest

from conformance.certification import check_backend
from conformance.contain import Worker
from conformance.probe.backend import CHECK as FINGERPRINT
from conformance.report import INCOMPLETE
from conformance.results import CheckResult, Status
from tests.unit.certificates import BlockAlone


def test_what_is_of_the_whole_run_is_told_as_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_worker: Worker, _ref: object) -> CheckResult:
        raise KeyboardInterrupt

    monkeypatch.setattr("conformance.certification.fingerprint_of", interrupted)
    report = check_backend(BlockAlone, device="cpu", workers=1)
    assert not any(check.status is Status.NOT_RUN and check.case for check in report.checks)
    (told,) = [check for check in report.checks if check.check == FINGERPRINT]
    assert (told.status, told.reason) == (Status.NOT_RUN, "it was interrupted: the fingerprint was not taken")
    assert report.verdict == INCOMPLETE
