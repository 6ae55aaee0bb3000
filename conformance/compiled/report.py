"""Compiled evidence as results of the suite and as text: a table of kernel x target, and what it leaves open."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from conformance.compiled.outcome import MOST_SPILLED, Outcome
from conformance.compiled.targets import TARGETS
from conformance.matrix import LEAST_WIDTH, STYLES, render
from conformance.results import CheckResult, Evidence, Status

VERDICT = "compiles"
BACKEND = "TRITON"
WORDS = {
    Status.PASSED: "ok",
    Status.NOT_SUPPORTED: "refused",
    Status.FAILED: "FAIL",
    Status.WAIVED: "waived",
    Status.NOT_RUN: "n/r",
    Status.NOT_APPLICABLE: "n/a",
}
TOLD = {
    Status.NOT_SUPPORTED: "refused",
    Status.NOT_RUN: "not run",
    Status.WAIVED: "waived",
    Status.NOT_APPLICABLE: "not applicable",
}
LEGEND = (
    "ok: compiles, within the device's shared memory and registers; refused: as the selector's predicate declares;\n"
    "waived: a known defect, see below; n/r: not run; n/a: never launched there;\n"
    "evidence: compiled, for devices that need not be here"
)


def result_of(outcome: Outcome) -> CheckResult:
    """For the ledger."""
    ran = outcome.status not in (Status.NOT_RUN, Status.NOT_APPLICABLE)
    return CheckResult(
        VERDICT,
        f"{VERDICT}.{outcome.target}.{outcome.kernel}",
        outcome.status,
        BACKEND,
        reason=outcome.reason,
        evidence=Evidence.COMPILED if ran else None,
        reproduce=f"python -m conformance.compiled {outcome.target}:{outcome.kernel}",
        measured={
            "shared_bytes": outcome.shared_bytes,
            "tensor_columns": outcome.tensor_columns,
            "spilled_bytes": outcome.spilled_bytes,
            "seconds": outcome.seconds,
        }
        if ran
        else {},
    )


def told(outcomes: Sequence[Outcome], width: int = LEAST_WIDTH) -> str:
    """Table, legend and lines, for a terminal."""
    results = [result_of(outcome) for outcome in outcomes]
    failed = [f"FAILED {r.check}: {r.reason}" for r in results if r.status is Status.FAILED]
    return "\n".join([render(compile_table(results), width, False), LEGEND, *compile_lines(results), *failed])


def compile_table(results: Sequence[CheckResult]) -> Table:
    """Kernels down, targets across; of results of this verdict that name a kernel and a target."""
    found = {_place(result): result for result in results if _is_place(result)}
    targets = [name for name in TARGETS if any(target == name for target, _ in found)]
    table = Table(title="compiles: kernel x target", title_justify="left", box=None, padding=(0, 1, 0, 0))
    table.add_column("kernel", no_wrap=True)
    for name in targets:
        table.add_column(name, no_wrap=True)
    for kernel in dict.fromkeys(kernel for _, kernel in found):
        statuses = [found[name, kernel].status if (name, kernel) in found else Status.NOT_RUN for name in targets]
        table.add_row(kernel, *(Text(WORDS[status], style=STYLES[status]) for status in statuses))
    return table


def compile_lines(results: Sequence[CheckResult]) -> list[str]:
    """The largest spill, why kernels were refused or not run, and what was left out; one line each."""
    found = {_place(result): result for result in results if _is_place(result)}
    lines = []
    spilling = [r for r in found.values() if r.measured.get("spilled_bytes", 0) > 0]
    if spilling:
        most = max(spilling, key=lambda result: result.measured["spilled_bytes"])
        lines.append(
            f"spills: {len(spilling)} of {len(found)}, at most {most.measured['spilled_bytes']:g} bytes a thread "
            f"({most.check.removeprefix(VERDICT + '.')}); the limit is {MOST_SPILLED}"
        )
    elif found:
        lines.append(f"spills: none in {len(found)}")
    reasons: dict[tuple[Status, str, str], int] = {}
    for (target, _), result in found.items():
        if result.status in TOLD:
            key = (result.status, target, result.reason)
            reasons[key] = reasons.get(key, 0) + 1
    lines += [f"{TOLD[status]}: {n} on {target}: {reason}" for (status, target, reason), n in reasons.items()]
    lines += [f"not run: {r.check}: {r.reason}" for r in results if not _is_place(r)]
    if found and len(found) < len(TARGETS) * len({kernel for _, kernel in found}):
        lines.append(
            f"not run: the other kernels, or the other targets of {len(TARGETS)}, are not part of this run; "
            "--fp8moe-compile=all has them"
        )
    return lines


def _is_place(result: CheckResult) -> bool:
    return result.check.count(".") >= 2


def _place(result: CheckResult) -> tuple[str, str]:
    _, target, kernel = result.check.split(".", 2)
    return target, kernel
