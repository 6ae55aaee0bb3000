"""Whether a backend hangs wherever it is asked: then its other cases are not waited for."""

from __future__ import annotations

from conformance.contain.worker import HUNG
from conformance.results import CheckResult, Status
from fp8moe.counted import counted

IN_A_ROW = 3
"""Rounds of all processes at work in which every case runs out of its time, with none in between that came to its end.
Each is a fresh process, and the first has the time of a first job, in which a library may compile its kernels."""
ANSWERED = (Status.PASSED, Status.FAILED, Status.WAIVED)
"""What a case came to in which the backend was called; one that it does not take says nothing of hanging."""
IT_HANGS = "it hangs"


class Hangs:
    """The latest cases of a run that ran out of their time, in the order in which they ended.

    Args:
        processes: that run cases at the same time.
    """

    def __init__(self, processes: int) -> None:
        self.most = (IN_A_ROW - 1) * processes + 1  # the last round's others end at about the same time
        self.latest: list[CheckResult] = []

    def take(self, result: CheckResult) -> None:
        if HUNG in result.measured:
            self.latest.append(result)
        elif result.status in ANSWERED:
            self.latest.clear()

    @property
    def why_not_on(self) -> str:
        """Why no further case is to start; "" as long as there is no reason."""
        if len(self.latest) < self.most:
            return ""
        limits = sorted({result.measured[HUNG] for result in self.latest})
        within = " or ".join(f"{seconds:g}" for seconds in limits)
        return f"{IT_HANGS}: {counted(len(self.latest), 'case')} in a row did not end within {within} s"


def hung_before(result: CheckResult, seconds: float) -> bool:
    """Whether an earlier run's failure says no more than that a case ran out of less time than it would have now."""
    return result.measured.get(HUNG, seconds) < seconds
