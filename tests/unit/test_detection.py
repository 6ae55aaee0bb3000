"""Detection on machines that are made up: each device kind, broken drivers, and every step of each library's probe."""

import warnings
from types import SimpleNamespace
from typing import Any

import pytest

from fp8moe.detection import describe_device, detect, detect_platform
from fp8moe.platforms import LIBRARIES, PLATFORMS, Platform
from tests.unit.surroundings import GIB, HOPPER, NO_DEVICE, around, device, fake_torch, raises, spec


def test_cuda() -> None:
    nvml = SimpleNamespace(
        nvmlInit=lambda: None, nvmlShutdown=lambda: None, nvmlSystemGetDriverVersion=lambda: b"575.57.08"
    )
    here = around({"torch": fake_torch(HOPPER, cuda_build="12.9"), "pynvml": nvml}, versions={"triton": "3.9.0"})
    found = detect(here)
    assert found.platform == Platform("cuda", (9, 0), None, (12, 9))
    assert found.device.driver == "575.57.08"
    assert found.device.memory_bytes == 80 * GIB
    assert str(found.device) == (
        "NVIDIA H100 80GB HBM3 (sm90, 80 GiB), driver 575.57.08, CUDA 12.9, torch 2.13.0, triton 3.9.0"
    )
    assert found.device.notes == ()


@pytest.mark.parametrize(
    ("text", "expected"),
    [("12.8", (12, 8)), ("13.0.48", (13, 0)), ("13", None), ("", None), ("unknown", None), (None, None)],
)
def test_cuda_version_that_torch_was_built_with(text: str | None, expected: tuple[int, int] | None) -> None:
    torch = fake_torch(HOPPER)
    torch.version.cuda = text
    assert detect_platform(around({"torch": torch})).cuda_version == expected


@pytest.mark.parametrize("module", ["Open Kernel Module for x86_64", "x86_64 Kernel Module"])
def test_nvidia_driver_without_nvml_is_read_from_its_file(module: str) -> None:
    text = f"NVRM version: NVIDIA UNIX {module}  570.86.15  Release Build\nGCC version: 12.3.0"
    modules = {"torch": fake_torch(HOPPER, cuda_build="12.9")}
    assert describe_device(around(modules, files={"/proc/driver/nvidia/version": text})).driver == "570.86.15"
    assert describe_device(around(modules)).driver is None
    broken = modules | {"pynvml": SimpleNamespace(nvmlInit=raises(RuntimeError("no driver")))}
    assert describe_device(around(broken)).driver is None


def test_rocm() -> None:
    cuda = device(2, gcnArchName="gfx942:sramecc+:xnack-", name="AMD Instinct MI300X", total_memory=192 * GIB)
    here = around({"torch": fake_torch(cuda, hip_build="6.4.43482")}, {"aiter": spec("aiter")})
    found = detect(here)
    assert found.platform == Platform("rocm", None, "gfx942:sramecc+:xnack-", None, frozenset({"aiter"}))
    assert found.platform.is_rocm_gfx9
    assert found.device.runtime == "ROCm 6.4.43482"
    assert "first of 2" in str(found.device)


def test_xpu() -> None:
    xpu = device(name="Intel(R) Data Center GPU Max 1550", total_memory=64 * GIB, driver_version="1.3.29735")
    found = detect(around({"torch": fake_torch(xpu=xpu)}, {"vllm_xpu_kernels": spec("vllm_xpu_kernels")}))
    assert found.platform == PLATFORMS["pvc"]
    assert found.device.driver == "1.3.29735"


def test_cpu() -> None:
    here = around({"torch": fake_torch()}, files={"/proc/cpuinfo": "processor : 0\nmodel name\t: A CPU  \n"})
    found = detect(here)
    assert found.platform == PLATFORMS["cpu"]
    assert found.device.name == "A CPU"
    assert found.device.notes == ()


def test_cuda_build_without_a_device_says_so() -> None:
    found = detect(around({"torch": fake_torch(cuda_build="12.9")}))
    assert found.platform.kind == "cpu"
    assert found.device.notes == ("CUDA: torch is built for CUDA 12.9 and sees no device",)


@pytest.mark.parametrize(
    ("torch", "reason"),
    [
        (ModuleNotFoundError("No module named 'torch'"), "torch: ModuleNotFoundError: No module named 'torch'"),
        (OSError("libcudart.so.12: cannot open\nsecond line"), "torch: OSError: libcudart.so.12: cannot open"),
        (SystemExit(3), "torch: SystemExit: 3"),
        (
            fake_torch(SimpleNamespace(is_available=raises(RuntimeError("driver too old"))), cuda_build="12.9"),
            "CUDA: RuntimeError: driver too old",
        ),
        (
            fake_torch(
                SimpleNamespace(is_available=lambda: True, get_device_properties=raises(AssertionError())),
                cuda_build="12.9",
            ),
            "CUDA: AssertionError",
        ),
        (
            fake_torch(device(major=9, minor=0, name="half a device"), cuda_build="12.9"),
            "CUDA: AttributeError: 'types.SimpleNamespace' object has no attribute 'total_memory'",
        ),
        (
            fake_torch(SimpleNamespace(is_available=raises(RuntimeError("no KFD"))), hip_build="6.4"),
            "ROCm: RuntimeError: no KFD",
        ),
        (
            fake_torch(xpu=SimpleNamespace(is_available=raises(OSError("libze_loader")))),
            "XPU: OSError: libze_loader",
        ),
    ],
)
def test_what_is_broken_counts_as_absent_and_the_reason_is_kept(torch: Any, reason: str) -> None:
    found = detect(around({"torch": torch}))
    assert found.platform == Platform("cpu")
    assert found.device.notes == (reason,)


def test_a_warning_of_the_driver_is_kept_and_not_printed() -> None:
    def is_available() -> bool:
        warnings.warn("CUDA initialization: unexpected error\nmore", UserWarning, stacklevel=2)
        return False

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = detect(around({"torch": fake_torch(SimpleNamespace(is_available=is_available), cuda_build="12.9")}))
    assert found.device.notes == ("CUDA: CUDA initialization: unexpected error",)


def test_torch_without_version_or_xpu() -> None:
    found = detect(around({"torch": SimpleNamespace(cuda=NO_DEVICE)}))
    assert found.platform.kind == "cpu"
    assert found.device.torch == "unknown"
    assert "no triton" in str(found.device)


def test_a_real_machine() -> None:
    platform = Platform.detect()
    info = describe_device()
    assert info.kind == platform.kind
    assert info.torch is not None
    assert info.name
    assert platform.libraries <= set(LIBRARIES)
