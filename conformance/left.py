"""What a run left: one result for each check, scheme and part of the level, and its cases counted by the reason why."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

from conformance.results import CheckResult, Status

_LEFT = re.compile(r"(.*): ([0-9]{1,9}) of the .* not run", re.DOTALL)


def left_reason(why: str, count: int, part: str) -> str:
    """The reason of the one result for so many cases of a part of the level."""
    return f"{why}: {count} of the {part} not run"


def cases_left(checks: Iterable[CheckResult]) -> Counter[str]:
    """How many cases were not run, by why."""
    found: Counter[str] = Counter()
    for check in checks:
        told = _LEFT.fullmatch(check.reason) if check.status is Status.NOT_RUN and not check.case else None
        if told is not None:
            found[told[1]] += int(told[2])
    return found
