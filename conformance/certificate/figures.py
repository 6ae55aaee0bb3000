"""What a certificate's page shows of its evidence, as data: counts, spreads, reasons, failures, surroundings."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from conformance.cases import Case, InvalidCase
from conformance.certificate.reading import Certificate
from conformance.certificate.tabled import Field, field
from conformance.certificate.verifying import Verified
from conformance.checks import CHECKS, repro_command
from conformance.editions import DEVICES
from conformance.matrix import BY_BITS, BY_BOUND
from conformance.probe.backend import CHECK as FINGERPRINT
from conformance.report import Report
from conformance.results import CheckResult, Status
from conformance.vocabulary import SCHEME_NAMES

EQUAL, WITHIN = "equal bits", "within bound"
STATUSES: Mapping[Status, str] = {
    Status.FAILED: "failed",
    Status.WAIVED: "waived",
    Status.NOT_SUPPORTED: "not supported",
    Status.NOT_APPLICABLE: "not applicable",
    Status.NOT_RUN: "not run",
}
COUNTED = (STATUSES[Status.FAILED], STATUSES[Status.WAIVED], EQUAL, WITHIN, *list(STATUSES.values())[2:])
"""In the order in which a cell tells them."""
NO_CASES, NO_FIGURE = "no cases", "-"
OTHER = "other"
"""A scheme that the suite does not know."""
ALL = "all schemes"
NAMED = 4
"""Checks that a reason names."""
PLAIN = re.compile(r"[A-Za-z_][\w.\-]*(:[A-Za-z_][\w.]*)?", re.ASCII)
"""What names a backend and needs no quotes in a shell."""
Cells = dict[tuple[str, str], Counter[str]]


def word(check: CheckResult) -> str:
    """What a result came to."""
    if check.status is not Status.PASSED:
        return STATUSES[check.status]
    return "passed" if not check.case else EQUAL if check.judged_by == BY_BITS else WITHIN


def cells(report: Report) -> Cells:
    """How many cases of each (check, scheme) came to what. What was left after a failure is one result whatever its
    number of cases, which its reason tells."""
    found: Cells = {}
    for check in report.checks:
        if check.verdict == "computes" and (check.case or check.check.endswith(")")):
            name = check.check if check.case else check.check.rpartition(" (")[0]
            scheme = check.scheme if check.scheme in SCHEME_NAMES else OTHER
            found.setdefault((name, scheme), Counter())[word(check)] += 1
    return found


def counts(counted: Counter[str] | None) -> Field:
    """A cell of the matrix in words."""
    if not counted:
        return Field(NO_CASES)
    left = STATUSES[Status.NOT_RUN]
    told = [f"{counted[name]:,} {name}" for name in COUNTED if counted[name] and name != left]
    return Field(", ".join([*told, *[left] * bool(counted[left])]), "is-failed" if counted["failed"] else "")


def schemes(found: Iterable[tuple[str, str]]) -> list[str]:
    """Of cells, in the suite's order."""
    there = {scheme for _, scheme in found}
    return [name for name in (*SCHEME_NAMES, OTHER) if name in there]


def refused(report: Report) -> str:
    """Schemes that no case is of, since the backend does not take them."""
    found = [check.scheme for check in report.checks if not check.case and check.status is Status.NOT_SUPPORTED]
    return field([name for name in dict.fromkeys(found) if name]).text if any(found) else ""


WAIVER = ("check", "case", "backend_version", "device", "reason", "tracker", "owner", "expires")
"""What a page tells of a waiver."""


def short(check: str) -> str:
    return check.removeprefix("computes.")


def spreads(report: Report) -> list[tuple[str, dict[str, float]]]:
    """error/bound of the cases that passed: of each scheme that has any, and of all."""
    parts = []
    for scheme in schemes(cells(report)):
        of = [check for check in report.checks if (check.scheme if check.scheme in SCHEME_NAMES else OTHER) == scheme]
        parts.append((scheme, replace(report, checks=of).distribution()))
    return [(name, spread) for name, spread in (*parts, (ALL, report.distribution())) if spread]


def spread_fields(spread: Mapping[str, float]) -> list[str]:
    """Number of cases, median, p99, largest."""
    if not spread:
        return ["0", NO_FIGURE, NO_FIGURE, NO_FIGURE]
    return [f"{spread['cases']:,}", *(f"{spread[name]:.3g}" for name in ("median", "p99", "largest"))]


