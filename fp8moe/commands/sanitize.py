"""`fp8moe sanitize BACKEND`: chosen cases under compute-sanitizer, and what it found in each."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from rich.text import Text

from conformance.cases import Case
from conformance.plan import load_subject, resolve_target
from conformance.results import CheckResult, Status, finite
from conformance.sanitizer import TOOLS, SanitizerMissing, chosen_cases, located, sanitize
from conformance.versions import versions
from fp8moe.commands import tables
from fp8moe.commands.files import check_folders, write_whole
from fp8moe.commands.question import BadInput, pick
from fp8moe.registry import BackendContractError

DEFAULT_TOOLS = ("memcheck", "initcheck", "racecheck")
PASSED, FAILED, NOT_RUN = 0, 1, 2


def sanitized(
    backend: str, tools: Sequence[str], cases: Sequence[str], count: int, report: Path | None
) -> list[CheckResult]:
    """Runs them, with a line on standard error for each as it ends.

    Raises:
        BadInput: an unknown backend, tool or case; no CUDA device, or no compute-sanitizer.
    """
    if report is not None:
        check_folders({"--report": report})
    wanted = [pick("--tool", tool, tuple(TOOLS)) for tool in tools] or list(DEFAULT_TOOLS)
    try:
        subject = load_subject(backend)
        given = [Case.parse(case) for case in cases]
        program = located()
    except (ValueError, BackendContractError, SanitizerMissing) as error:
        raise BadInput(str(error)) from None
    try:
        target = resolve_target("cuda")
    except ValueError:
        raise BadInput(f"fp8moe sanitize needs a CUDA device, and torch {torch.__version__} sees none here") from None

    def tell(done: int, planned: int, result: CheckResult) -> None:
        told = f"{result.check.rpartition('.')[2]} {result.case} {result.reason}".strip()
        print(f"{done}/{planned} {result.status.value:15}{told}", file=sys.stderr, flush=True)

    found = sanitize(subject, target, program, wanted, given or chosen_cases(subject, target, count), progress=tell)
    if report is not None:
        told = {
            "format": tables.FORMAT,
            "device": torch.cuda.get_device_name(0),
            "versions": versions(),
            "checks": [finite(asdict(result)) for result in found],
        }
        write_whole(report, json.dumps(told, indent=1))
    return found


def print_sanitized(found: Sequence[CheckResult]) -> int:
    """A table of tool against scheme, then what was found; the exit status."""
    out = tables.console()
    schemes = list(dict.fromkeys(result.scheme for result in found))
    table = tables.table("under compute-sanitizer", "tool", "finds", *schemes)
    for check in dict.fromkeys(result.check for result in found):
        tool = check.rpartition(".")[2]
        cells = []
        for scheme in schemes:
            statuses = Counter(r.status for r in found if (r.check, r.scheme) == (check, scheme))
            cells.append(", ".join(f"{status.value.replace('_', ' ')} {n}" for status, n in statuses.items()))
        table.add_row(tool, TOOLS[tool], *cells)
    out.print(table)
    for result in found:
        if result.status in (Status.FAILED, Status.NOT_RUN):
            style = "bold red" if result.status is Status.FAILED else "yellow"
            out.print(
                Text(f"{result.status.value} {result.check} {result.case}: {result.reason}", style), soft_wrap=True
            )
            out.print(Text(f"  reproduce: {result.reproduce}"), soft_wrap=True)
    came_to = {result.status for result in found}
    if Status.FAILED in came_to:
        return FAILED
    return PASSED if Status.PASSED in came_to and Status.NOT_RUN not in came_to else NOT_RUN
