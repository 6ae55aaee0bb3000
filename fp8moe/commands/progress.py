"""How far a command has come and about how long it still takes: a bar on a terminal, else a line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from fp8moe.commands import tables

EVERY = 30.0
"""Seconds from a line to the next one, where there is no terminal."""
Tell = Callable[[int, int, str, float | None], None]
"""(done, planned, what is being done, seconds left or None)."""


@contextmanager
def progress(what: str, every: float = EVERY) -> Iterator[Tell]:
    """
    Args:
        what: is run, in words.
        every: seconds between two lines.
    """
    out = tables.console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    shown = Progress(*columns, TextColumn("{task.fields[left]}"), console=out, disable=not sys.stderr.isatty())
    begun = last = time.monotonic()

    def tell(done: int, planned: int, doing: str, left: float | None) -> None:
        nonlocal last
        told = time_left(left)
        shown.update(task, completed=done, total=planned, description=escape(f"{what}: {doing}"), left=told)
        now = time.monotonic()
        if shown.disable and now - last >= every:
            last = now
            so_far = f"{what}: {done:,} of {planned:,} in {duration(now - begun)}"
            out.print(f"{so_far}, {told}" if told else so_far, markup=False, soft_wrap=True)

    with shown:
        task = shown.add_task(escape(what), total=None, left="")
        yield tell


def time_left(seconds: float | None) -> str:
    """As one would say it; "" where nothing is known yet."""
    return "" if seconds is None else f"about {duration(seconds)} left"


def duration(seconds: float) -> str:
    """Hours, minutes and seconds."""
    return str(timedelta(seconds=round(seconds)))
