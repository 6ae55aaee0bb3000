"""Failures that shrink to the same case stay two results that can be told apart."""

from __future__ import annotations

from dataclasses import replace
from threading import Event
from types import SimpleNamespace
from typing import Any, cast

import pytest

from conformance.certification import _Run
from conformance.contain import Worker
from conformance.results import CheckResult, Status
from conformance.waivers import Waivers

CHECK = "computes.equivalence"
SMALLEST = "v1:M=1"


def test_two_that_come_to_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several workers may fail on a scheme at once. Were both told on the smallest case, a certificate would have it
    twice."""

    def smallest(_worker: Worker, _ref: Any, failure: CheckResult, *_: Any) -> CheckResult:
        return replace(failure, case=SMALLEST)

    monkeypatch.setattr("conformance.certification.smallest", smallest)
    run = _Run(
        "TorchExperts", "smoke", None, "cpu", 0, None, None, False, 1, None, None, Waivers(), None, Event(), None
    )
    run.in_force = cast(Any, SimpleNamespace(covering=lambda _check, _case: None))
    cases = ("v1:M=17", "v1:M=33")
    run.results = {
        (CHECK, case): CheckResult("computes", CHECK, Status.FAILED, "TorchExperts", "block", case, "wrong")
        for case in cases
    }
    run._shrink(cast(Worker, None))
    assert [result.case for result in run.results.values()] == [SMALLEST, "v1:M=33"]
    assert {key[1]: result.case for key, result in run.shrunk.items()} == {"v1:M=17": SMALLEST, "v1:M=33": "v1:M=33"}
