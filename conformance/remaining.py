"""About how long what is left of a run takes."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterable


class Remaining:
    """The time that is left, if what is left takes as long for what it costs as what was run took for its own.

    Args:
        costs: of each piece that is to be run, with the group that it belongs to.
        clock: seconds that go on.
    """

    def __init__(self, costs: Iterable[tuple[Hashable, int]], clock: Callable[[], float] = time.monotonic) -> None:
        self._left: Counter[Hashable] = Counter()
        for group, cost in costs:
            self._left[group] += cost
        self._spent = 0
        self._clock, self._begun = clock, clock()

    def ran(self, group: Hashable, cost: int) -> None:
        """A piece has been run."""
        self._left[group] -= cost
        self._spent += cost

    def drop(self, group: Hashable) -> None:
        """What is left of a group is not run any more."""
        del self._left[group]

    @property
    def seconds(self) -> float | None:
        """None before anything was run."""
        if not self._spent:
            return None
        return (self._clock() - self._begun) * max(self._left.total(), 0) / self._spent
