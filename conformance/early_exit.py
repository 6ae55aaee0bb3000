"""A call of os._exit(0) in pytest's own process: it would end the run early, and as a success.

Some of a backend's code runs there whatever is isolated: its module, its predicate, what is timed. While a run of the
suite is on, such a call raises SystemExit, which is then told of the backend as any other exception; in another thread
it ends the process as a failure. After a run that failed it ends the process with that run's status. It is Python's
`os._exit` that is watched, not C's, and not `os.exec*`.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from typing import NoReturn

FAILED = 1
TOLD = "os._exit(0) was called, which would have ended the run, and as a success"


class EarlyExit:
    """In place of `os._exit`, from its making on; in forked processes, and of other statuses, it is that.

    Args:
        release: gives standard output and error back, which pytest may have captured.
        at_work: says what the run is about.

    Attributes:
        status: the run's, once it is known.
    """

    def __init__(self, release: Callable[[], None], at_work: Callable[[], str]) -> None:
        self._release = release
        self._at_work = at_work
        self._real = os._exit
        self._pid = os.getpid()
        self._is_over = False
        self.status = FAILED
        os._exit = self

    def __call__(self, status: int) -> NoReturn:
        if os.getpid() != self._pid or status & 0xFF:
            self._real(status)
        if self._is_over:
            self._real(self.status)
        if threading.current_thread() is threading.main_thread():
            raise SystemExit(TOLD)
        caller = sys._getframe(1)
        try:
            self._release()
            sys.stdout.flush()
            place = f"{caller.f_code.co_filename}:{caller.f_lineno}"
            told = f"{TOLD}, by a thread at {place}, during {self._at_work()}; it ends with status {FAILED}"
            print(f"\nfp8moe: {told}", file=sys.stderr, flush=True)
        finally:
            self._real(FAILED)

    def end(self) -> None:
        """After the run; one that passed leaves nothing behind, unless somebody else has replaced `os._exit` since."""
        self._is_over = True
        if self.status == 0 and os._exit is self:
            os._exit = self._real
