"""What a GPU says of itself while it is timed: clocks, reasons for slower ones, other processes; by NVML.

NVML is asked by a thread of its own, every few milliseconds, since the questions take longer than a short kernel. Power
capping is told and is no fault: a large FP8 GEMM runs at the power limit for as long as it runs.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch

from conformance.gate.samples import Flag

EVERY_S = 0.01
"""Between two polls."""
# Reasons for clocks below the possible ones (NVML API reference, nvmlClocksEventReasons).
HW_SLOWDOWN, SW_THERMAL, HW_THERMAL, HW_POWER_BRAKE, POWER_CAP = 0x8, 0x20, 0x40, 0x80, 0x4
SLOWED = HW_SLOWDOWN | SW_THERMAL | HW_THERMAL | HW_POWER_BRAKE
"""Those that come from outside the work: heat, and power brakes."""
REASONS = {
    HW_SLOWDOWN: "hardware slowdown",
    SW_THERMAL: "thermal slowdown by software",
    HW_THERMAL: "thermal slowdown by hardware",
    HW_POWER_BRAKE: "power brake",
    POWER_CAP: "power cap",
}
NOT_WATCHED = "not watched"


@dataclass(frozen=True)
class Poll:
    """One look at the device.

    Args:
        at: `time.monotonic()`.
        sm_mhz: clock of the multiprocessors.
        limit_mhz: the clock that they may have at most, as it is set; 0 where NVML does not tell.
        reasons: a union of NVML's reasons.
        processes: how many compute processes have the device open, as far as NVML shows them here.
    """

    at: float
    sm_mhz: int
    limit_mhz: int
    reasons: int
    processes: int


@dataclass
class Watch:
    """Polls a device while it is entered; without NVML it sees nothing, and says so.

    Args:
        ours: processes of this run that have the device open; more than these are strangers. In a container NVML may
            show none at all, and then strangers cannot be seen either.
        poll: returns a `Poll`; None: NVML's, for torch's current device.
    """

    ours: int = 1
    poll: Callable[[], Poll] | None = None
    polls: list[Poll] = field(default_factory=list)
    why_not: str = ""

    def __enter__(self) -> Watch:
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        if self.poll is None:
            self.poll, self.why_not = _nvml_poll()
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

    def _run(self, poll: Callable[[], Poll]) -> None:
        while not self._stopped.wait(EVERY_S):
            try:
                self.polls.append(poll())
            except Exception as error:  # whatever it is, samples from here on are not watched
                self.why_not = f"the watch ended: {type(error).__name__}: {error}"
                return

    def flags(self, begin: float, end: float) -> int:
        """A union of `Flag` for what was seen between two times of `time.monotonic()`, and right before and after."""
        seen = [poll for poll in list(self.polls) if begin - EVERY_S <= poll.at <= end + EVERY_S]
        found = 0
        for poll in seen:
            if poll.reasons & SLOWED:
                found |= Flag.THROTTLED
            if poll.limit_mhz != self.polls[0].limit_mhz:
                found |= Flag.CLOCKS_CHANGED
            if poll.processes > self.ours:
                found |= Flag.SHARED
        return int(found)

    def told(self) -> dict[str, str]:
        """What was seen, in words, by name."""
        if not self.polls:
            return {"device state": f"{NOT_WATCHED}: {self.why_not}"}
        clocks = sorted(poll.sm_mhz for poll in self.polls)
        union = 0
        for poll in self.polls:
            union |= poll.reasons
        reasons = [text for bit, text in REASONS.items() if union & bit]
        most = max(poll.processes for poll in self.polls)
        ended = {"device state": f"{NOT_WATCHED} to the end: {self.why_not}"} if self.why_not else {}
        return ended | {
            "SM clock, MHz": f"{clocks[0]} to {clocks[-1]}, median {clocks[len(clocks) // 2]}",
            "slower clocks": ", ".join(reasons) or "none",
            "processes on the device": str(most) if most else "not shown here: others cannot be told",
        }


def _nvml_poll() -> tuple[Callable[[], Poll] | None, str]:
    """NVML's poll for torch's current device; or None, and why."""
    if torch.version.cuda is None:
        return None, "NVML is for NVIDIA's devices"
    try:
        import pynvml  # type: ignore[import-not-found, import-untyped, unused-ignore]
    except ImportError:
        return None, "pynvml is not there: install nvidia-ml-py"
    try:
        pynvml.nvmlInit()
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{properties.uuid}")
    except (pynvml.NVMLError, AttributeError, RuntimeError) as error:
        return None, f"NVML does not answer: {error}"

    def asked(name: str, *arguments: Any) -> int:
        try:
            return int(getattr(pynvml, name)(handle, *arguments))
        except (pynvml.NVMLError, AttributeError):
            return 0

    def poll() -> Poll:
        try:
            processes = len(pynvml.nvmlDeviceGetComputeRunningProcesses(handle))
        except pynvml.NVMLError:
            processes = 0
        return Poll(
            time.monotonic(),
            asked("nvmlDeviceGetClockInfo", pynvml.NVML_CLOCK_SM),
            asked("nvmlDeviceGetApplicationsClock", pynvml.NVML_CLOCK_SM),
            asked("nvmlDeviceGetCurrentClocksThrottleReasons"),
            processes,
        )

    return poll, ""
