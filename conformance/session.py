"""One run: its target and plan, the ledger of results, the header and the summary."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from conformance import emulated, performs
from conformance.cases import SCHEME_NAMES, Case
from conformance.checks import check_case
from conformance.compiled import report as compiled
from conformance.contain import Job, SubjectRef
from conformance.isolation import NONE, OUTSIDE, Isolation
from conformance.matrix import (
    EQUIVALENCE,
    LEGEND,
    PARTS,
    cell_status,
    judged_by_the_bound,
    matrix,
    performs_table,
    reasons,
    render,
    selected_table,
)
from conformance.not_here import NoDevice, UnknownBackend
from conformance.plan import Cell, Subject, Target, default_subjects, load_subject, plan, resolve_target
from conformance.raised import told
from conformance.results import CheckResult, Ledger, Status, finite
from conformance.selected import selected_rows
from conformance.timing.regrets import regret_lines
from fp8moe import __version__
from fp8moe.detection import describe_device, probe_libraries
from fp8moe.registry import BackendContractError, broken_plug_ins, registered_backends

if TYPE_CHECKING:
    import pytest

EXAMPLES = 24
FAILURES_SHOWN = 20


class Session:
    """What a run does and what came of it."""

    def __init__(
        self,
        target: Target,
        cells: list[Cell],
        examples: int,
        seed: int,
        report: str | None,
        budget: float | None,
        isolate: str = NONE,
        named: Sequence[str] = (),
    ) -> None:
        self.target = target
        self.cells = cells
        self.examples = examples
        self.seed = seed
        self.report = report
        self.budget = budget
        self.named = named
        """The backends that were asked for by name."""
        self.isolation = Isolation(isolate, target.name, (cell.subject for cell in self.runnable))
        self.judging = ""
        """What is judged in this process at the moment."""
        self.started = time.monotonic()
        self.ledger = Ledger()
        self.computes = False
        """Whether a check of what one of these backends computes was selected: one has ended, in whatever way."""
        self.convicted: set[str] = set()
        """Ids of cells that failed in this process: what comes after is not run on them."""

    @classmethod
    def of(cls, config: pytest.Config) -> Session:
        """From the options.

        Raises:
            ValueError: an option that names an unknown device or backend.
        """
        try:
            target = resolve_target(config.getoption("--fp8moe-device"))
        except NoDevice as error:
            raise ValueError(f"--fp8moe-device={error}") from None
        torch.set_num_threads(1)  # thousands of small products: a second thread costs more than it does
        names: list[str] = config.getoption("--fp8moe-backend")
        try:
            subjects = tuple(map(_subject, dict.fromkeys(names))) or default_subjects()
        except TypeError as error:
            raise ValueError(str(error)) from error
        subjects = _findable(_each_by_its_name(subjects))
        schemes: list[str] = config.getoption("--fp8moe-scheme")
        for scheme in schemes:
            if scheme not in SCHEME_NAMES:
                raise ValueError(f"--fp8moe-scheme={scheme}: expected one of {', '.join(SCHEME_NAMES)}")
        examples = config.getoption("--fp8moe-examples")
        if examples is None:
            examples = EXAMPLES
        if examples < 1:
            raise ValueError(f"--fp8moe-examples={examples}: expected at least 1")
        cells = [cell for subject in subjects for cell in _cells(subject, target, schemes or SCHEME_NAMES, bool(names))]
        budget, report = config.getoption("--fp8moe-budget"), config.getoption("--fp8moe-report")
        if budget is not None and not budget >= 0:
            raise ValueError(f"--fp8moe-budget={budget}: expected seconds, 0 or more")
        if report is not None and not Path(report).absolute().parent.is_dir():
            raise ValueError(f"--fp8moe-report={report}: the folder does not exist; make it first")
        return cls(
            target,
            cells,
            examples,
            config.getoption("--fp8moe-seed"),
            report,
            budget,
            _isolate(config),
            [subject.name for subject in subjects] if names else [],
        )

    def judge(self, case: Case, subject: Subject, check: str) -> CheckResult:
        """The verdict of one check on one case: here, or in the backend's worker."""
        ref = self.isolation.reference(subject)
        if ref is None:
            self.judging = f"{check} of {subject.name} on {case}"
            try:
                return check_case(case, subject, self.target, check)
            finally:
                self.judging = ""
        return self.isolation.run(Job(check, str(case), ref))

    @property
    def budget_is_spent(self) -> bool:
        """No further case is to start."""
        return self.budget is not None and time.monotonic() - self.started > self.budget

    @property
    def runnable(self) -> list[Cell]:
        return [cell for cell in self.cells if cell.status is None]

    def unjudged(self) -> list[str]:
        """The backends that were asked for by name and of which no case was judged; none where no check of what a
        backend computes was to run."""
        judged = (Status.PASSED, Status.FAILED)
        known = {r.backend for r in self.ledger.of(verdict="computes") if r.case and r.status in judged}
        return [name for name in self.named if self.computes and name not in known]

    def take(self, texts: Iterable[str]) -> None:
        """Adds results as a test's report carries them."""
        for text in texts:
            self.ledger.add(CheckResult.from_json(text))

    def header(self) -> list[str]:
        """Device, driver, versions, libraries, evidence."""
        device = describe_device()
        libraries = [
            f"{probe.name} {probe.version or ''}".strip() if probe.present else f"no {probe.name}"
            for probe in probe_libraries(self.target.platform.kind)
        ]
        evidence = sorted({cell.evidence.value for cell in self.runnable if cell.evidence is not None})
        return [
            f"fp8moe {__version__}: {self.target.name}, {device}",
            f"kernel libraries: {', '.join(libraries)}",
            f"evidence in this run: {', '.join(evidence) or 'none'}",
            f"random cases for each cell: {self.examples}, seed {self.seed}",
            *self.isolation.header(),
            *(f"plug-in that does not load, left out: {broken.error}" for broken in broken_plug_ins()),
        ]

    def write_summary(self, terminal: Any) -> None:
        """The tables, the reasons, the failures with their reproduction; and the JSON report where asked for."""
        width, colour = terminal._tw.fullwidth, terminal.hasmarkup
        terminal.section("fp8moe conformance")
        devices, rows = selected_rows(self.target)
        terminal.write_line(render(selected_table(rows, devices), width, colour))
        terminal.write_line("")
        checked = self.ledger.of(verdict="selects")
        if checked:
            held = sum(result.status is Status.PASSED for result in checked)
            scope = next((result.scope for result in checked if result.scope), "nothing")
            terminal.write_line(f"selects: {held} of {len(checked)} checks hold; the invariants over {scope}")
            terminal.write_line("")
        if self.computes:
            self._write_matrix(terminal, width, colour)
        self._write_compiled(terminal, width, colour)
        self._write_performs(terminal, width, colour)
        self._write_emulated(terminal, width, colour)
        failures = [result for result in self.ledger.failures() if result.case or result.verdict != "computes"]
        for result in failures[:FAILURES_SHOWN]:
            terminal.write_line(f"FAILED {result.check} {result.backend} {result.case}: {result.reason}", red=True)
            if result.reproduce:
                terminal.write_line(f"  reproduce: {result.reproduce}")
        if len(failures) > FAILURES_SHOWN:
            terminal.write_line(f"... and {len(failures) - FAILURES_SHOWN} more; --fp8moe-report FILE has them all")
        for name in self.unjudged():
            told = "it was asked for by its name, and no case of it was judged; why, is said above"
            terminal.write_line(f"FAILED {name}: {told}", red=True)
        if self.report:
            Path(self.report).write_text(json.dumps(self.to_json(), indent=1, allow_nan=False) + "\n")
            terminal.write_line(f"report: {self.report}")

    def _write_matrix(self, terminal: Any, width: int, colour: bool) -> None:
        """What each backend came to on each scheme, and why not where it came to nothing."""
        terminal.write_line(render(matrix(self.cells, self.ledger), width, colour))
        terminal.write_line(LEGEND)
        for status in (Status.NOT_SUPPORTED, Status.NOT_RUN):
            for line in reasons(self.cells, status):
                terminal.write_line(f"{status.value.replace('_', ' ')}: {line}")
        for line in judged_by_the_bound(self.cells, self.ledger):
            terminal.write_line(f"judged by the bound: {line}")
        for line in self._left_out():
            terminal.write_line(f"not run: {line}")

    def _write_compiled(self, terminal: Any, width: int, colour: bool) -> None:
        """What was compiled for devices that are not here: evidence of its own class, so in a table of its own."""
        results = self.ledger.of(verdict=compiled.VERDICT)
        if any(result.evidence is not None for result in results):
            terminal.write_line("")
            terminal.write_line(render(compiled.compile_table(results), width, colour))
            terminal.write_line(compiled.LEGEND)
        for line in compiled.compile_lines(results):
            terminal.write_line(line)

    def _write_performs(self, terminal: Any, width: int, colour: bool) -> None:
        """How long the selected backend took, and what was not timed."""
        everything = self.ledger.of(verdict=performs.VERDICT)
        results = [result for result in everything if result.check == performs.CHECK]
        if any(result.measured for result in results):
            terminal.write_line("")
            terminal.write_line(render(performs_table(results), width, colour))
        for line in regret_lines(everything):
            terminal.write_line(line)
        for line in performs.not_timed(results):
            terminal.write_line(f"not run: {line}")

    def _write_emulated(self, terminal: Any, width: int, colour: bool) -> None:
        """How far apart honest devices are; none of them is a cell of the matrix, since none need be here."""
        results = self.ledger.of(check=emulated.CHECK)
        table = emulated.summary_table(results)
        if table is not None:
            terminal.write_line("")
            terminal.write_line(render(table, width, colour))
            terminal.write_line(emulated.LEGEND)
        for line in emulated.summary_lines(results):
            terminal.write_line(line)

    def _left_out(self) -> list[str]:
        """Parts of cells that were to run and did not, one line for each reason."""
        found: dict[tuple[str, str, str], list[str]] = {}
        for cell in self.runnable:
            results = self.ledger.of(backend=cell.subject.name, scheme=cell.scheme, verdict="computes")
            for part, reason in _parts_not_run(results).items():
                found.setdefault((cell.subject.name, part, reason), []).append(cell.scheme)
        return [
            f"{name}, {part.removeprefix('computes.')} cases: {reason} ({', '.join(schemes)})"
            for (name, part, reason), schemes in found.items()
        ]

    def to_json(self) -> dict[str, Any]:
        """Everything the run knows, for machines."""
        device = describe_device()
        cells = []
        for cell in self.cells:
            results = self.ledger.of(backend=cell.subject.name, scheme=cell.scheme, verdict="computes")
            status, _ = cell_status(cell, results)
            cells.append(
                {
                    "backend": cell.subject.name,
                    "origin": cell.subject.origin,
                    "scheme": cell.scheme,
                    "status": status.value,
                    "reason": cell.reason or _reason(status, results),
                    "evidence": None if cell.evidence is None else cell.evidence.value,
                    "cases": sum(bool(result.case) and result.check == EQUIVALENCE for result in results),
                }
            )
        return {
            "format": 1,
            "fp8moe": __version__,
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "target": self.target.name,
            "device": asdict(device),
            "platform": str(self.target.platform),
            "libraries": [asdict(probe) for probe in probe_libraries(self.target.platform.kind)],
            "seed": self.seed,
            "examples": self.examples,
            "cells": cells,
            "results": [
                {name: finite(value) for name, value in asdict(result).items() if value not in (None, "", {})}
                for result in self.ledger
            ],
        }


