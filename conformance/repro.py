"""`fp8moe repro CASE`: runs one case on one backend again, and shows what differs."""

from __future__ import annotations

import sys
import traceback

from rich.console import Console

from conformance.cases import Case
from conformance.computes import check_case
from conformance.plan import load_subject, resolve_target
from conformance.results import Status
from fp8moe.registry import BackendContractError

BAD_INPUT = 64
SUITE_ERROR = 70


def run_case(case_text: str, backend: str, device: str | None = None) -> int:
    """Prints the verdict on one case; 0 passed, 1 failed, 2 not run, 64 bad input, 70 an error of the suite."""
    try:
        case = Case.parse(case_text)
        target = resolve_target(device or "auto")
        subject = load_subject(backend)
    except (ValueError, BackendContractError) as error:
        print(f"fp8moe repro: {error}", file=sys.stderr)
        return BAD_INPUT
    try:
        result = check_case(case, subject, target)
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
    if result.evidence is not None:
        console.print(f"evidence: {result.evidence.value}", highlight=False)
    return {Status.PASSED: 0, Status.FAILED: 1}.get(result.status, 2)
