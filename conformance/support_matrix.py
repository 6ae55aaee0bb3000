"""`python -m conformance.support_matrix`: what is known of each backend, from the registry and the kept reports.

A row counts as hardware only by a report of a run on a device. Prints Markdown; with `--check FILE` it tells whether
the table in a file is still what the reports say, with `--write FILE` it puts it there.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conformance.certificate.statement import EVIDENCE
from conformance.kept_text import read_text
from conformance.results import Evidence, Status
from fp8moe.backends.libraries import LibraryBackend
from fp8moe.counted import counted
from fp8moe.registry import seed_backends

HERE = Path(__file__).parents[1]
BEGIN, END = "<!-- support: begin -->", "<!-- support: end -->"
HEAD = ("backend", "evidence", "what was run", "on", "date", "report")
NONE = "-"
TOLD = ("torch", "triton")
"""Versions that a row names."""


@dataclass(frozen=True)
class Run:
    """What one report says of one backend.

    Args:
        schemes: that passed on a device, or in the interpreter.
        left: checks of cases that were not run.
        waived: checks of cases that failed, as the vendor knew.
        refused: checks of cases whose layer the backend does not take.
        level: of `fp8moe check`; "" for a run of the suite.
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
    device: str
    date: str
    versions: str
    folder: str

    @property
    def what(self) -> str:
        schemes = f"{len(self.schemes)} scheme{'' if len(self.schemes) == 1 else 's'}"
        passed = f"{self.level or 'suite'}: {schemes}, {counted(self.cases, 'check')} passed"
        left = f", {self.waived:,} WAIVED" if self.waived else ""
        left += f", {self.left:,} not run" if self.left else ""
        left += f", {self.refused:,} of layers that it does not take" if self.refused else ""
        return f"{passed}{left}; FAILED: {', '.join(self.failed)}" if self.failed else passed + left


def runs_in(reports: Path) -> list[Run]:
    """Of every report of `fp8moe check --report` or `pytest conformance --fp8moe-report` below a folder, gzipped or
    not, and of the report in a certificate's evidence."""
    found: list[Run] = []
    for path in sorted([*reports.rglob("*.json"), *reports.rglob("*.json.gz")]):
        try:
            content = json.loads(read_text(path))
        except ValueError:
            continue
        folder = path.parent
        if isinstance(content, dict) and path.name == EVIDENCE:
            content, folder = content["report"], folder.parent
        if isinstance(content, dict) and "checks" in content and "backend" in content:
            found += _of_check(content, folder, reports)
        elif isinstance(content, dict) and "cells" in content and "results" in content:
            found += _of_suite(content, folder, reports)
    return found


def _of_check(content: Mapping[str, Any], folder: Path, reports: Path) -> Iterator[Run]:
    versions = ", ".join(f"{name} {content['versions'][name]}" for name in TOLD if name in content["versions"])
    checks = [one for one in content["checks"] if one.get("scheme")]
    place = (content["device"], _date(folder), versions, _relative(folder, reports))
    yield from _runs(content["backend"], checks, content["level"], *place)


def _of_suite(content: Mapping[str, Any], folder: Path, reports: Path) -> Iterator[Run]:
    device = content["device"]["name"]
    versions = ", ".join(f"{name} {content['device'][name]}" for name in TOLD if content["device"].get(name))
    for backend in dict.fromkeys(cell["backend"] for cell in content["cells"]):
        checks = [one for one in content["results"] if one.get("backend") == backend and one.get("scheme")]
        checks = [one for one in checks if one.get("verdict") == "computes"]
        yield from _runs(backend, checks, "", device, _date(folder), versions, _relative(folder, reports))


def _runs(
    backend: str, checks: Sequence[Mapping[str, Any]], level: str, device: str, date: str, versions: str, folder: str
) -> Iterator[Run]:
    of_cases = [one["status"] for one in checks if one.get("case")]
    counted = (Status.NOT_RUN, Status.NOT_SUPPORTED, Status.WAIVED)
    left, refused, waived = (of_cases.count(status.value) for status in counted)
    for evidence in Evidence:
        of = [one for one in checks if one.get("evidence") == evidence.value]
        passed = [one for one in of if one["status"] == Status.PASSED.value]
        failed = dict.fromkeys(one["scheme"] for one in of if one["status"] == Status.FAILED.value)
        schemes = tuple(name for name in dict.fromkeys(one["scheme"] for one in passed) if name not in failed)
        if of:
            found = (backend, evidence, schemes, tuple(failed), level, len(passed), left, refused, waived)
            yield Run(*found, device, date, versions, folder)


def _date(folder: Path) -> str:
    """A kept run's folder begins with it."""
    found = re.match(r"\d{4}-\d{2}-\d{2}", folder.name)
    return found[0] if found else NONE


def _relative(folder: Path, reports: Path) -> str:
    return f"{reports.name}/{folder.relative_to(reports).as_posix()}"


def rows(runs: Sequence[Run]) -> Iterator[tuple[str, ...]]:
    """For each of the eleven its latest run on each device, the best class of evidence; else what there is of it."""
    for spec in seed_backends():
        mine = [run for run in runs if run.backend == spec.name]
        for evidence in (Evidence.HARDWARE, Evidence.SIMULATED):
            of = [run for run in mine if run.evidence is evidence]
            if of:
                latest = {
                    run.device: run for run in sorted(of, key=lambda run: (run.date, bool(run.failed), run.cases))
                }
                for run in latest.values():
                    on = f"{run.device}, {run.versions}" if run.versions else run.device
                    link = f"[{run.folder}]({run.folder})"
                    yield spec.name, evidence.value, run.what, on, run.date, link
                break
        else:
            yield spec.name, *_without(spec.experts_cls)


def _without(cls: type[Any] | None) -> tuple[str, ...]:
    """What there is of a backend that no report tells of."""
    if cls is not None and issubclass(cls, LibraryBackend):
        return "contract", f"its adapter, on a library played from {cls.written_from}", NONE, NONE, "tests/contracts"
    return "not run", "no kept report", NONE, NONE, NONE


def markdown(reports: Path) -> str:
    """The table."""
    lines = [HEAD, ("---",) * len(HEAD), *rows(runs_in(reports))]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def kept(text: str) -> str | None:
    """The table between the marks; None where they are not."""
    _, begin, rest = text.partition(BEGIN)
    table, end, _ = rest.partition(END)
    return table.strip("\n") if begin and end else None


def main(arguments: Sequence[str] | None = None) -> int:
    """0; or 1 where the table in a file is another."""
    parser = argparse.ArgumentParser(prog="python -m conformance.support_matrix", description=__doc__)
    parser.add_argument("--reports", type=Path, default=HERE / "reports", help="kept runs")
    parser.add_argument(
        "--check", type=Path, metavar="FILE", help=f"compare with what stands between {BEGIN} and {END}"
    )
    parser.add_argument("--write", type=Path, metavar="FILE", help="put it there")
    given = parser.parse_args(arguments)
    table = markdown(given.reports)
    for path in filter(None, (given.check, given.write)):
        text = path.read_text(encoding="utf-8")
        before = kept(text)
        if before is None:
            parser.error(f"{path}: no {BEGIN} and {END}")
        if path == given.write:
            path.write_text(text.replace(f"{BEGIN}\n{before}\n{END}", f"{BEGIN}\n{table}\n{END}"), encoding="utf-8")
        elif before != table:
            print(f"{path}: the table is not what {given.reports} says: --write {path}", file=sys.stderr)
            return 1
    if not (given.check or given.write):
        print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