def ratios(report: Report) -> list[float]:
    """error/bound of every case that has one, failed or not."""
    return [check.error_over_bound for check in report.checks if check.case and check.error_over_bound is not None]


def reasons(report: Report, statuses: Sequence[Status]) -> list[tuple[str, ...]]:
    """Status, reason, number of results, and which checks they are of: each reason once, the most frequent first."""
    found: dict[tuple[Status, str], Counter[str]] = {}
    for check in report.checks:
        if check.status in statuses:
            name = f"{short(check.check)}{f' on {check.scheme}' if check.scheme else ''}"
            found.setdefault((check.status, check.reason), Counter())[name] += 1
    order = sorted(found.items(), key=lambda each: (statuses.index(each[0][0]), -each[1].total()))
    return [
        (STATUSES.get(status, status.value), reason or "no reason was given", f"{which.total():,}", _named(which))
        for (status, reason), which in order
    ]


def judged_by_bound(report: Report) -> list[tuple[str, str, str]]:
    """Why cases were judged by the bound: the reason, how many, of which schemes."""
    found: dict[str, Counter[str]] = {}
    for check in report.checks:
        if check.case and check.status is Status.PASSED and check.judged_by.startswith(BY_BOUND):
            found.setdefault(check.judged_by.removeprefix(BY_BOUND), Counter())[check.scheme] += 1
    return [(reason, f"{which.total():,}", _named(which)) for reason, which in found.items()]


def _named(which: Counter[str]) -> str:
    more = f" and {len(which) - NAMED} more" if len(which) > NAMED else ""
    return ", ".join(list(which)[:NAMED]) + more


@dataclass(frozen=True)
class Failure:
    """
    Args:
        status: "failed" or "waived".
        command: that runs it again, as this suite gives it; "" where it has none.
        claimed: what the certificate says instead, then.
    """

    check: str
    status: str
    case: str
    reason: str
    found_as: str
    command: str
    claimed: str


def failures(checks: Iterable[CheckResult], report: Report) -> Iterator[Failure]:
    """Of checks that failed, waived or not."""
    for check in checks:
        command = command_of(check, report)
        found_as = report.unshrunk.get(f"{check.check} {check.case}")
        yield Failure(
            field(check.check if check.case or not check.scheme else f"{check.check} on {check.scheme}").text,
            word(check),
            field(check.case).text if check.case else "",
            field(check.reason or "no reason was given").text,
            field(found_as).text if found_as else "",
            command,
            field(check.reproduce).text if check.reproduce and not command else "",
        )


def command_of(check: CheckResult, report: Report) -> str:
    """The command that runs a result again. It is made anew, since a reader copies it into a shell: whatever a
    certificate has in its place reaches no command."""
    if report.target not in DEVICES or not PLAIN.fullmatch(report.origin):
        return ""
    if check.check == FINGERPRINT:
        return f"python -m fp8moe probe {report.origin} --device {report.target}"
    try:
        case = Case.parse(check.case)
    except InvalidCase:
        return ""
    return repro_command(case, report.origin, report.target, check.check) if check.check in CHECKS else ""


def signature(found: Verified) -> str:
    """Whether it is signed, as `verify` told it."""
    for note in found.notes:
        if note.startswith(("signed", "not signed")):
            return note
    first = found.findings[0] if found.findings else ""
    return first if first.startswith("signature: ") else "not looked at"


def environment(certificate: Certificate) -> Iterator[tuple[str, Any]]:
    """Name and value of everything that a certificate says of where it was made, and of the run."""
    report = certificate.report
    yield from (("edition", certificate.edition), ("level", report.level), ("seed", report.seed))
    yield from (("backend", report.backend), ("backend named as", report.origin))
    distribution = certificate.surroundings["distribution"]
    yield from _parts("distribution", distribution) if distribution else [("distribution", "none that is installed")]
    release = certificate.surroundings.get("release")
    yield from _parts("release", release) if release else [("release", "not recorded")]
    yield from _parts("device", certificate.surroundings["device"])
    yield "target", report.target
    yield from _parts("version of", certificate.surroundings["versions"])
    yield from _parts("suite", certificate.surroundings["suite"])
    yield from _parts("activations on", report.takes)
    yield "weights of e4m3fnuz", report.fnuz
    yield from (("date", report.date), ("seconds", report.seconds), ("evidence", certificate.evidence_sha256))


def _parts(name: str, told: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return [(f"{name} {part}", value) for part, value in told.items()]
