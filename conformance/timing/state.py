"""What a GPU says of itself while it is timed: clocks, reasons for slower ones, other processes.

It is asked by a thread of its own, every few milliseconds, since the questions take longer than a short kernel.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch

from conformance.gate.samples import Flag
from conformance.timing.polls import SLOWED, Ask, Poll, poll_of_device

EVERY_S = 0.01
"""Between two polls."""
STATE = "device state"
NOT_WATCHED = "not watched"


@dataclass
class Watch:
    """Polls a device while it is entered; where nothing can be asked it sees nothing, and says so.

    Args:
        ours: processes of this run that have the device open; more than these are strangers. In a container none at
            all may be shown, and then strangers cannot be seen either.
        poll: returns a `Poll`; None: NVML's or AMD SMI's, for torch's current device.
    """

    ours: int = 1
    poll: Ask | None = None
    polls: list[Poll] = field(default_factory=list)
    why_not: str = ""

    def __enter__(self) -> Watch:
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        if self.poll is None:
            self.poll, self.why_not = poll_of_device()
        if self.poll is not None:
            self.polls.append(self.poll())
            self._thread = threading.Thread(target=self._run, args=(self.poll,), daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self, poll: Ask) -> None:
        while not self._stopped.wait(EVERY_S):
            try:
                self.polls.append(poll())
            except Exception as error:  # whatever it is, samples from here on are not watched
                self.why_not = f"the watch ended: {type(error).__name__}: {error}"
                return

    def flags(self, begin: float, end: float) -> int:
        """A union of `Flag` for what was seen between two times of `time.monotonic()`, and right before and after."""
        polls = list(self.polls)
        seen = [poll for poll in polls if begin - EVERY_S <= poll.at <= end + EVERY_S]
        seen += [poll for poll in polls if poll.at < begin][-1:]  # a look can take longer than a sample
        found, limits = 0, [poll.limit_mhz for poll in polls if poll.limit_mhz]
        for poll in seen:
            if poll.reasons & SLOWED:
                found |= Flag.THROTTLED
            if poll.limit_mhz and poll.limit_mhz != limits[0]:
                found |= Flag.CLOCKS_CHANGED
            if poll.processes > self.ours:
                found |= Flag.SHARED
        return int(found)

    def figures(self) -> dict[str, Any]:
        """What was seen, as a certificate has it: the least and the largest clock in MHz, reasons for slower ones, the
        most processes at a time (0: they are not shown here), and why something was not watched."""
        clocks = [poll.sm_mhz for poll in self.polls]
        return {
            "sm_mhz": [min(clocks, default=0), max(clocks, default=0)],
            "slower": sorted(frozenset[str]().union(*(poll.reasons for poll in self.polls))),
            "processes": max((poll.processes for poll in self.polls), default=0),
            "unwatched": self.why_not,
        }

    def told(self) -> dict[str, str]:
        """What was seen, in words, by name; `STATE` is there only where something was not watched."""
        if not self.polls:
            return {STATE: f"{NOT_WATCHED}: {self.why_not}"}
        clocks = sorted(poll.sm_mhz for poll in self.polls)
        reasons = sorted(frozenset[str]().union(*(poll.reasons for poll in self.polls)))
        most = max(poll.processes for poll in self.polls)
        ended = {STATE: f"{NOT_WATCHED} to the end: {self.why_not}"} if self.why_not else {}
        return ended | {
            "SM clock, MHz": f"{clocks[0]} to {clocks[-1]}, median {clocks[len(clocks) // 2]}",
            "slower clocks": ", ".join(reasons) or "none",
            "processes on the device": str(most) if most else "not shown here: others cannot be told",
        }


def unwatched(told: Mapping[str, str]) -> str:
    """Why a run's times are no ground for a verdict, by what its watch told; "" where they are."""
    return told.get(STATE, "")


def opened_here() -> int:
    """How many processes on the device this one counts for: 1 where it has opened it, or 0."""
    has_context: Callable[[int], bool] | None = getattr(torch._C, "_cuda_hasPrimaryContext", None)
    initialized: Callable[[], bool] = torch.cuda.is_initialized
    return int(has_context is not None and initialized() and has_context(torch.cuda.current_device()))
