"""Detection: the device that torch sees first, its libraries, and what a report's header says of them.

Nothing here raises: a driver or library that breaks when it is looked at counts as absent, and the reason is kept
in the notes. Asking torch for a device's properties initialises the driver, so a process forked afterwards cannot use
the device; no tensor is made.
"""

from __future__ import annotations

import os
import platform as host
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from fp8moe.libraries import LibraryProbe, Surroundings, one_line, probe_libraries
from fp8moe.platforms import Platform

__all__ = [
    "Detection",
    "DeviceInfo",
    "LibraryProbe",
    "Surroundings",
    "describe_device",
    "detect",
    "detect_platform",
    "probe_libraries",
]

T = TypeVar("T")
TRITON_DISTRIBUTIONS = ("triton", "pytorch-triton-rocm", "pytorch-triton-xpu", "triton-windows")
NVIDIA_DRIVER_FILE = "/proc/driver/nvidia/version"
AMD_DRIVER_FILE = "/sys/module/amdgpu/version"


@dataclass(frozen=True)
class DeviceInfo:
    """What a report says about the device; None where it cannot be told.

    Args:
        kind: as `Platform.kind`.
        name: as the driver or the operating system gives it.
        architecture: as `Platform.architecture`.
        count: devices of this kind that are visible; the first is the one described.
        driver: the kernel driver's version.
        memory_bytes: of the device; of the host where there is none.
        runtime: what torch was built for, such as "CUDA 12.9" or "ROCm 6.4".
        torch, triton: their versions.
        notes: what looked present and counts as absent, with the reason.
    """

    kind: str
    name: str
    architecture: str
    count: int
    driver: str | None
    memory_bytes: int | None
    runtime: str | None
    torch: str | None
    triton: str | None
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        memory = "" if self.memory_bytes is None else f", {self.memory_bytes / 2**30:.0f} GiB"
        several = "" if self.count == 1 else f", first of {self.count}"
        parts = [
            f"{self.name} ({self.architecture}{memory}{several})",
            self.driver and f"driver {self.driver}",
            self.runtime,
            f"torch {self.torch}" if self.torch else "no torch",
            f"triton {self.triton}" if self.triton else "no triton",
        ]
        return ", ".join(part for part in parts if part)


@dataclass(frozen=True)
class Detection:
    """All of one look: the platform for the selector, the device for a person, and each library's probe."""

    platform: Platform
    device: DeviceInfo
    libraries: tuple[LibraryProbe, ...]


@dataclass(frozen=True)
class _Found:
    """A device as torch describes it, and what its platform is without libraries."""

    platform: Platform
    name: str
    count: int
    driver: str | None
    memory_bytes: int | None


def detect(surroundings: Surroundings | None = None) -> Detection:
    """Platform, description and library probes of the device that torch sees first; asks anew at each call."""
    here = surroundings or Surroundings()
    bare, device = _look(here)
    libraries = probe_libraries(bare.kind, here)
    platform = bare.with_libraries(*(probe.name for probe in libraries if probe.present))
    return Detection(platform, device, libraries)


def detect_platform(surroundings: Surroundings | None = None) -> Platform:
    """The device that torch sees first, with the libraries that can be used; see `detect`."""
    return detect(surroundings).platform


def describe_device(surroundings: Surroundings | None = None) -> DeviceInfo:
    """The device that torch sees first, for a report's header; no library is looked at. See `detect`."""
    return _look(surroundings or Surroundings())[1]


def _look(here: Surroundings) -> tuple[Platform, DeviceInfo]:
    notes: list[str] = []
    torch = _attempt("torch", lambda: here.import_module("torch"), notes)
    found = None
    for look in (_cuda_or_rocm, _xpu):
        if torch is not None and found is None:
            found = look(torch, here, notes)
    if found is None:
        found = _Found(Platform("cpu"), _cpu_name(here), 1, None, _host_memory())
    return found.platform, DeviceInfo(
        kind=found.platform.kind,
        name=found.name,
        architecture=found.platform.architecture,
        count=found.count,
        driver=found.driver,
        memory_bytes=found.memory_bytes,
        runtime=None if torch is None else _runtime(torch),
        torch=None if torch is None else str(getattr(torch, "__version__", "unknown")),
        triton=here.version(*TRITON_DISTRIBUTIONS),
        notes=tuple(dict.fromkeys(notes)),
    )


