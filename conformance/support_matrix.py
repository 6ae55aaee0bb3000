"""`python -m conformance.support_matrix`: what is known of each backend, from the registry and the kept reports.

A row counts as hardware only by a report of a run on a device. What failed in it is told, with a scheme or without, and
its verdict is derived anew from its checks. Prints Markdown; with `--check FILE` it tells whether the table in a file
is still what the reports say, with `--write FILE` it puts it there.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from conformance.certificate.statement import EVIDENCE
from conformance.kept_text import read_text
from conformance.matrix import EQUIVALENCE
from conformance.report import FORMAT, INCOMPLETE, Report
from conformance.results import CheckResult, Evidence, Status
from fp8moe.backends.libraries import LibraryBackend
from fp8moe.counted import counted
from fp8moe.registry import seed_backends
from fp8moe.texts import said, visible

HERE = Path(__file__).parents[1]
BEGIN, END = "<!-- support: begin -->", "<!-- support: end -->"
HEAD = ("backend", "evidence", "what was run", "on", "date", "report")
NONE = "-"
COMPUTES, COMPILES = "computes", "compiles"
TOLD = ("torch", "triton")
"""Versions that a row names."""


@dataclass(frozen=True)
class Run:
    """What one report says of one backend.

    Args:
        schemes: that passed on a device, or in the interpreter.
        failed: schemes with a failure, and checks that failed without one, such as the fingerprint.
        level: of `fp8moe check`, and which piece of it; "" for a run of the suite.
        verdict: "incomplete" where a run of `fp8moe check` came to that; "".
        left: checks of cases that were not run.
        waived: checks of cases that failed, as the vendor knew.
        refused: checks of cases whose layer the backend does not take.
        judged: checks that passed or failed.
        release: of what brings the kernels, "" where the report does not tell.
        when: ISO 8601, "" where the report does not tell.
    """

    backend: str
    evidence: Evidence
    schemes: tuple[str, ...]
    failed: tuple[str, ...]
    level: str
    cases: int
    left: int
    refused: int
    waived: int
    judged: int
    device: str
    date: str
    versions: str
    folder: str
    verdict: str = ""
    release: str = ""
    when: str = ""

    @property
    def what(self) -> str:
        if self.evidence is Evidence.COMPILED:
            failed = f"; FAILED: {', '.join(self.failed)}" if self.failed else ""
            return f"{counted(self.cases, 'kernel')} compiled for devices that were not there{failed}"
        schemes = f"{len(self.schemes)} scheme{'' if len(self.schemes) == 1 else 's'}"
        verdict = f", {self.verdict}" if self.verdict else ""
        passed = f"{self.level or 'suite'}{verdict}: {schemes}, {counted(self.cases, 'check')} passed"
        left = f", {self.waived:,} WAIVED" if self.waived else ""
        left += f", {self.left:,} not run" if self.left else ""
        left += f", {self.refused:,} of layers that it does not take" if self.refused else ""
        return f"{passed}{left}; FAILED: {', '.join(self.failed)}" if self.failed else passed + left


def runs_in(reports: Path) -> list[Run]:
    """Of every report of `fp8moe check --report` or `pytest conformance --fp8moe-report` below a folder, gzipped or
    not, and of the report in a certificate's evidence.

    Raises:
        ValueError: a file that is no JSON, a report that is none, or one whose verdict is not that of its checks; the
            text names it.
    """
    found: list[Run] = []
    if not reports.is_dir():
        raise ValueError(f"{reports}: no such folder: --reports names that of the kept runs")
    for path in sorted([*reports.rglob("*.json"), *reports.rglob("*.json.gz")]):
        try:
            content = json.loads(read_text(path))
            folder, release = path.parent, ""
            if isinstance(content, dict) and path.name == EVIDENCE:
                release = _release(content.get("release") or {})
                content, folder = content["report"], folder.parent
            if isinstance(content, dict) and "checks" in content and "backend" in content:
                found += _of_check(content, folder, reports, release)
            elif isinstance(content, dict) and "cells" in content and "results" in content:
                found += _of_suite(content, folder, reports)
        except (KeyError, ValueError) as error:
            raise ValueError(f"{path}: no report that can be read ({error}): mend it, or remove it") from error
        except (AttributeError, TypeError, RecursionError, OSError) as error:  # a part of it is of another kind
            raise ValueError(f"{path}: no report that can be read ({said(error)}): mend it, or remove it") from error
    return found


def _of_check(content: Mapping[str, Any], folder: Path, reports: Path, release: str) -> Iterator[Run]:
    _of_this_format(content)
    report = Report.from_object(content, "report")
    keys = [(check.check, check.scheme, check.case) for check in report.checks if check.case]
    if len(keys) != len(set(keys)):
        raise ValueError(
            f"{counted(len(keys), 'result')} of {counted(len(set(keys)), 'check')} of cases: some are there twice"
        )
    if len(keys) < report.planned and not any(
        check.status is Status.NOT_RUN for check in report.checks if check.verdict == COMPUTES
    ):
        raise ValueError(
            f"planned={report.planned}, with {counted(len(keys), 'result')} and nothing that was not run: some are gone"
        )
    told = content.get("verdict", report.verdict)
    if told != report.verdict:
        raise ValueError(f"verdict={told!r}, and its checks come to {report.verdict!r}: it was changed")
    versions = ", ".join(f"{name} {report.versions[name]}" for name in TOLD if name in report.versions)
    checks = [check for check in report.checks if check.scheme or check.status is Status.FAILED]
    level = f"{report.level} {report.shard}".strip()
    place: tuple[str, ...] = (report.device, report.date[:10] or _date(folder), versions, _relative(folder, reports))
    verdict = INCOMPLETE if report.verdict == INCOMPLETE else ""
    # A class of somebody's may bear a backend's name; its origin is another.
    place = (*place, verdict, release or _release(report.code), report.date)
    yield from _runs(report.origin, checks, level, *place, planned=report.planned)


def _of_suite(content: Mapping[str, Any], folder: Path, reports: Path) -> Iterator[Run]:
    _of_this_format(content)
    device = content["device"]["name"]
    versions = ", ".join(f"{name} {content['device'][name]}" for name in TOLD if content["device"].get(name))
    results = [CheckResult.from_object(one) for one in content["results"] if one.get("backend")]
    _as_its_cells_say(content["cells"], results)
    others = {cell["backend"] for cell in content["cells"] if cell.get("origin", cell["backend"]) != cell["backend"]}
    for backend in dict.fromkeys(result.backend for result in results if result.backend not in others):
        wanted = [result for result in results if result.backend == backend and result.verdict in (COMPUTES, COMPILES)]
        checks = [one for one in wanted if one.scheme or one.status is Status.FAILED or one.verdict == COMPILES]
        date = content.get("date", "")
        place = (device, date[:10] or _date(folder), versions, _relative(folder, reports))
        yield from _runs(backend, checks, "", *place, "", "", date)


def _of_this_format(content: Mapping[str, Any]) -> None:
    if content.get("format") != FORMAT:
        raise ValueError(f"format={content.get('format')!r}: expected {FORMAT}")


def _as_its_cells_say(cells: Sequence[Mapping[str, Any]], results: Sequence[CheckResult]) -> None:
    """A cell that failed has a failure, one that passed has none, and each has as many cases as there are results."""
    for cell in cells:
        of = [one for one in results if (one.backend, one.scheme) == (cell["backend"], cell["scheme"])]
        failed = any(one.case and one.verdict == COMPUTES and one.status is Status.FAILED for one in of)
        cases = sum(bool(one.case) and one.check == EQUIVALENCE for one in of)
        if failed != (cell["status"] == Status.FAILED) or cases != cell["cases"]:
            raise ValueError(
                f"cell {cell['backend']}, {cell['scheme']}: status={cell['status']!r} of {cell['cases']} cases, and "
                f"its results have {cases} and {'a' if failed else 'no'} failure: it was changed"
            )


def _runs(backend: str, checks: Sequence[CheckResult], level: str, *place: str, planned: int = 0) -> Iterator[Run]:
    of_cases = [check.status for check in checks if check.case]
    left, refused, waived = map(of_cases.count, (Status.NOT_RUN, Status.NOT_SUPPORTED, Status.WAIVED))
    left += max(planned - len(of_cases), 0)  # a report of `fp8moe check` has one result for all that were not run
    for evidence in Evidence:
        of = [check for check in checks if check.evidence is evidence]
        if evidence is Evidence.HARDWARE and not any(check.evidence for check in checks):
            of = [check for check in checks if check.status is Status.FAILED]  # before anything was computed there
        passed = [check for check in of if check.status is Status.PASSED]
        # A failure before anything ran, such as of the class itself, is one of whatever else was run.
        failing = [one for one in checks if one.status is Status.FAILED and one.evidence in (evidence, None)]
        failed = dict.fromkeys(check.scheme or check.check for check in failing)
        schemes = tuple(name for name in dict.fromkeys(one.scheme for one in passed) if name and name not in failed)
        if of:
            judged = len(passed) + len(failing)
            found = (backend, evidence, schemes, tuple(failed), level, len(passed), left, refused, waived, judged)
            yield Run(*found, *place)


def _release(told: Mapping[str, Any]) -> str:
    """The distribution and its version, of a certificate's release or of a report's code."""
    return f"{told['distribution']} {told['version']}" if told.get("distribution") and told.get("version") else ""


def _date(folder: Path) -> str:
    """A kept run's folder begins with it."""
    found = re.match(r"\d{4}-\d{2}-\d{2}", folder.name)
    return found[0] if found else NONE


