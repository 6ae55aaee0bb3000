"""The tables at the end of a run: backend x scheme, and what was selected for published models."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from conformance.cases import Case
from conformance.plan import Cell
from conformance.results import CheckResult, Evidence, Status
from conformance.selected import SelectedRow
from fp8moe.registry import Reason

STYLES = {
    Status.PASSED: "green",
    Status.FAILED: "bold red",
    Status.WAIVED: "yellow",
    Status.NOT_APPLICABLE: "dim",
    Status.NOT_SUPPORTED: "dim",
    Status.NOT_RUN: "yellow",
}
EQUIVALENCE = "computes.equivalence"
"""The check whose cases are counted."""
PINNED, RANDOM, RELATIONS = "computes.pinned", "computes.random", "computes.relations"
PARTS = (PINNED, RANDOM, RELATIONS)
"""What every cell that runs goes through; published models come on top, where their weights fit."""
LEGEND = (
    "=N: N cases equal, bit for bit, to the replay of the declared arithmetic; ok N: N cases within the derived bound\n"
    "(*: not every part was run); FAIL N: N cases failed; n/a N: N cases beyond the limits that the backend declares;\n"
    "-: not supported; n/r: not run; "
    "e/b: largest error/bound of a passed case; evidence: hw hardware, sim simulated"
)
SHORT_EVIDENCE = {
    Evidence.HARDWARE: "hw",
    Evidence.SIMULATED: "sim",
    Evidence.COMPILED: "comp",
    Evidence.CONTRACT: "contr",
}
LEAST_WIDTH = 118
BY_BITS, BY_BOUND = "bits", "bound: "
"""What `CheckResult.judged_by` says or begins with."""


def cell_status(cell: Cell, results: Sequence[CheckResult]) -> tuple[Status, str]:
    """A cell's status and its short text, from the results of its cases."""
    if cell.status is not None:
        return cell.status, {Status.NOT_SUPPORTED: "-", Status.NOT_APPLICABLE: "n/a"}.get(cell.status, "n/r")
    failed = [result for result in results if result.case and result.status is Status.FAILED]
    cases = [result for result in results if result.case and result.check == EQUIVALENCE]
    passed = [result for result in cases if result.status is Status.PASSED]
    parts = {result.check for result in results if not result.case and result.status is Status.PASSED}
    if failed:
        return Status.FAILED, f"FAIL {len(failed)}"
    if passed:
        whole = parts.issuperset(PARTS)
        beyond = sum(result.status is Status.NOT_APPLICABLE for result in cases)
        text = " ".join([*_counted(passed), *([f"n/a {beyond}"] if beyond else [])]) + ("" if whole else "*")
        return (Status.PASSED if whole else Status.NOT_RUN), text
    return Status.NOT_RUN, "n/r"


def _counted(passed: Sequence[CheckResult]) -> list[str]:
    """How many cases were equal to the replay, and how many within the bound."""
    equal = sum(result.judged_by == BY_BITS for result in passed)
    return [f"={equal}"] * bool(equal) + [f"ok {len(passed) - equal}"] * (len(passed) > equal)


def judged_by_the_bound(cells: Sequence[Cell], results: Iterable[CheckResult]) -> list[str]:
    """One line for each backend and reason why its cases were judged by the bound: the schemes that it concerns."""
    schemes: dict[tuple[str, str], dict[str, int]] = {}
    runs = {(cell.subject.name, cell.scheme) for cell in cells if cell.status is None}
    for result in results:
        if (
            result.check == EQUIVALENCE
            and result.judged_by.startswith(BY_BOUND)
            and (result.backend, result.scheme) in runs
        ):
            found = schemes.setdefault((result.backend, result.judged_by.removeprefix(BY_BOUND)), {})
            found[result.scheme] = found.get(result.scheme, 0) + 1
    return [
        f"{name}: {reason} ({', '.join(f'{scheme} {count}' for scheme, count in found.items())})"
        for (name, reason), found in schemes.items()
    ]