def _isolate(config: pytest.Config) -> str:
    """Which backends have a worker; none where nothing is said and pytest's debugger is to be used."""
    asked: str | None = config.getoption("--fp8moe-isolate")
    debugged = config.getoption("usepdb", False) or config.getoption("trace", False)
    return asked or (NONE if debugged else OUTSIDE)


def _subject(name: str) -> Subject:
    try:
        return load_subject(name)
    except UnknownBackend as error:
        raise ValueError(f"--fp8moe-backend={error}") from None
    except BackendContractError as error:
        why = str(error).removeprefix(f"{name}: ")
        raise ValueError(f"--fp8moe-backend={name}: it cannot be used: {why}") from None


def _findable(subjects: Sequence[Subject]) -> tuple[Subject, ...]:
    """Those that a call in this process registered by the place of their class, since no other knows the name."""
    called = {spec.name for spec in registered_backends() if spec.distribution is None}
    found = []
    for subject in subjects:
        reference = SubjectRef.importable(subject) if subject.origin in called else None
        found.append(subject if reference is None else replace(subject, origin=reference.path))
    return tuple(found)


def _each_by_its_name(subjects: Sequence[Subject]) -> Sequence[Subject]:
    """Results are kept by a backend's name.

    Raises:
        ValueError: two have the same.
    """
    found: dict[str, Subject] = {}
    for subject in subjects:
        other = found.setdefault(subject.name, subject)
        if other is not subject:
            raise ValueError(
                f"--fp8moe-backend={subject.origin}: its results would be told as {subject.name}'s, which is "
                f"{other.origin}: judge one of them in a run of its own, or give it another name"
            )
    return subjects


def _cells(subject: Subject, target: Target, schemes: Sequence[str], named: bool) -> list[Cell]:
    """What `plan` says of one backend.

    Raises:
        ValueError: its own predicate raises.
    """
    try:
        return plan([subject], target, schemes, named=named)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # among what a predicate may raise is SystemExit, and what ends or skips a test
        raise ValueError(
            f"asking {subject.origin} what it takes raised {told(error)}: mend its is_supported_config, or name the "
            "backends that are to be judged with --fp8moe-backend"
        ) from error


def _parts_not_run(results: list[CheckResult]) -> dict[str, str]:
    """The parts of a cell without a verdict, each with its reason."""
    found = {result.check: result for result in results if result.check in PARTS}
    missing = {part: "not selected in this run" for part in PARTS if part not in found}
    return missing | {part: r.reason for part, r in found.items() if r.status is Status.NOT_RUN}


def _reason(status: Status, results: list[CheckResult]) -> str:
    """Why a planned cell did not pass."""
    if status is Status.NOT_RUN:
        return "; ".join(f"{part}: {reason}" for part, reason in _parts_not_run(results).items())
    return next((f"{r.case}: {r.reason}" for r in results if r.status is Status.FAILED and r.case), "")
