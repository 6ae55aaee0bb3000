"""The failures of a run, each on the smallest case found, and whether that fails without its relation, too."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace

from conformance.cases import Case
from conformance.checks import EQUIVALENCE
from conformance.contain import DeviceLost, Job, SubjectRef, SuiteError, Worker
from conformance.planned import confirmed, smallest
from conformance.relations.telling import PREFIX
from conformance.results import CheckResult, Status

Key = tuple[str, str]
PLAIN_FAILS = "the plain call fails on this case, too"
"""What the reason of a relation's failure ends with that is an output outside its bound, where a call without the
relation is wrong as well."""


def smaller(
    worker: Worker,
    ref: SubjectRef,
    results: Mapping[Key, CheckResult],
    settled: Mapping[Key, CheckResult],
    until: float,
    is_waived: Callable[[str, Case], object],
) -> Iterator[tuple[Key, CheckResult]]:
    """Each failure that is not settled, smaller, as far as time allows.

    Args:
        results: of the run, by (check, case); to be updated with what is given before the next is asked for.
        until: when `time.monotonic` says so, nothing more is run but what confirms a smaller case.
        is_waived: as `smallest` takes it.
    """
    for key, failure in list(results.items()):
        if failure.status is not Status.FAILED or key in settled or not failure.case:
            continue
        found = smallest(worker, ref, failure, max(until - time.monotonic(), 0.0), is_waived)
        if found.case != failure.case or time.monotonic() < until:
            found = confirmed(worker, ref, found, failure)
        others = {(other.check, other.case) for of, other in results.items() if of != key}
        if (found.check, found.case) in others:  # two failures that come to one could not be told apart
            found = failure
        yield key, _beside_plain(worker, ref, found, results, until)


def _beside_plain(
    worker: Worker, ref: SubjectRef, failure: CheckResult, results: Mapping[Key, CheckResult], until: float
) -> CheckResult:
    """With `PLAIN_FAILS` in its reason where that is so. A relation between two calls whose bits differ says something
    of its own, whatever a plain call does; so does one that raises."""
    outside = any(not ratio <= 1 for ratio in failure.statistics.values())
    if not failure.check.startswith(PREFIX) or not outside:
        return failure
    known = [other.status for other in results.values() if (other.check, other.case) == (EQUIVALENCE, failure.case)]
    if not known and time.monotonic() < until:
        with suppress(DeviceLost, SuiteError):
            known = [worker.run(Job(EQUIVALENCE, failure.case, ref)).status]
    return replace(failure, reason=f"{failure.reason}; {PLAIN_FAILS}") if Status.FAILED in known else failure


def is_as_plain(failure: CheckResult) -> bool:
    """Whether it is told that the plain call fails on its case."""
    return failure.reason.endswith(PLAIN_FAILS)
