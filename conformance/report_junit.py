"""A report, or a certificate, as JUnit XML: a suite for each verdict, a test case for each result."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence

from conformance.certificate import figures
from conformance.certificate.tabled import said
from conformance.certificate.verifying import Verified
from conformance.junit import FAILURE, SKIPPED, TOLD, Entry, Suite, rendered
from conformance.report import VERDICTS, Report
from conformance.results import CheckResult, Status

ROOT = "fp8moe"
WHOLE = "as a whole"
"""The name of a result that is of no case and no scheme."""
Command = Callable[[CheckResult], str]


def of_report(report: Report) -> str:
    """What was run here: a failure has its own reproduction line."""
    properties = [
        ("backend", report.backend),
        ("backend.origin", report.origin),
        ("level", report.level),
        ("seed", str(report.seed)),
        ("target", report.target),
        ("device", report.device),
        ("date", report.date),
        *((f"version.{name}", version) for name, version in report.versions.items()),
    ]
    suites = _suites(report, f"{ROOT} check", properties, lambda check: check.reproduce)
    return rendered(f"{ROOT} check {report.backend}", suites, "fp8moe.check")


def of_certificate(found: Verified) -> str:
    """A certificate that could be read: first whether it holds. Reproduction lines are the suite's own, never its."""
    certificate = found.certificate
    assert certificate is not None
    report = certificate.report
    properties = [(name, said(value)) for name, value in figures.environment(certificate)]
    properties += [("note", note) for note in found.notes]
    name = f"{ROOT} certificate"
    against = [Entry(f"finding {number}", name, FAILURE, text) for number, text in enumerate(found.findings, 1)]
    holds = Suite(f"{name}: holds", against or [Entry("holds", name)], properties, report.date)
    suites = _suites(report, name, properties, lambda check: figures.command_of(check, report))
    return rendered(f"{name} {report.backend}", [holds, *suites], "fp8moe.certificate")


def _suites(report: Report, name: str, properties: Sequence[tuple[str, str]], command: Command) -> Iterator[Suite]:
    known = dict.fromkeys((*VERDICTS, *(check.verdict for check in report.checks)))
    for verdict in known:
        of = [check for check in report.checks if check.verdict == verdict]
        told = [*properties, ("verdict", report.verdicts.get(verdict, "none of the three"))]
        seconds = report.seconds if verdict == "computes" else 0.0
        yield Suite(f"{name}: {verdict}", list(_entries(of, report, command)), told, report.date, seconds)


def _entries(checks: Iterable[CheckResult], report: Report, command: Command) -> Iterator[Entry]:
    """CI systems tell results apart by class and name, so that one that is there already gets a number."""
    seen: Counter[tuple[str, str]] = Counter()
    for check in checks:
        name = check.case or check.scheme or WHOLE
        seen[check.check, name] += 1
        count = seen[check.check, name]
        yield _entry(check, name if count == 1 else f"{name} #{count}", report, command)


def _entry(check: CheckResult, name: str, report: Report, command: Command) -> Entry:
    if check.status is Status.PASSED:
        return Entry(name, check.check, TOLD if check.scope else "", check.scope)
    if check.status not in (Status.FAILED, Status.WAIVED):
        return Entry(name, check.check, SKIPPED, f"{figures.word(check)}: {check.reason or 'no reason was given'}")
    found_as = report.unshrunk.get(f"{check.check} {check.case}", "")
    again = command(check)
    detail = [f"found as: {found_as}"] * bool(found_as) + [f"reproduce: {again}"] * bool(again)
    if check.error_over_bound is not None:
        detail.append(f"largest error/bound: {check.error_over_bound:.4g}")
    if check.status is Status.WAIVED:
        return Entry(name, check.check, SKIPPED, f"waived: {check.reason}", detail)
    return Entry(name, check.check, FAILURE, check.reason or "no reason was given", detail)
