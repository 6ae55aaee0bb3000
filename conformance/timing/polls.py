"""One look at a GPU's clocks, the reasons for slower ones, and who else is on it: by NVML, or by AMD SMI.

AMD SMI's part is written from its documented interface and tested on a played one; it has run on no AMD device yet.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

POWER_CAP = "power cap"
THERMAL, BRAKE, SLOWDOWN = "thermal slowdown", "power brake", "hardware slowdown"
SLOWED = frozenset((THERMAL, BRAKE, SLOWDOWN))
"""Reasons from outside the work. Power capping is none: a large FP8 GEMM runs at the limit for as long as it runs."""
# NVML API reference, nvmlClocksEventReasons.
NVML_REASONS = {0x4: POWER_CAP, 0x8: SLOWDOWN, 0x20: THERMAL, 0x40: THERMAL, 0x80: BRAKE}
# AMD SMI Python API reference, amdsmi_get_violation_status: whether each limit is being enforced now.
AMD_REASONS = {
    "active_ppt_pwr": POWER_CAP,
    "active_prochot_thrm": THERMAL,
    "active_socket_thrm": THERMAL,
    "active_vr_thrm": THERMAL,
    "active_hbm_thrm": THERMAL,
}


@dataclass(frozen=True)
class Poll:
    """One look at the device.

    Args:
        at: `time.monotonic()`.
        sm_mhz: clock of the multiprocessors (compute units); 0 where it is not told.
        limit_mhz: the clock that they may have at most, as it is set; 0 where it is not told.
        reasons: why clocks are below the possible ones, in words of this module.
        processes: how many compute processes have the device open, as far as they are shown here.
    """

    at: float
    sm_mhz: int
    limit_mhz: int
    reasons: frozenset[str]
    processes: int


Ask = Callable[[], Poll]


def poll_of_device() -> tuple[Ask | None, str]:
    """What looks at torch's current device; or None, and why."""
    if torch.version.cuda is not None:
        return _nvml()
    if torch.version.hip is not None:
        return _amd_smi()
    return None, "there is NVML for NVIDIA's devices and AMD SMI for AMD's, and nothing for this one"


def _nvml() -> tuple[Ask | None, str]:
    try:
        import pynvml  # type: ignore[import-not-found, import-untyped, unused-ignore]
    except ImportError:
        return None, "pynvml is not there: install nvidia-ml-py"
    try:
        pynvml.nvmlInit()
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{properties.uuid}")
        pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)  # a device that does not tell them is not watched
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
        bits = asked("nvmlDeviceGetCurrentClocksThrottleReasons")
        return Poll(
            time.monotonic(),
            asked("nvmlDeviceGetClockInfo", pynvml.NVML_CLOCK_SM),
            asked("nvmlDeviceGetApplicationsClock", pynvml.NVML_CLOCK_SM),
            frozenset(text for bit, text in NVML_REASONS.items() if bits & bit),
            processes,
        )

    return poll, ""


def _amd_smi() -> tuple[Ask | None, str]:
    try:
        import amdsmi  # type: ignore[import-not-found, import-untyped, unused-ignore]
    except (ImportError, KeyError, OSError) as error:  # its library is loaded when it is imported
        return None, f"amdsmi does not load ({error!r}): it comes with ROCm, as the package amdsmi"
    try:
        amdsmi.amdsmi_init()
        properties: Any = torch.cuda.get_device_properties(torch.cuda.current_device())
        place = f"{properties.pci_domain_id:04x}:{properties.pci_bus_id:02x}:{properties.pci_device_id:02x}"
        handles = {str(amdsmi.amdsmi_get_gpu_device_bdf(one)): one for one in amdsmi.amdsmi_get_processor_handles()}
        found = [handle for bdf, handle in handles.items() if bdf.lower().startswith(place)]
        if len(found) != 1:
            return None, f"AMD SMI shows {len(found)} devices at {place}, of {', '.join(handles) or 'none'}"
    except (amdsmi.AmdSmiException, AttributeError, RuntimeError) as error:
        return None, f"AMD SMI does not answer: {error}"
    handle = found[0]

    def asked(name: str, *arguments: Any) -> Any:
        try:
            return getattr(amdsmi, name)(handle, *arguments)
        except (amdsmi.AmdSmiException, AttributeError):
            return {}

    def poll() -> Poll:
        clock = asked("amdsmi_get_clock_info", amdsmi.AmdSmiClkType.GFX)
        active = asked("amdsmi_get_violation_status")
        return Poll(
            time.monotonic(),
            _number(clock, "clk"),
            _number(clock, "max_clk"),
            frozenset(text for name, text in AMD_REASONS.items() if active.get(name) is True),
            len(asked("amdsmi_get_gpu_process_list")),
        )

    if not isinstance(asked("amdsmi_get_violation_status").get("active_socket_thrm"), bool):
        return None, "AMD SMI does not tell whether this device is throttled: it does from MI300 and ROCm 6.4 on"
    return poll, ""


def _number(told: Mapping[str, Any], name: str) -> int:
    """0 for what is "N/A"."""
    value = told.get(name)
    return value if isinstance(value, int) else 0
