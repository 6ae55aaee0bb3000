"""Compiles beside the other tests: the process works while they run, and is waited for when its results are needed."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future

from conformance.compiled.outcome import Outcome
from conformance.compiled.runner import Pair, outcomes_of


def begin(pairs: Sequence[Pair]) -> Future[dict[Pair, Outcome]]:
    """Starts on the pairs; `result()` waits, and raises as `outcomes_of`. A run broken off waits for nothing."""
    future: Future[dict[Pair, Outcome]] = Future()

    def work() -> None:
        try:
            future.set_result(outcomes_of(pairs))
        except Exception as error:
            future.set_exception(error)

    threading.Thread(target=work, name="fp8moe-compiles", daemon=True).start()
    return future