def _attempt(what: str, ask: Callable[[], T], notes: list[str]) -> T | None:
    """What `ask` returns, or None with the reason in `notes`; warnings go there too."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            return ask()
        except (Exception, SystemExit) as error:
            notes.append(f"{what}: {one_line(error)}")
            return None
        finally:
            notes.extend(f"{what}: {str(warning.message).splitlines()[0]}" for warning in caught)


def _cuda_or_rocm(torch: Any, here: Surroundings, notes: list[str]) -> _Found | None:
    """torch.cuda is CUDA or ROCm, whichever torch was built for."""
    hip = getattr(getattr(torch, "version", None), "hip", None)
    what = "ROCm" if hip else "CUDA"

    def look() -> _Found | None:
        if not torch.cuda.is_available():
            return None
        properties = torch.cuda.get_device_properties(0)
        if hip:
            bare = Platform("rocm", gcn_arch=str(properties.gcnArchName))
            driver = _attempt("amdgpu's version", lambda: here.read_text(AMD_DRIVER_FILE).strip(), [])
        else:
            capability = (int(properties.major), int(properties.minor))
            bare = Platform("cuda", capability, cuda_version=_pair(getattr(torch.version, "cuda", None)))
            driver = _nvidia_driver(here)
        return _Found(bare, str(properties.name), torch.cuda.device_count(), driver, int(properties.total_memory))

    found = _attempt(what, look, notes)
    built_for = hip or getattr(getattr(torch, "version", None), "cuda", None)
    if found is None and built_for and not any(note.startswith(what) for note in notes):
        notes.append(f"{what}: torch is built for {what} {built_for} and sees no device")
    return found


def _xpu(torch: Any, _here: Surroundings, notes: list[str]) -> _Found | None:
    def look() -> _Found | None:
        if not hasattr(torch, "xpu") or not torch.xpu.is_available():
            return None
        properties = torch.xpu.get_device_properties(0)
        driver = getattr(properties, "driver_version", None)
        return _Found(
            Platform("xpu"), str(properties.name), torch.xpu.device_count(), driver, int(properties.total_memory)
        )

    return _attempt("XPU", look, notes)


def _pair(version: str | None) -> tuple[int, int] | None:
    """(major, minor) of a version's text; None where it has none."""
    match = re.match(r"(\d+)\.(\d+)", version or "")
    return (int(match[1]), int(match[2])) if match else None


def _runtime(torch: Any) -> str | None:
    version = getattr(torch, "version", None)
    for attribute, name in (("hip", "ROCm"), ("cuda", "CUDA"), ("xpu", "XPU")):
        built_for = getattr(version, attribute, None)
        if built_for:
            return f"{name} {built_for}"
    return None


def _nvidia_driver(here: Surroundings) -> str | None:
    """From NVML where its Python package is installed, else from the driver's own file."""

    def from_nvml() -> str:
        nvml = here.import_module("pynvml")
        nvml.nvmlInit()
        try:
            text = nvml.nvmlSystemGetDriverVersion()
        finally:
            nvml.nvmlShutdown()
        return text.decode() if isinstance(text, bytes) else str(text)

    def from_file() -> str | None:
        match = re.search(r"Kernel Module.*?\s(\d+\.[\d.]+)", here.read_text(NVIDIA_DRIVER_FILE))
        return match[1] if match else None

    return _attempt("NVML", from_nvml, []) or _attempt("driver file", from_file, [])


def _cpu_name(here: Surroundings) -> str:
    text = _attempt("cpuinfo", lambda: here.read_text("/proc/cpuinfo"), []) or ""
    match = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return match[1].strip() if match else host.processor() or host.machine()


def _host_memory() -> int | None:
    return _attempt("memory", lambda: os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), [])
