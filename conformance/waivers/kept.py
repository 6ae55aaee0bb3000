"""The waivers that a kept report names: whether they make what it calls waived so. For reports that nobody trusts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import date, datetime, timezone

from conformance.levels import Item
from conformance.report import Report
from conformance.results import CheckResult, Status
from conformance.waivers.file import TABLE, waivers_from
from conformance.waivers.in_force import CHECK, excuse, rotten
from conformance.waivers.patterns import matches
from conformance.waivers.release import Release
from conformance.waivers.waiver import WaiverError, Waivers
from fp8moe.counted import counted

SOURCE = "report.waivers"


def waivers_of(report: Report) -> Waivers:
    """Those that a report names.

    Raises:
        WaiverError: they break the rules of a file of waivers on the day of the run.
    """
    if not report.waivers:
        return Waivers()
    return waivers_from({TABLE: [dict(waiver) for waiver in report.waivers]}, SOURCE, today=_day(report))


def _day(report: Report) -> date:
    return datetime.fromisoformat(report.date).astimezone(timezone.utc).date()


def out_of_range(file: Waivers, release: Release) -> Iterator[str]:
    """Waivers for other versions of the backend than was judged."""
    for waiver in file.waivers:
        if not waiver.holds_for(release.version):
            yield f"{SOURCE}: {waiver} is for versions {waiver.backend_version}: judged was {release}"


def contradictions(report: Report, items: Sequence[Item], release: Release) -> Iterator[str]:
    """What about a report's waivers cannot be, each with its place.

    Args:
        report: whose date is one.
        items: what its level goes through on what the backend takes.
        release: that was judged.
    """
    day = _day(report)
    try:
        file = waivers_of(report)
    except WaiverError as error:
        yield str(error)
        return
    yield from out_of_range(file, release)
    for waiver in file.waivers:
        if waiver.backend not in (report.backend, report.origin):
            yield f"{SOURCE}: {waiver} is for backend {waiver.backend!r}: the report is on {report.backend!r}"
        if not any(matches(waiver.device, name) for name in (report.device, report.target)):
            yield f"{SOURCE}: {waiver} is for device {waiver.device!r}: the report is of {report.device!r}"
        if waiver.days_left(day) < 0:
            yield f"{SOURCE}: {waiver} had expired on the day of the run, {day}"
    by_key = {item.key: item for item in items}
    results: Mapping[tuple[str, str], CheckResult] = {
        (check.check, report.unshrunk.get(f"{check.check} {check.case}", check.case)): check for check in report.checks
    }
    for key, check in results.items():
        if check.status is Status.WAIVED and check.verdict == "computes":
            item = by_key.get(key)
            waivers = [waiver for waiver in file.waivers if item and waiver.covers(item.check, item.case)]
            if not any(check.reason.startswith(f"{excuse(waiver)}; ") for waiver in waivers):
                by = f"none of the report's {counted(len(file.waivers), 'waiver')}"
                yield f"{check.check} {check.case}: waived, by {by}"
        elif check.status is Status.WAIVED:
            yield f"{check.check} {check.case}: waived, which only cases of what is computed can be"
    failed = any(check.check == CHECK and check.status is Status.FAILED for check in report.checks)
    if not failed:
        yield from (f"{SOURCE}: {text}" for text in rotten(file.waivers, items, results, lambda waiver: True))
