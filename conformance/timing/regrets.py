"""The regret of the selected backend as a check's result, and what a run says of all of them."""

from __future__ import annotations

from collections.abc import Sequence

from conformance.cases import Case
from conformance.performs import VERDICT
from conformance.plan import Target
from conformance.results import CheckResult, Evidence, Status
from conformance.timing.side_by_side import contenders, regret, side_by_side
from fp8moe.counted import counted

CHECK = "performs.regret"
VALUE, LOW, HIGH = "regret", "regret_low", "regret_high"
ALONE = "it alone can run here"


def regret_result(case: Case, selected: str, target: Target) -> CheckResult:
    """Times all that could have been selected, if there are several; a regret is a figure, and fails nothing."""
    who = contenders(case, target)
    missing = "".join(f"; absent: {name}, {why}" for name, why in who.absent.items())
    status, reason, measured = Status.NOT_APPLICABLE, f"{ALONE}{missing}", {}
    if len(who.eligible) > 1:
        times = side_by_side(case, who.eligible, who.absent)
        missing = "".join(f"; absent: {name}, {why}" for name, why in times.absent.items())
        if selected in times.us and len(times.us) > 1:
            found = regret(times, selected)
            status, reason = Status.PASSED, f"beside {', '.join(times.us)}; best: {found.best}{missing}"
            measured = {VALUE: found.value, LOW: found.low, HIGH: found.high}
            measured |= {f"{name}_us": times.typical_us(name) for name in times.us}
        else:
            reason = f"{ALONE}{missing}"
    return CheckResult(
        VERDICT,
        CHECK,
        status,
        selected,
        case.scheme,
        str(case),
        reason,
        evidence=Evidence.HARDWARE if measured else None,
        measured=measured,
    )


def regret_lines(results: Sequence[CheckResult]) -> list[str]:
    """The median and the worst over the cases with a choice, and why others had none, each reason once."""
    judged = sorted((r for r in results if r.check == CHECK and VALUE in r.measured), key=lambda r: r.measured[VALUE])
    lines = []
    if judged:
        middle, worst = judged[len(judged) // 2], judged[-1]
        limits = f"{worst.measured[LOW]:.1%} to {worst.measured[HIGH]:.1%}"
        lines.append(
            f"regret of the selected backend over {counted(len(judged), 'case')}: median {middle.measured[VALUE]:.1%}, "
            f"worst {worst.measured[VALUE]:.1%} ({limits}) in {worst.backend} {worst.case}"
        )
    alone: dict[str, int] = {}
    for result in results:
        if result.check == CHECK and result.status is Status.NOT_APPLICABLE:
            told = f"no regret of {result.backend}: {result.reason}"
            alone[told] = alone.get(told, 0) + 1
    return [*lines, *(f"{told} ({counted(count, 'case')})" for told, count in alone.items())]
