"""Ctrl-C and SIGTERM, which a CI system's cancel and `docker stop` send: either ends a run, and what it has is kept."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import typer

SIGNALS = (signal.SIGINT, signal.SIGTERM)
GRACE = 30.0
"""Seconds in which further signals are left alone: some senders repeat theirs while the first is being seen to."""
_held: list[threading.Event] = []


@contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM raises KeyboardInterrupt, as Ctrl-C does. A command that ends with what it has kept then has its own exit
    status after Ctrl-C, and 143 after SIGTERM; one that has nothing to keep says so, with 130 or 143."""
    if threading.current_thread() is not threading.main_thread():  # where Python allows no handler
        yield
        return
    received: dict[int, float] = {}

    def interrupt(number: int, _frame: FrameType | None) -> None:
        begun = min(received.values(), default=None)
        received.setdefault(number, time.monotonic())
        if begun is None and _held:
            _held[-1].set()
        elif begun is None or time.monotonic() - begun > GRACE:
            raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in SIGNALS}
    try:
        yield
    except KeyboardInterrupt:
        typer.echo("fp8moe: interrupted", err=True)
        raise typer.Exit(128 + (signal.SIGTERM if signal.SIGTERM in received else signal.SIGINT)) from None
    except typer.Exit:
        if signal.SIGTERM in received:
            raise typer.Exit(128 + signal.SIGTERM) from None
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def held() -> Iterator[threading.Event]:
    """Where a run is to come to a report that is kept: a signal raises nothing in it, and sets the event instead."""
    interrupted = threading.Event()
    _held.append(interrupted)
    try:
        yield interrupted
    finally:
        _held.remove(interrupted)
