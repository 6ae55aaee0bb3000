"""How far a command has come and about how long it still takes: a bar where somebody looks on, else a line now and
then."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column

from fp8moe.commands import tables

EVERY = 30.0
"""Seconds from a line to the next one, where nobody looks on."""
BAR = 20
"""Columns of the bar; what is left of a line goes to what is being done, which alone is cut."""
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
    whole, rest = Column(no_wrap=True, overflow="ignore"), Column(no_wrap=True, overflow="ellipsis", ratio=1)
    shown = Progress(
        BarColumn(BAR),
        MofNCompleteColumn(table_column=whole),
        TimeElapsedColumn(table_column=whole.copy()),
        TextColumn("{task.fields[left]}", table_column=whole.copy()),
        TextColumn("{task.description}", table_column=rest),
        console=out,
        expand=True,
        disable=not is_watched(),
    )
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


def is_watched() -> bool:
    """Whether standard error is a terminal that somebody looks at: some CI systems give their jobs one, of 80 columns,
    and log what a bar writes over and over."""
    return sys.stderr.isatty() and not os.environ.get("CI") and os.environ.get("TERM") != "dumb"


def time_left(seconds: float | None) -> str:
    """As one would say it; "" where nothing is known yet."""
    return "" if seconds is None else f"about {duration(seconds)} left"


def duration(seconds: float) -> str:
    """Hours, minutes and seconds."""
    return str(timedelta(seconds=round(seconds)))
