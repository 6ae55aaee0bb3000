"""A certificate as one HTML page that needs nothing else, and two of them side by side: light and dark, no script.

The verdict is `verify`'s, and where a certificate does not hold the page begins with what speaks against it. Whatever
the certificate says is escaped, and of bounded size.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from conformance.axes import AXES
from conformance.certificate import comparing, figures
from conformance.certificate.figures import STATUSES
from conformance.certificate.histogram import binned, histogram, names
from conformance.certificate.reading import Certificate
from conformance.certificate.surroundings import brought_by, released
from conformance.certificate.tabled import Field, Table, field, lines, table
from conformance.certificate.times.shown import compared, shown
from conformance.certificate.verifying import NOT_PROVEN, PROVEN, Verified
from conformance.gate.shown import svg
from conformance.gate.shown.words import clipped
from conformance.pages import environment
from conformance.report import VERDICTS, Report
from conformance.results import CheckResult, Status
from conformance.vocabulary import SCHEME_NAMES
from conformance.waivers.release import OWN
from fp8moe import __version__
from fp8moe.counted import counted

PACKAGES = ("conformance.certificate", "conformance.gate.shown")
CASES_COMPARED = 50
BRIEF = 120
GENERATOR = "fp8moe show"
"""What a page says that it was written by."""
HEAD = 1024
"""Of its first bytes, among which that is."""
"""Characters of a field in the title and the first lines."""
QUESTIONS = {
    "selects": "Is it selected where it says that it can be?",
    "computes": "Does it compute the MoE that it claims to?",
    "performs": "How fast is it?",
}
SPREAD = ("cases", "median", "p99", "largest")
FAILURES_ROOM, AROUND = 250_000, 300
"""Characters of all failures as HTML, and around each."""


def page(found: Verified) -> str:
    """One certificate.

    Raises:
        ValueError: it could not be read.
        conformance.pages.PageUnavailable: jinja2 is missing.
    """
    certificate = _certificate(found)
    report = certificate.report
    matrix = figures.cells(report)
    schemes = figures.schemes(matrix)
    failures, more = _fitting(report.failures, report)
    waived, more_waived = _fitting(report.waived, report)
    values = figures.ratios(report)
    return _render(
        "certificate.html.j2",
        one=_told(found),
        proven=PROVEN,
        not_proven=NOT_PROVEN,
        verdicts=_verdicts(found),
        failures=failures,
        failures_more=more,
        matrix=table(
            "Cases by check and scheme: how many had the bits of the replayed arithmetic, were within the bound, or "
            "came to something else.",
            ["check", *schemes],
            (
                [figures.short(check), *(figures.counts(matrix.get((check, scheme))) for scheme in schemes)]
                for check in dict.fromkeys(check for check, _ in matrix)
            ),
        ),
        refused=figures.refused(report),
        by_bound=table(
            "Why cases were judged by the bound and not by bits.",
            ("reason", "cases", "schemes"),
            figures.judged_by_bound(report),
        ),
        whole=_whole(certificate),
        histogram=histogram("f8-ratios", values, "error/bound of all cases that have one") if values else "",
        bins=_bins(values),
        spreads=table(
            "error/bound of the cases that passed and have one, by scheme; the limit is 1.",
            ("scheme", *SPREAD),
            ([name, *figures.spread_fields(spread)] for name, spread in figures.spreads(report)),
        ),
        coverage=lines(f"{line} of {len(AXES)} axes" for line in report.coverage),
        excluded=lines(report.excluded),
        left=table(
            "What no verdict was come to on, each reason once.",
            ("status", "reason", "results", "of"),
            figures.reasons(report, (Status.NOT_RUN, Status.NOT_SUPPORTED, Status.NOT_APPLICABLE)),
        ),
        waived=waived,
        waived_more=more_waived,
        waivers=table(
            "Waivers that the run was given.",
            [name.replace("_", " ") for name in figures.WAIVER],
            ([waiver.get(name) for name in figures.WAIVER] for waiver in report.waivers),
        ),
        times=shown(certificate),
        surroundings=table(
            "What the certificate says of where it was made, and of the run.",
            ("name", "value"),
            figures.environment(certificate),
        ),
    )


def comparison(first: Verified, second: Verified) -> str:
    """Two certificates side by side.

    Raises:
        ValueError: one could not be read.
        conformance.pages.PageUnavailable: jinja2 is missing.
    """
    both = [_certificate(found) for found in (first, second)]
    told = [_told(found) for found in (first, second)]
    cases = comparing.cases(*both)
    changed, same = comparing.surroundings(*both)
    cells, same_cells = comparing.cells(*both)
    spreads = [dict(figures.spreads(each.report)) for each in both]
    sides = ("first", "second")
    return _render(
        "comparison.html.j2",
        both=told,
        summary=table(
            "Both certificates.",
            ("", *sides),
            [
                [Field(name), Field(a, told[0]["kind"] if name == "verdict" else ""), Field(b, told[1]["kind"])]
                if name == "verdict"
                else [Field(name), Field(a), Field(b)]
                for (name, a), (_, b) in zip(*map(_summary, told), strict=True)
            ],
        ),
        surroundings=table(f"What differs; {counted(same, 'row')} the same.", ("name", *sides), changed),
        cells=table(
            f"Cells of the matrix that differ; {counted(same_cells, 'cell')} the same.",
            ("check", "scheme", *sides),
            cells,
        ),
        histograms=[
            histogram(f"f8-{side}", values, f"{side}: {clipped(of['backend'], 40)}", 10, 540)
            for side, each, of in zip(sides, both, told, strict=True)
            if (values := figures.ratios(each.report))
        ],
        spreads=table(
            "error/bound of the cases that passed and have one; the limit is 1.",
            ("scheme", *(f"{name} ({side})" for side in sides for name in SPREAD)),
            (
                [name, *(text for of in spreads for text in figures.spread_fields(of.get(name, {})))]
                for name in (*SCHEME_NAMES, figures.OTHER, figures.ALL)
                if any(name in of for of in spreads)
            ),
        ),
        times=list(zip(sides, map(shown, both), strict=True)),
        times_compared=compared(*both),
        counts=cases,
        cases=table(
            f"Cases whose status or digest differs, or that one has alone; at most {CASES_COMPARED}.",
            ("check", "case", *sides),
            cases.rows,
            CASES_COMPARED,
        ),
    )


def _render(template: str, **context: Any) -> str:
    shown = environment(*PACKAGES).get_template(template)
    return shown.render(light=svg.LIGHT, dark=svg.DARK, generator=GENERATOR, version=__version__, **context)


def is_page(path: Path) -> bool:
    """Whether a file says that it is such a page, by its first bytes."""
    with path.open("rb") as file:
        return f'<meta name="generator" content="{GENERATOR}">'.encode() in file.read(HEAD)


def _certificate(found: Verified) -> Certificate:
    if found.certificate is None:
        raise ValueError(f"no certificate: {'; '.join(found.findings)}")
    return found.certificate


def _told(found: Verified) -> dict[str, Any]:
    """The headline and what stands below it."""
    certificate = _certificate(found)
    report = certificate.report
    with_waived = f" with {len(report.waived):,} waived" if report.waived else ""
    status = (
        f"{found.verdict}{with_waived}" if found.holds else f"does not hold: {counted(len(found.findings), 'finding')}"
    )
    words = Counter(figures.word(check) for check in report.checks if check.case)
    facts = {
        "backend": report.backend,
        "package": _package(certificate),
        "edition": certificate.edition,
        "device": report.device,
        "date": report.date,
        "signature": figures.signature(found),
        "cases": ", ".join(f"{words[name]:,} {name}" for name in figures.COUNTED if words[name]) or "none",
    }
    return {
        "backend": clipped(field(report.backend).text, BRIEF),
        "status": status,
        "kind": f"is-{'passed' if found.holds and found.verdict == 'passed' else 'failed'}",
        "holds": found.holds,
        "findings": lines(found.findings),
        "notes": lines(note for note in found.notes if note != facts["signature"]),
        "scope": report.scope,
        "facts": [(name, clipped(field(value).text, 2 * BRIEF)) for name, value in facts.items()],
    }


def _package(certificate: Certificate) -> str:
    """The backend's, with its version, and the library's, where it runs the kernels of another one."""
    told, kernels = certificate.surroundings, str(released(certificate.surroundings))
    own, suite = brought_by(told), f"{OWN} {told['suite'].get('version')}"
    if not own and ":" in certificate.report.origin:
        return "none that is installed, so it cannot be named"
    beside = "" if not told.get("release") or kernels in (own, suite) else f", with the kernels of {kernels}"
    return f"{own or f'{suite}, not installed'}{beside}"


def _summary(told: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Of one of two: the verdict, what it is of, and the facts."""
    return [("verdict", told["status"]), ("schemes", told["scope"]), *told["facts"]]


