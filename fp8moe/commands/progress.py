"""How far a command has come, about how long it still takes, and what it waits for: a bar where somebody looks on,
else a line now and then."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column

from conformance.at_work import AtWork
from fp8moe.commands import tables

EVERY = 30.0
"""Seconds from a line to the next one, where nobody looks on."""
LONG = 10.0
"""Seconds of one thing after which it is named: hardly a case takes as long on a CPU."""
LOOKS = 1.0
"""Seconds from one look at what is being done to the next."""
BAR = 20
"""Columns of the bar; what is left of a line goes to what is being done, which alone is cut."""
Tell = Callable[[int, int, str, float | None], None]
"""(done, planned, what is being done, seconds left or None)."""


@contextmanager
def progress(
    what: str, at_work: AtWork | None = None, every: float = EVERY, long: float = LONG, looks: float = LOOKS
) -> Iterator[Tell]:
    """
    Args:
        what: is run, in words.
        at_work: what of it is being done; what takes long is named with its age.
        every: seconds between two lines.
        long, looks: as the constants of these names.
    """
    shown = _Shown(what, at_work or AtWork(), every, long)
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(looks):
            if shown.waited_for:
                shown.show()

    looking = threading.Thread(target=look, daemon=True, name="progress")
    with shown.bar:
        looking.start()
        try:
            yield shown.tell
        finally:
            ended.set()
            looking.join()


class _Shown:
    def __init__(self, what: str, at_work: AtWork, every: float, long: float) -> None:
        self.what, self.at_work, self.every, self.long = what, at_work, every, long
        self.out = tables.console(stderr=True)
        whole, rest = Column(no_wrap=True, overflow="ignore"), Column(no_wrap=True, overflow="ellipsis", ratio=1)
        self.bar = Progress(
            BarColumn(BAR),
            MofNCompleteColumn(table_column=whole),
            TimeElapsedColumn(table_column=whole.copy()),
            TextColumn("{task.fields[left]}", table_column=whole.copy()),
            TextColumn("{task.description}", table_column=rest),
            console=self.out,
            expand=True,
            disable=not is_watched(),
        )
        self.task = self.bar.add_task(escape(what), total=None, left="")
        self.begun = self.last = time.monotonic()
        self.done = self.planned = 0
        self.doing = self.left = ""
        self.lock = threading.Lock()

    def tell(self, done: int, planned: int, doing: str, left: float | None) -> None:
        self.done, self.planned, self.doing, self.left = done, planned, doing, time_left(left)
        self.show()

    @property
    def waited_for(self) -> str:
        """What has been done for long, and for how long; "" where nothing has."""
        longest = self.at_work.longest
        return f"{duration(longest[1])} on {longest[0]}" if longest and longest[1] >= self.long else ""

    def show(self) -> None:
        waited_for = self.waited_for
        with self.lock:
            if self.bar.disable or waited_for:  # above the bar as well, whose line may cut a case's name
                self._print(waited_for)
            doing = waited_for or (f"{self.what}: {self.doing}" if self.doing else self.what)
            left = "" if waited_for else self.left  # nobody knows then, and a case's name needs the place
            self.bar.update(
                self.task, completed=self.done, total=self.planned or None, description=escape(doing), left=left
            )

    def _print(self, waited_for: str) -> None:
        now = time.monotonic()
        if now - self.last < self.every:
            return
        self.last = now
        so_far = f"{self.done:,} of {self.planned:,} in " if self.planned else ""
        told = ", ".join(filter(None, (f"{so_far}{duration(now - self.begun)}", waited_for or self.left)))
        self.out.print(f"{self.what}: {told}", markup=False, soft_wrap=True)


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