def matrix(cells: Sequence[Cell], results: Iterable[CheckResult]) -> Table:
    """Backends down, schemes across."""
    by_cell: dict[tuple[str, str], list[CheckResult]] = {}
    for result in results:
        if result.verdict == "computes":
            by_cell.setdefault((result.backend, result.scheme), []).append(result)
    table = Table(
        title="computes: backend x scheme",
        title_justify="left",
        box=None,
        padding=(0, 1, 0, 0),
    )
    table.add_column("backend", no_wrap=True)
    for scheme in dict.fromkeys(cell.scheme for cell in cells):
        table.add_column(scheme.replace("_", "\n"), no_wrap=True)
    table.add_column("e/b", justify="right", no_wrap=True)
    table.add_column("evi-\ndence", no_wrap=True)
    for name in dict.fromkeys(cell.subject.name for cell in cells):
        row = [cell for cell in cells if cell.subject.name == name]
        judged = [result for cell in row for result in by_cell.get((name, cell.scheme), [])]
        evidence = sorted({SHORT_EVIDENCE[result.evidence] for result in judged if result.evidence is not None})
        texts = []
        for cell in row:
            status, text = cell_status(cell, by_cell.get((name, cell.scheme), []))
            texts.append(Text(text, style=STYLES[status]))
        ratios = [
            result.error_over_bound
            for result in judged
            if result.error_over_bound is not None and result.status is Status.PASSED
        ]
        table.add_row(name, *texts, f"{max(ratios):.2f}" if ratios else "-", ", ".join(evidence) or "-")
    return table


def reasons(cells: Sequence[Cell], status: Status) -> list[str]:
    """One line for each backend and reason: the schemes that it concerns."""
    schemes: dict[tuple[str, str], list[str]] = {}
    for cell in cells:
        if cell.status is status:
            schemes.setdefault((cell.subject.name, _with_needs(cell)), []).append(cell.scheme)
    everything = len({cell.scheme for cell in cells})
    return [
        f"{name}: {reason} ({'every scheme' if len(found) == everything else ', '.join(found)})"
        for (name, reason), found in schemes.items()
    ]


def _with_needs(cell: Cell) -> str:
    """The reason; where it is the device rule, with what that asks for: a missing library is one, too."""
    support = cell.subject.experts_cls.support
    return f"{cell.reason}, needs {support.needs}" if support and cell.reason == Reason.DEVICE.value else cell.reason


def selected_table(rows: Sequence[SelectedRow], devices: Sequence[str]) -> Table:
    """Published models down, devices across: which backend is selected."""
    title = "selects: the backend for each published model, no variable set"
    table = Table(title=title, title_justify="left", box=box.SIMPLE)
    table.add_column("model", no_wrap=True)
    table.add_column("scheme")
    for device in devices:
        table.add_column(device, no_wrap=True)
    for row in rows:
        table.add_row(row.model, row.scheme, *row.selected)
    return table


def performs_table(results: Iterable[CheckResult]) -> Table:
    """The cases that were timed: median time with cold caches; the least by the device's data sheet, and by what a copy
    and a GEMM reach here, and the part of the time that each is; the backend's own memory."""
    table = Table(
        title="performs: time of the selected backend (hw; caches flushed before each call, warm: not; share: floor"
        " over time, by the data sheet and by measured rates; MiB: its own memory at the most)",
        title_justify="left",
        box=box.SIMPLE,
    )
    for name in ("model", "scheme"):
        table.add_column(name, no_wrap=True)
    table.add_column("M", justify="right", no_wrap=True)
    table.add_column("backend", no_wrap=True)
    for name in ("us", "warm us", "floor us", "share", "meas.", "MiB"):
        table.add_column(name, justify="right", no_wrap=True)
    for result in results:
        found = result.measured
        if not found:
            continue
        case = Case.parse(result.case)
        floor = [f"{found['floor_us']:.1f}", f"{found['floor_over_time']:.2f}"] if "floor_us" in found else ["?", "?"]
        floor.append(f"{found['measured_floor_over_time']:.2f}" if "measured_floor_over_time" in found else "?")
        floor.append(f"{found['peak_bytes'] / (1 << 20):.1f}" if "peak_bytes" in found else "?")
        times = [f"{found[name]:.1f}" for name in ("median_us", "warm_us")]
        row = (str(case.model), case.scheme, str(case.tokens), result.backend, *times, *floor)
        table.add_row(*row, style=STYLES[result.status] if result.status is not Status.PASSED else None)
    return table


def render(table: Table, width: int, colour: bool) -> str:
    """The table as text for a terminal of this width."""
    buffer = io.StringIO()
    Console(file=buffer, width=max(width, LEAST_WIDTH), force_terminal=colour, no_color=not colour).print(table)
    return "\n".join(line.rstrip() for line in buffer.getvalue().rstrip("\n").split("\n"))