def _relative(folder: Path, reports: Path) -> str:
    return f"{reports.name}/{folder.relative_to(reports).as_posix()}"


def rows(runs: Sequence[Run]) -> Iterator[tuple[str, ...]]:
    """For each of the eleven its latest run on each device, the best class of evidence, and the failures before it that
    it is too small to answer; else what there is of it."""
    for spec in seed_backends():
        mine = [run for run in runs if run.backend == spec.name]
        for evidence in (Evidence.HARDWARE, Evidence.SIMULATED, Evidence.COMPILED):
            of = [run for run in mine if run.evidence is evidence]
            if of:
                order = sorted(of, key=lambda run: (run.date, bool(run.failed), run.cases, run.when))
                latest: dict[str, list[Run]] = {}
                for run in order:
                    before = latest.get(run.device, [])
                    latest[run.device] = [*(one for one in before if one.failed and run.judged < one.judged), run]
                for run in chain.from_iterable(latest.values()):
                    on = ", ".join(filter(None, (run.device, _kernels(spec.experts_cls, run), run.versions)))
                    link = f"[{run.folder}]({run.folder})"
                    yield spec.name, evidence.value, run.what, on, run.date, link
                break
        else:
            yield spec.name, *_without(spec.experts_cls)


def _kernels(cls: type[Any] | None, run: Run) -> str:
    """The release of a library that was run; "" of our own kernels."""
    if cls is None or not issubclass(cls, LibraryBackend):
        return ""
    return run.release or "a release that the report does not tell"


