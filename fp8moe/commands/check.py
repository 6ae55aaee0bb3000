"""`fp8moe check BACKEND`: the suite's checks on one backend, at a level, with progress and a table to look at."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from threading import Event

from rich.console import Console
from rich.table import Table
from rich.text import Text

from conformance import kept_text
from conformance.at_work import AtWork
from conformance.axes import AXES, Space
from conformance.cases import Case
from conformance.certification import check_backend
from conformance.checks import CHECKS, EQUIVALENCE
from conformance.contain import Limits, SuiteError
from conformance.hangs import IT_HANGS
from conformance.left import cases_left
from conformance.levels import LEVELS
from conformance.matrix import BY_BITS, BY_BOUND
from conformance.planned import BadRequest, OtherCode
from conformance.report import FAILED, INCOMPLETE, PASSED, Report
from conformance.report_junit import of_report
from conformance.results import CheckResult, Status
from conformance.shards import Shard, left_over
from conformance.vocabulary import SCHEME_NAMES
from conformance.waivers.in_force import CHECK as WAIVERS
from fp8moe.commands import tables
from fp8moe.commands.app import EXIT_OWN_ERROR
from fp8moe.commands.as_typed import as_typed
from fp8moe.commands.failures import apart, print_as_plain, print_failures
from fp8moe.commands.files import NotWritten, check_folders, kept_elsewhere, why_unread, write_meanwhile, write_whole
from fp8moe.commands.progress import progress
from fp8moe.commands.question import BadInput, pick
from fp8moe.commands.waivers import read
from fp8moe.counted import counted

EXIT = {PASSED: 0, FAILED: 1, INCOMPLETE: 2}
STYLES = {PASSED: "green", FAILED: "bold red", INCOMPLETE: "yellow"}


class NotGoneOnWith(BadInput):
    """A report to go on with is of other code of the backend than is here; `told` says what differs."""

    def __init__(self, given: str, error: OtherCode) -> None:
        super().__init__(_named(given, error))
        self.told = error.told


def _named(given: str, error: BadRequest) -> str:
    """What is said of the report to go on with, by what was given for it."""
    text = str(error)
    return f"{given}{text.removeprefix('resume')}" if text.startswith("resume: ") else text


def read_report(given: str, path: Path, otherwise: str) -> Report:
    """
    Args:
        given: what the error begins with; `otherwise` is its remedy where the file is not there, or none.

    Raises:
        BadInput: it cannot be read, or is no report.
    """
    try:
        return Report.from_json(kept_text.read_text(path))
    except (OSError, ValueError) as error:
        raise BadInput(f"{given}: {why_unread(path, error)}; {otherwise}") from None


def checked(
    backend: str,
    level: str,
    device: str | None,
    seed: int,
    budget: float | None,
    report: Path | None,
    resume: Path | Report | None,
    seconds: float | None = None,
    waivers: Path | None = None,
    shard: Shard | None = None,
    interrupted: Event | None = None,
    named: str = "",
) -> Report:
    """Runs the checks, and tells on standard error how far it has come.

    Args:
        report: that it is to go into; meanwhile, the run so far goes there.
        interrupted: as `check_backend` takes it.
        named: what errors call a report to go on with that is read already.

    Raises:
        NotGoneOnWith: `resume` is of other code of the backend.
        BadInput: an unknown backend, level or device, a report that cannot be read, written, or resumed, a file of
            waivers that breaks the rules.
    """
    if report is not None:
        check_folders({"--report": report})
    before = resume
    if isinstance(resume, Path):
        named = f"--resume {resume}"
        before = read_report(named, resume, "name what `--report` of an earlier run wrote")
    assert not isinstance(before, Path)
    known = None if waivers is None else read("--waivers", waivers)
    at_work = AtWork()
    with progress(f"{backend}, {level}" + (f", shard {shard}" if shard else ""), at_work) as tell:

        def on_result(done: int, planned: int, result: CheckResult, left: float | None) -> None:
            tell(done, planned, result.check, left)

        try:
            found = check_backend(
                backend,
                level=pick("--level", level, LEVELS),
                device=device,
                seed=seed,
                budget_s=budget,
                resume=before,
                limits=None if seconds is None else Limits(seconds=seconds),
                progress=on_result,
                shard=shard,
                waivers=known,
                interrupted=interrupted,
                keep=None if report is None else partial(keep_so_far, report),
                at_work=at_work,
            )
        except OtherCode as error:
            raise NotGoneOnWith(named, error) from None
        except BadRequest as error:
            raise (as_typed(error) if error.argument else BadInput(_named(named, error))) from None
    return found


def write_report(path: Path, report: Report) -> None:
    """
    Raises:
        NotWritten: it cannot be written there.
    """
    write_whole(path, kept_text.content_of(path, report.to_json()))


def keep_so_far(path: Path, report: Report) -> None:
    """Of a run that has not ended; that it cannot be written is told at its end."""
    write_meanwhile(path, kept_text.content_of(path, report.to_json()))


def write_junit(path: Path, report: Report) -> None:
    """As `write_report`."""
    write_whole(path, of_report(report))


def all_written(found: Report, report: Path | None, junit: Path | None) -> bool:
    """Writes what was asked for; whether each file is where it was to be; if not, it is told where it is."""
    whole = True
    for path, write in ((report, write_report), (junit, write_junit)):
        try:
            if path is not None:
                write(path, found)
        except NotWritten as error:
            whole = False
            print(f"fp8moe: {error}", file=sys.stderr)
    return whole


def status_of(report: Report) -> int:
    """0 passed, 1 failed, 2 incomplete."""
    return EXIT[report.verdict]


def tell_hanging(report: Report, again: str) -> None:
    """That the run gave up on a backend that hangs, and how to go on: `again`, in words."""
    for why, count in cases_left(report.checks).items():
        if why.startswith(IT_HANGS):
            told = f"gave up: {why}; not run: {counted(count, 'case')}. Where it is slow and does not hang, {again}"
            tables.console(stderr=True).print(told, markup=False, soft_wrap=True)


def tell_interrupted(found: Report, report: Path | None) -> None:
    """How to go on with a run that a signal ended; where none asked for a report, it is kept all the same.

    Args:
        report: where it is.
    """
    if not left_over(found):
        return
    again = "interrupted: " if report is not None else "interrupted, without --report: "
    kept = report or kept_elsewhere("report.json", found.to_json().encode())
    again += f"--resume {kept} goes on with it" if kept else "nothing is kept, since no place took it"
    tables.console(stderr=True).print(again, markup=False, soft_wrap=True)


def told_error(error: SuiteError) -> int:
    print(f"{error}\nfp8moe check: an error of the suite itself, no verdict on the backend", file=sys.stderr)
    return EXIT_OWN_ERROR


def print_report(report: Report, each: str | None = "each is in the report") -> None:
    """The verdicts, a table of check against scheme, what was covered, and each failure with one command.

    Args:
        each: where failures are told in full that are only named; None: here.
    """
    out = tables.console()
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    backend = report.origin or report.backend  # as it was named
    out.print(f"{backend} at level {report.level} on {report.place}, {report.device}", soft_wrap=True)
    out.print(f"{versions}; seed {report.seed}; {report.seconds:.0f} s", soft_wrap=True)
    evidence = ", ".join(f"{name} ({counted(count, 'result')})" for name, count in report.evidence.items())
    out.print(f"evidence: {evidence or 'none'}", soft_wrap=True, markup=False)
    out.print(_matrix(report.checks))
    out.print(
        "=N: N cases equal, bit for bit, to the replay; ok N: within the bound; -: not supported; n/a: nothing to show"
    )
    for why, count in Counter(
        check.judged_by.removeprefix(BY_BOUND)
        for check in report.checks
        if check.check == EQUIVALENCE and check.judged_by.startswith(BY_BOUND)
    ).items():
        out.print(Text(f"judged by the bound: {counted(count, 'case')}: {why}"), soft_wrap=True)
    if report.coverage and not _is_begun(report):
        out.print("covered: nothing so far, since none of the cases that are for it has passed")
    else:
        for line in report.coverage:
            out.print(f"covered: {line} of {len(AXES)} axes")
    if report.coverage:
        out.print(
            f"excluded: {counted(len(report.excluded), 'pair')} of values that no case has, each with its reason in "
            "the report"
        )
    spread = report.distribution()
    if spread:
        figures = ", ".join(f"{name} {spread[name]:.2g}" for name in ("median", "p99", "largest"))
        out.print(
            f"error/bound of {counted(round(spread['cases']), 'case')} that the bound was computed for: {figures} "
            "(limit 1)"
        )
    _print_left(out, report)
    failures, named = (report.failures, []) if each is None else apart(report.failures)
    print_failures(out, "FAILED", "bold red", failures, report.unshrunk)
    print_as_plain(out, named, each or "")
    print_failures(out, "WAIVED", "bold yellow", report.waived, report.unshrunk)
    for check in report.checks:
        if check.check == WAIVERS:
            out.print(Text(f"waivers: {check.scope}"), soft_wrap=True)
    if report.takes:
        out.print(Text(report.scope), soft_wrap=True)
    told, verdict = _shard_told(report) if report.shard else _verdict_told(report)
    style = STYLES[INCOMPLETE if report.waived and verdict == PASSED else verdict]
    out.print(Text(told, style=style), soft_wrap=True)


def _is_begun(report: Report) -> bool:
    """Whether a case has passed that counts for what is covered, which those pinned by name do not."""
    space = Space(report.takes, fnuz=report.fnuz)
    return any(
        space.row(Case.parse(check.case)) is not None
        for check in report.checks
        if check.check == EQUIVALENCE and check.case and check.status is Status.PASSED
    )


def _verdict_told(report: Report) -> tuple[str, str]:
    """The last line, and the verdict in whose style it is."""
    with_waived = f" with {len(report.waived)} waived" if report.waived else ""
    verdicts = ", ".join(f"{name} {verdict}" for name, verdict in report.verdicts.items())
    return f"{report.verdict}{with_waived}: {verdicts}", report.verdict


def _shard_told(report: Report) -> tuple[str, str]:
    """The same of a piece, which has no verdict of its own: whether it was run to its end, and what failed in it."""
    counts = Counter(check.status for check in report.checks if check.case)
    others = ((len(report.failures), "failed"), (counts[Status.WAIVED], "waived"))
    told = ", ".join(
        [f"{counted(counts[Status.PASSED], 'case')} passed", *(f"{n:,} {word}" for n, word in others if n)]
    )
    ended = not left_over(report)
    verdict = FAILED if report.failures else PASSED if ended else INCOMPLETE
    return f"shard {report.shard}: {'done' if ended else 'not at its end'}, {told}", verdict


def _print_left(out: Console, report: Report) -> None:
    """What was not run or is not supported, each reason once."""
    left: dict[tuple[str, str], list[str]] = {}
    for why, count in cases_left(report.checks).items():
        out.print(Text(f"not run: {counted(count, 'case')}: {why}"), soft_wrap=True)
    for check in report.checks:
        if check.status in (Status.NOT_RUN, Status.NOT_SUPPORTED) and not cases_left([check]):
            left.setdefault((check.status.value.replace("_", " "), check.reason), []).append(
                f"{check.check.removeprefix('computes.')}{f' on {check.scheme}' if check.scheme else ''}"
            )
    for (status, reason), which in left.items():
        names = ", ".join(which[:4]) + (f" and {len(which) - 4} more" if len(which) > 4 else "")
        out.print(Text(f"{status}: {names}: {reason}"), soft_wrap=True)


def _matrix(checks: Sequence[CheckResult]) -> Table:
    found: dict[str, dict[str, list[CheckResult]]] = {}
    for check in checks:
        if check.verdict == "computes" and check.case:
            found.setdefault(check.check, {}).setdefault(check.scheme, []).append(check)
    schemes = [name for name in SCHEME_NAMES if any(name in row for row in found.values())]
    table = tables.table("cases by check and scheme", "check", "equal bits", *schemes)
    for name, row in found.items():
        cells = (_cell(row.get(scheme, [])) for scheme in schemes)
        table.add_row(name.removeprefix("computes."), CHECKS[name].exactness.value, *cells)
    return table


def _cell(results: Sequence[CheckResult]) -> Text:
    failed = sum(result.status is Status.FAILED for result in results)
    passed = [result for result in results if result.status is Status.PASSED]
    if failed:
        return Text(f"FAIL {failed}", style="bold red")
    equal = sum(result.judged_by == BY_BITS for result in passed)
    waived = sum(result.status is Status.WAIVED for result in results)
    parts = [f"={equal}"] * bool(equal) + [f"ok {len(passed) - equal}"] * (len(passed) > equal)
    parts += [f"waived {waived}"] * bool(waived)
    if parts:
        return Text(" ".join(parts), style="yellow" if waived else "green")
    return Text(
        "n/r" if any(result.status is Status.NOT_RUN for result in results) else "n/a" if results else "-", "dim"
    )
