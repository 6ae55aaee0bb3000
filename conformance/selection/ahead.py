"""Judges the selector beside the other tests: a process of its own, waited for when its report is needed."""

from __future__ import annotations

import multiprocessing
from multiprocessing.connection import Connection

from conformance.selection.judge import GridReport, judge


class Ahead:
    """Starts at once; ends with the run, whatever becomes of it."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._receiver, sender = context.Pipe(duplex=False)
        self._process = context.Process(target=_work, args=(sender,), name="fp8moe-selects", daemon=True)
        self._process.start()
        sender.close()  # so that the end of the process is the end of the pipe

    def result(self) -> GridReport:
        """Waits for the report.

        Raises:
            RuntimeError: the process ended without one.
        """
        try:
            found: GridReport | BaseException = self._receiver.recv()
        except EOFError:
            self._process.join()
            raise RuntimeError(f"judging the selector ended with status {self._process.exitcode}") from None
        if isinstance(found, BaseException):
            raise found
        return found


def _work(sender: Connection) -> None:
    try:
        sender.send(judge(processes=0))
    except Exception as error:
        sender.send(RuntimeError(f"{type(error).__name__}: {error}"))
