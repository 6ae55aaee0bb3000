"""What tells a GPU's state: NVML's and AMD SMI's answers in words, and why nothing can be asked.

Both libraries are played here; that NVML is asked rightly shows on a GPU.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from conformance.timing import polls
from conformance.timing.polls import Ask, Poll, poll_of_device

DEVICE = 3
"""torch's current one."""
UUID = "6b1e3a5c-0d2f-4c58-9a77-1f2e3d4c5b6a"
SM = 1


def on(monkeypatch: pytest.MonkeyPatch, *, cuda: str | None = None, hip: str | None = None) -> None:
    """torch is one for these, and its current device is at 0001:c6:00."""

    def properties(index: int) -> SimpleNamespace:
        assert index == DEVICE
        return SimpleNamespace(uuid=UUID, pci_domain_id=1, pci_bus_id=0xC6, pci_device_id=0)

    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: DEVICE)
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)


def answers(handle: object, given: Mapping[tuple[Any, ...], Any]) -> dict[str, Callable[..., Any]]:
    """Functions by name, each for this handle alone; an answer that is an exception is raised."""

    def function(name: str) -> Callable[..., Any]:
        def asked(about: object, *arguments: Any) -> Any:
            assert about == handle
            answer = given[(name, *arguments)]
            if isinstance(answer, Exception):
                raise answer
            return answer

        return asked

    return {name: function(name) for name, *_ in given}


def played(monkeypatch: pytest.MonkeyPatch, name: str, **content: Any) -> ModuleType:
    module = ModuleType(name)
    vars(module).update(content)
    monkeypatch.setitem(sys.modules, name, module)
    return module


def asking() -> Ask:
    """What looks at the device, which here is there."""
    ask, why_not = poll_of_device()
    assert why_not == ""
    assert ask is not None
    return ask


# -- NVML --


class NVMLError(Exception):
    """As pynvml's, which is no RuntimeError."""


REASONS = "nvmlDeviceGetCurrentClocksThrottleReasons"
CLOCK = "nvmlDeviceGetClockInfo"
LIMIT = "nvmlDeviceGetApplicationsClock"
PROCESSES = "nvmlDeviceGetComputeRunningProcesses"
SAID = {(REASONS,): 0, (CLOCK, SM): 1755, (LIMIT, SM): 1980, (PROCESSES,): ["one", "another"]}


def nvml(monkeypatch: pytest.MonkeyPatch, said: Mapping[Any, Any] = SAID, **content: Any) -> ModuleType:
    on(monkeypatch, cuda="13.0")
    given: dict[str, Any] = {
        "NVMLError": NVMLError,
        "NVML_CLOCK_SM": SM,
        "nvmlInit": lambda: None,
        "nvmlDeviceGetHandleByUUID": lambda uuid: ("handle", uuid),
        **answers(("handle", f"GPU-{UUID}"), said),
        **content,
    }
    return played(monkeypatch, "pynvml", **given)


def test_nvml_tells_clocks_and_processes_of_torchs_device(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml(monkeypatch)
    ask, before = asking(), time.monotonic()
    found = ask()
    assert before <= found.at <= time.monotonic()
    assert found == Poll(found.at, 1755, 1980, frozenset(), 2)


@pytest.mark.parametrize(
    ("bits", "words"),
    [
        (0x0, set()),
        (0x1 | 0x2 | 0x10 | 0x100, set()),  # idle, application clocks, sync boost, display clock
        (0x4, {polls.POWER_CAP}),
        (0x8, {polls.SLOWDOWN}),
        (0x20, {polls.THERMAL}),
        (0x40, {polls.THERMAL}),
        (0x80, {polls.BRAKE}),
        (0x4 | 0x20 | 0x40 | 0x80, {polls.POWER_CAP, polls.THERMAL, polls.BRAKE}),
    ],
)
def test_nvmls_reasons_become_words(monkeypatch: pytest.MonkeyPatch, bits: int, words: set[str]) -> None:
    nvml(monkeypatch, SAID | {(REASONS,): bits})
    assert asking()().reasons == words


@pytest.mark.parametrize(
    ("question", "lacking"),
    [
        ((CLOCK, SM), {"sm_mhz": 0}),
        ((LIMIT, SM), {"limit_mhz": 0}),
        ((PROCESSES,), {"processes": 0}),
    ],
)
def test_what_nvml_does_not_tell_is_nothing(
    monkeypatch: pytest.MonkeyPatch, question: tuple[Any, ...], lacking: dict[str, Any]
) -> None:
    said = SAID | {(REASONS,): 0x4}
    nvml(monkeypatch, said | {question: NVMLError("Not Supported")})
    found = asking()()
    whole = {"at": found.at, "sm_mhz": 1755, "limit_mhz": 1980, "reasons": {polls.POWER_CAP}, "processes": 2}
    assert vars(found) == whole | lacking


def test_nvml_that_tells_no_reasons_is_no_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml(monkeypatch, SAID | {(REASONS,): NVMLError("Not Supported")})
    assert poll_of_device() == (None, "NVML does not answer: Not Supported")


def test_a_question_that_pynvml_no_longer_has_is_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    delattr(nvml(monkeypatch), LIMIT)
    found = asking()()
    assert (found.sm_mhz, found.limit_mhz) == (1755, 0)


def raises(error: Exception) -> Callable[..., Any]:
    def call(*arguments: object) -> None:
        raise error

    return call


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ({"nvmlInit": raises(NVMLError("Driver Not Loaded"))}, "NVML does not answer: Driver Not Loaded"),
        ({"nvmlDeviceGetHandleByUUID": raises(NVMLError("Not Found"))}, "NVML does not answer: Not Found"),
    ],
)
def test_nvml_that_does_not_answer_is_told(monkeypatch: pytest.MonkeyPatch, content: dict[str, Any], why: str) -> None:
    nvml(monkeypatch, **content)
    assert poll_of_device() == (None, why)


