"""A sample of a certificate's cases, run again where there is such a device: what no invention can foresee."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from conformance.certificate.reading import Certificate
from conformance.contain import Job, Limits, Worker, WorkerEnded
from conformance.contain.jobs import FIRST_SECONDS
from conformance.matrix import BY_BITS
from conformance.not_here import UnknownBackend
from conformance.planned import PLAN_SECONDS, Backend, reference_to, unknown_backend
from conformance.results import CheckResult, Status

AGAIN = (Status.PASSED, Status.NOT_SUPPORTED, Status.NOT_APPLICABLE)
"""What speaks for a backend, or at least not against it."""


@dataclass
class Sampled:
    """
    Args:
        cases: that were run again.
        equal: whose output had the same bits.
        refused: that were refused again, and have no output.
        findings: what came out otherwise, a sentence each.
    """

    cases: int = 0
    equal: int = 0
    refused: int = 0
    findings: list[str] = field(default_factory=list)


def spot_check(
    certificate: Certificate,
    count: int,
    seed: int | None = None,
    backend: Backend | None = None,
    progress: Callable[[int], None] = lambda _done: None,
) -> Sampled:
    """Runs so many of the cases again that passed or were refused. Where the verdict is by bits, the bits must be the
    certificate's; elsewhere the status must be, and another device or version may give other bits.

    Args:
        seed: of the choice; None: chosen anew each time, so that nobody can prepare for it.
        backend: None: what the certificate names.
        progress: called with the number of cases that are done.

    Raises:
        ValueError: no such backend or device here; the text says which.
    """
    report, found = certificate.report, Sampled()
    ref = reference_to(report.origin if backend is None else backend)
    told_good = [check for check in report.checks if check.case and check.status in AGAIN]
    chosen = random.Random(seed).sample(told_good, min(count, len(told_good)))
    with Worker(report.target, Limits(first_seconds=FIRST_SECONDS)) as worker:
        with suppress(WorkerEnded):  # the cases tell what it does
            unknown = worker.call(unknown_backend, ref, seconds=PLAN_SECONDS + worker.limits.first)
            if unknown:
                raise UnknownBackend(*unknown)
        for told in chosen:
            result = worker.run(Job(told.check, told.case, ref))
            found.cases += 1
            found.equal += result.digest == told.digest != ""
            found.refused += told.status is result.status is not Status.PASSED
            found.findings += _apart(told, result)
            progress(found.cases)
    return found


def _apart(told: CheckResult, result: CheckResult) -> list[str]:
    where = f"{told.check} {told.case}"
    if result.status is not told.status:
        return [f"{where}: {result.status.value} here: {result.reason[:300]}"]
    if told.judged_by == BY_BITS and result.digest != told.digest:
        return [f"{where}: an output of other bits ({result.digest}, not {told.digest}), where bits are declared"]
    return []