def _without(cls: type[Any] | None) -> tuple[str, ...]:
    """What there is of a backend that no report tells of."""
    if cls is not None and issubclass(cls, LibraryBackend):
        return "contract", f"its adapter, on a library played from {cls.written_from}", NONE, NONE, "tests/contracts"
    return "not run", "no kept report", NONE, NONE, NONE


def markdown(reports: Path) -> str:
    """The table."""
    lines = [HEAD, ("---",) * len(HEAD), *rows(runs_in(reports))]
    return "\n".join(f"| {' | '.join(visible(part).replace('|', chr(92) + '|') for part in line)} |" for line in lines)


def kept(text: str) -> str | None:
    """The table between the marks; None where they are not."""
    _, begin, rest = text.partition(BEGIN)
    table, end, _ = rest.partition(END)
    return table.strip("\n") if begin and end else None


def main(arguments: Sequence[str] | None = None) -> int:
    """0; or 1 where the table in a file is another, or a report cannot be read."""
    parser = argparse.ArgumentParser(prog="python -m conformance.support_matrix", description=__doc__)
    parser.add_argument("--reports", type=Path, default=HERE / "reports", help="kept runs")
    parser.add_argument(
        "--check", type=Path, metavar="FILE", help=f"compare with what stands between {BEGIN} and {END}"
    )
    parser.add_argument("--write", type=Path, metavar="FILE", help="put it there")
    given = parser.parse_args(arguments)
    try:
        table = markdown(given.reports)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    for path in filter(None, (given.check, given.write)):
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            parser.error(f"{path}: it cannot be read ({said(error)}): name the file that has the table")
        before = kept(text)
        if before is None:
            parser.error(f"{path}: no {BEGIN} and {END}")
        if path == given.write:
            head, _, rest = text.partition(BEGIN)
            path.write_text(f"{head}{BEGIN}\n{table}\n{END}{rest.partition(END)[2]}", encoding="utf-8")
        elif before != table:
            print(f"{path}: the table is not what {given.reports} says: --write {path}", file=sys.stderr)
            return 1
    if not (given.check or given.write):
        print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