def _verdicts(found: Verified) -> Table:
    report = _certificate(found).report
    told = "verdict" if found.holds else "verdict, as claimed"
    rows = []
    for name in VERDICTS:
        verdict = report.verdicts[name]
        results = [check for check in report.checks if check.verdict == name]
        came_to = Counter("passed" if check.status is Status.PASSED else STATUSES[check.status] for check in results)
        number = ", ".join(f"{count:,} {status}" for status, count in came_to.items()) or "none"
        kind = "is-failed" if verdict == "failed" else ""
        rows.append([Field(name), Field(QUESTIONS[name]), Field(verdict.replace("_", " "), kind), Field(number)])
    return table("Three verdicts, kept apart.", ("part", "question", told, "results"), rows)


def _whole(certificate: Certificate) -> Table:
    """Checks that are of no single case, but for those that were not run."""
    return table(
        "Checks of the backend as a whole.",
        ("check", "scheme", "came to", "over", "remark"),
        (
            [
                check.check,
                Field("") if not check.scheme else check.scheme,
                Field(figures.word(check), "is-failed" if check.status is Status.FAILED else ""),
                field(check.scope) if check.scope else Field(""),
                field(check.reason) if check.reason else Field(""),
            ]
            for check in certificate.report.checks
            if not check.case and check.status not in (Status.NOT_RUN, Status.NOT_SUPPORTED)
        ),
    )


def _bins(values: list[float]) -> Table:
    rows = zip(names(20), binned(values, 20), strict=True)
    return table(
        "The same in figures.", ("error/bound", "cases"), ((name, f"{count:,}") for name, count in rows if count)
    )


def _fitting(checks: Sequence[CheckResult], report: Report) -> tuple[list[figures.Failure], int]:
    """As many failures as the page has room for, and how many more there are."""
    shown, room = list[figures.Failure](), FAILURES_ROOM
    for each in figures.failures(checks, report):
        room -= AROUND + sum(Field(text).size for text in vars(each).values())
        if room < 0:
            break
        shown.append(each)
    return shown, len(checks) - len(shown)