def test_a_torch_that_does_not_tell_its_device_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml(monkeypatch)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace())
    ask, why_not = poll_of_device()
    assert ask is None
    assert why_not.startswith("NVML does not answer: ")
    assert "uuid" in why_not
    monkeypatch.setattr(torch.cuda, "current_device", raises(RuntimeError("no CUDA-capable device")))
    assert poll_of_device() == (None, "NVML does not answer: no CUDA-capable device")


def test_without_pynvml_the_remedy_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml(monkeypatch)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert poll_of_device() == (None, "pynvml is not there: install nvidia-ml-py")


# -- AMD SMI --


class AmdSmiException(Exception):
    """As amdsmi's, which is no RuntimeError."""


GFX = "the multiprocessors' clock"
VIOLATIONS = "amdsmi_get_violation_status"
CLOCKS = "amdsmi_get_clock_info"
QUIET = dict.fromkeys(polls.AMD_REASONS, False) | {"active_gfx_clk_below_host_limit": True, "per_socket_thrm": 0}
TOLD = {
    (VIOLATIONS,): QUIET,
    (CLOCKS, GFX): {"clk": 1810, "min_clk": 132, "max_clk": 2100, "clk_locked": False},
    ("amdsmi_get_gpu_process_list",): [{"pid": 7}, {"pid": 8}, {"pid": 9}],
}
PLACES = ("0001:05:00.0", "0000:C6:00.0", "0001:C6:00.0", "0001:c6:01.0")
"""The third is torch's device."""


def amd_smi(
    monkeypatch: pytest.MonkeyPatch, told: Mapping[Any, Any] = TOLD, places: Sequence[str] = PLACES, **content: Any
) -> None:
    on(monkeypatch, hip="6.4")
    given: dict[str, Any] = {
        "AmdSmiException": AmdSmiException,
        "AmdSmiClkType": SimpleNamespace(GFX=GFX, SYS="another clock"),
        "amdsmi_init": lambda: None,
        "amdsmi_get_processor_handles": lambda: [f"handle of {place}" for place in places],
        "amdsmi_get_gpu_device_bdf": lambda handle: handle.removeprefix("handle of "),
        **answers("handle of 0001:C6:00.0", told),
        **content,
    }
    played(monkeypatch, "amdsmi", **given)


def test_amd_smi_is_asked_about_the_device_at_torchs_place(monkeypatch: pytest.MonkeyPatch) -> None:
    amd_smi(monkeypatch)
    ask, before = asking(), time.monotonic()
    found = ask()
    assert before <= found.at <= time.monotonic()
    assert found == Poll(found.at, 1810, 2100, frozenset(), 3)


@pytest.mark.parametrize(
    ("places", "why"),
    [
        (("0001:05:00.0", "0001:c7:00.0"), "AMD SMI shows 0 devices at 0001:c6:00, of 0001:05:00.0, 0001:c7:00.0"),
        ((), "AMD SMI shows 0 devices at 0001:c6:00, of none"),
        (("0001:c6:00.0", "0001:c6:00.1"), "AMD SMI shows 2 devices at 0001:c6:00, of 0001:c6:00.0, 0001:c6:00.1"),
    ],
)
def test_no_device_or_several_at_that_place_is_told(
    monkeypatch: pytest.MonkeyPatch, places: Sequence[str], why: str
) -> None:
    amd_smi(monkeypatch, places=places)
    assert poll_of_device() == (None, why)


