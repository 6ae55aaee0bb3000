"""The report of a run so far, now and then, so that one whose process is killed can be gone on with."""

from __future__ import annotations

import time
from collections.abc import Callable

from conformance.report import Report

EVERY = 30.0
"""Seconds from one to the next; a report is made, packed and written in some tenths of one."""
UNENDED = "it has not come to its end"
"""Why something is not run in such a report."""
Keep = Callable[[Report], object]


class SoFar:
    """Calls `keep`, if there is one, where something new has finished and the last time is long enough ago."""

    def __init__(self, keep: Keep | None) -> None:
        self.keep = keep
        self.last = time.monotonic()
        self.kept = 0

    def offer(self, finished: int, made: Callable[[], Report], every: float | None = None) -> None:
        """
        Args:
            finished: how many results there are.
            made: the report, which is only made where it is kept.
            every: seconds since the last; None: EVERY.
        """
        waited = time.monotonic() - self.last
        if self.keep is None or finished == self.kept or waited < (EVERY if every is None else every):
            return
        self.keep(made())
        self.kept, self.last = finished, time.monotonic()
