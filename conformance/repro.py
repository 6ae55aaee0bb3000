"""`fp8moe repro CASE`: runs one case on one backend again, and shows what differs."""

from __future__ import annotations

import sys
import traceback

from rich.console import Console
from rich.table import Table

from conformance.bits import StageShapeError, compare_stages, observed
from conformance.cases import Case
from conformance.checks import CHECKS, EQUIVALENCE, check_case
from conformance.computes import make, replay_of
from conformance.oracles import tensors_of
from conformance.plan import Subject, Target, load_subject, resolve_target
from conformance.results import Status
from conformance.trial import run
from fp8moe.registry import BackendContractError

BAD_INPUT = 64
SUITE_ERROR = 70


def run_case(case_text: str, backend: str, device: str | None = None, check: str | None = None) -> int:
    """Prints the verdict on one case; 0 passed, 1 failed, 2 not run, 64 bad input, 70 an error of the suite."""
    check_id = EQUIVALENCE if check is None else f"computes.{check.removeprefix('computes.')}"
    if check_id not in CHECKS:
        known = ", ".join(known.removeprefix("computes.") for known in CHECKS)
        print(f"fp8moe repro: --check={check}: expected one of {known}", file=sys.stderr)
        return BAD_INPUT
    try:
        case = Case.parse(case_text)
        target = resolve_target(device or "auto")
        subject = load_subject(backend)
    except (ValueError, BackendContractError) as error:
        print(f"fp8moe repro: {error}", file=sys.stderr)
        return BAD_INPUT
    try:
        result = check_case(case, subject, target, check_id)
    except Exception:
        traceback.print_exc()
        print("fp8moe repro: an error of the suite itself, no verdict on the backend", file=sys.stderr)
        return SUITE_ERROR
    console = Console(soft_wrap=True, markup=False)
    console.print(f"{subject.name} on {target.name}: {case}", highlight=False)
    console.print(f"status: {result.status.value}" + (f": {result.reason}" if result.reason else ""), highlight=False)
    if result.error_over_bound is not None:
        console.print(f"largest error/bound: {result.error_over_bound:.4g} (limit 1)", highlight=False)
    for name, value in result.statistics.items():
        console.print(f"  {name}: {value:.4g}", highlight=False)
    if result.judged_by:
        console.print(f"judged by: {result.judged_by}", highlight=False)
    if check_id == EQUIVALENCE and result.status in (Status.PASSED, Status.FAILED):
        show_stages(console, case, subject, target)
    if result.evidence is not None:
        console.print(f"evidence: {result.evidence.value}", highlight=False)
    return {Status.PASSED: 0, Status.FAILED: 1}.get(result.status, 2)


def show_stages(console: Console, case: Case, subject: Subject, target: Target) -> None:
    """Each stage beside the replay of what the backend declares; nothing where it cannot be replayed or made."""
    try:
        backend = make(case, subject, target)
        with observed(backend) as seen:
            output = run(backend, tensors_of(case, target.device))
    except Exception as error:  # the verdict stands as it is, this only explains it
        console.print(
            f"stages: not compared, since the backend raised {type(error).__name__}: {error}", highlight=False
        )
        return
    found = replay_of(case, backend, target)
    if isinstance(found, str):
        return
    try:
        stages = list(compare_stages(seen, output, *found))
    except StageShapeError as error:
        console.print(f"stages: {error}", highlight=False)
        return
    table = Table("stage", "beside the replay", box=None, title="stages, in order", title_justify="left")
    for stage in stages:
        told = "not shown by the backend" if stage.difference is None else str(stage.difference)
        table.add_row(stage.stage, told + (f"; {stage.where}" if stage.where else ""))
    console.print(table)