@pytest.mark.parametrize(
    ("violations", "words"),
    [
        ({"active_ppt_pwr": True}, {polls.POWER_CAP}),
        ({"active_prochot_thrm": True}, {polls.THERMAL}),
        ({"active_socket_thrm": True}, {polls.THERMAL}),
        ({"active_vr_thrm": True}, {polls.THERMAL}),
        ({"active_hbm_thrm": True, "active_ppt_pwr": True}, {polls.THERMAL, polls.POWER_CAP}),
        ({"active_vr_thrm": "N/A", "active_hbm_thrm": "N/A"}, set()),
    ],
)
def test_active_violations_become_words(
    monkeypatch: pytest.MonkeyPatch, violations: dict[str, Any], words: set[str]
) -> None:
    amd_smi(monkeypatch, {**TOLD, (VIOLATIONS,): QUIET | violations})
    assert asking()().reasons == words


@pytest.mark.parametrize(
    ("question", "answer", "lacking"),
    [
        ((CLOCKS, GFX), {"clk": "N/A", "max_clk": 2100}, {"sm_mhz": 0}),
        ((CLOCKS, GFX), {"clk": 1810, "max_clk": "N/A"}, {"limit_mhz": 0}),
        ((CLOCKS, GFX), {}, {"sm_mhz": 0, "limit_mhz": 0}),
        ((CLOCKS, GFX), AmdSmiException("not supported"), {"sm_mhz": 0, "limit_mhz": 0}),
        (("amdsmi_get_gpu_process_list",), AmdSmiException("no permission"), {"processes": 0}),
    ],
)
def test_what_amd_smi_does_not_tell_is_nothing(
    monkeypatch: pytest.MonkeyPatch, question: tuple[Any, ...], answer: Any, lacking: dict[str, Any]
) -> None:
    amd_smi(monkeypatch, {**TOLD, question: answer})
    found = asking()()
    whole = {"at": found.at, "sm_mhz": 1810, "limit_mhz": 2100, "reasons": frozenset(), "processes": 3}
    assert vars(found) == whole | lacking


def test_violations_that_are_no_longer_told_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[Any, Any] = {**TOLD, (VIOLATIONS,): QUIET | {"active_socket_thrm": True}}
    amd_smi(monkeypatch, told)
    ask = asking()
    assert ask().reasons == {polls.THERMAL}
    told[(VIOLATIONS,)] = AmdSmiException("busy")
    assert ask().reasons == set()


@pytest.mark.parametrize("answer", [QUIET | {"active_socket_thrm": "N/A"}, {}, AmdSmiException("not supported")])
def test_a_device_that_does_not_tell_violations_is_refused(monkeypatch: pytest.MonkeyPatch, answer: Any) -> None:
    amd_smi(monkeypatch, {**TOLD, (VIOLATIONS,): answer})
    why = "AMD SMI does not tell whether this device is throttled: it does from MI300 and ROCm 6.4 on"
    assert poll_of_device() == (None, why)


@pytest.mark.parametrize("name", ["amdsmi_init", "amdsmi_get_processor_handles", "amdsmi_get_gpu_device_bdf"])
def test_amd_smi_that_does_not_answer_is_told(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    broken: dict[str, Any] = {name: raises(AmdSmiException("driver not loaded"))}
    amd_smi(monkeypatch, **broken)
    assert poll_of_device() == (None, "AMD SMI does not answer: driver not loaded")


def test_without_amdsmi_the_remedy_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, hip="6.4")
    monkeypatch.setitem(sys.modules, "amdsmi", None)
    ask, why_not = poll_of_device()
    assert ask is None
    assert why_not.startswith("amdsmi does not load (ModuleNotFoundError(")
    assert why_not.endswith("it comes with ROCm, as the package amdsmi")


@pytest.mark.parametrize("error", ["KeyError('ROCM_PATH')", "OSError('libamd_smi.so: cannot open shared object file')"])
def test_an_amdsmi_without_its_library_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: str) -> None:
    on(monkeypatch, hip="6.4")
    monkeypatch.delitem(sys.modules, "amdsmi", raising=False)
    (tmp_path / "amdsmi.py").write_text(f"raise {error}\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert poll_of_device() == (None, f"amdsmi does not load ({error}): it comes with ROCm, as the package amdsmi")


def test_for_other_devices_nothing_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch)
    ask, why_not = poll_of_device()
    assert ask is None
    assert why_not == "there is NVML for NVIDIA's devices and AMD SMI for AMD's, and nothing for this one"
