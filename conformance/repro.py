"""`fp8moe repro CASE`: runs one case on one backend again, and shows what differs."""

from __future__ import annotations

import sys

from rich.console import Console

from conformance.cases import Case
from conformance.computes import check_case
from conformance.plan import load_subject, resolve_target
from conformance.results import Status
from fp8moe.registry import BackendContractError


def run_case(case_text: str, backend: str, device: str | None = None) -> int:
    """Prints the verdict on one case; 0 where it passed, 1 where it failed, 2 where it could not be run."""
    try:
        case = Case.parse(case_text)
        target = resolve_target(device or "auto")
        subject = load_subject(backend)
    except (ValueError, BackendContractError) as error:
        print(f"fp8moe repro: {error}", file=sys.stderr)
        return 2
    result = check_case(case, subject, target)
    console = Console()
    console.print(f"{subject.name} on {target.name}: {case}", highlight=False)
    console.print(f"status: {result.status.value}" + (f": {result.reason}" if result.reason else ""), highlight=False)
    if result.error_over_bound is not None:
        console.print(f"largest error/bound: {result.error_over_bound:.4g} (limit 1)", highlight=False)
    for name, value in result.statistics.items():
        console.print(f"  {name}: {value:.4g}", highlight=False)
    if result.evidence is not None:
        console.print(f"evidence: {result.evidence.value}", highlight=False)
    return {Status.PASSED: 0, Status.FAILED: 1}.get(result.status, 2)
