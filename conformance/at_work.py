"""What a run is doing at the moment, and since when: for whoever waits while no result comes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class AtWork:
    """What each thread of a run is at.

    Args:
        clock: seconds that go on.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._begun: dict[object, tuple[float, str]] = {}

    @contextmanager
    def on(self, what: str) -> Iterator[None]:
        """While it is done; `what` in words."""
        key = object()
        self._begun[key] = (self._clock(), what)
        try:
            yield
        finally:
            del self._begun[key]

    @property
    def longest(self) -> tuple[str, float] | None:
        """What has been done for longest, and for how many seconds; None where nothing is."""
        begun = min(self._begun.copy().values(), default=None)
        return None if begun is None else (begun[1], self._clock() - begun[0])
