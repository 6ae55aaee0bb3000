"""The cases of a run judged together: the gain and the bias that the bound let pass in each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from conformance.bounds import pooled
from conformance.checks import EQUIVALENCE
from conformance.levels import Item
from conformance.results import CheckResult, Status
from fp8moe.counted import counted

POOLED = "computes.pooled"


def pooled_result(
    backend: str, items: Sequence[Item], results: Mapping[tuple[str, str], CheckResult]
) -> list[CheckResult]:
    """Each case alone may hide a small gain or bias. One case of each seed: those of one seed share what they are drawn
    from, so that their errors are not independent.

    Args:
        results: by the items' keys.

    Returns:
        one result; none where no case has sums.
    """
    by_seed: dict[int, Mapping[str, float]] = {}
    for item in items:
        result = results.get(item.key)
        if item.check != EQUIVALENCE or result is None or result.status is not Status.PASSED:
            continue
        if "gain.signed" in result.measured:
            by_seed.setdefault(item.case.seed, result.measured)
    if not by_seed:
        return []
    sums = list(by_seed.values())
    ratios = pooled(sums)
    broken = [f"{name} = {ratio:.3g} > 1" for name, ratio in ratios.items() if not ratio <= 1]
    reason = (
        f"{'; '.join(broken)}: the outputs of {counted(len(sums), 'case')} are scaled or shifted to one side"
        if broken
        else ""
    )
    status = Status.FAILED if broken else Status.PASSED
    scope = pooled_scope(len(sums))
    return [CheckResult("computes", POOLED, status, backend, reason=reason, statistics=ratios, scope=scope)]


def pooled_scope(count: int) -> str:
    """What `POOLED` was run over; a certificate is held to these very words."""
    return f"{count} cases together"
