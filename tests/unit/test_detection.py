"""Detection on machines that are made up: each device kind, broken drivers, and every step of each library's probe."""

import subprocess
import sys
import warnings
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import fp8moe
from fp8moe.detection import describe_device, detect, detect_platform
from fp8moe.libraries import INSTALL, KINDS, LibraryProbe, Surroundings, probe_libraries
from fp8moe.platforms import LIBRARIES, PLATFORMS, Platform

NO_DEVICE = SimpleNamespace(is_available=lambda: False, device_count=lambda: 0)
GIB = 2**30


def raises(error: BaseException) -> Callable[..., Any]:
    def call(*_: object) -> Any:
        raise error

    return call


def fake_torch(
    cuda: Any = NO_DEVICE, xpu: Any = NO_DEVICE, *, cuda_build: str | None = None, hip_build: str | None = None
) -> SimpleNamespace:
    version = SimpleNamespace(cuda=cuda_build, hip=hip_build)
    return SimpleNamespace(__version__="2.13.0", version=version, cuda=cuda, xpu=xpu)


def device(count: int = 1, **properties: Any) -> SimpleNamespace:
    return SimpleNamespace(
        is_available=lambda: True,
        device_count=lambda: count,
        get_device_properties=lambda index: {0: SimpleNamespace(**properties)}[index],
    )


HOPPER = device(major=9, minor=0, name="NVIDIA H100 80GB HBM3", total_memory=80 * GIB)


def around(
    modules: dict[str, Any] | None = None,
    specs: dict[str, ModuleSpec] | None = None,
    programs: tuple[str, ...] = (),
    versions: dict[str, str] | None = None,
    files: dict[str, str] | None = None,
    env: dict[str, str] | None = None,
    find_spec: Callable[[str], ModuleSpec | None] | None = None,
) -> Surroundings:
    """A machine with exactly this on it; an exception in place of a module is raised by importing it."""

    def import_module(name: str) -> Any:
        found = (modules or {}).get(name)
        if found is None:
            raise ModuleNotFoundError(f"No module named {name!r}")
        if isinstance(found, BaseException):
            raise found
        return found

    def read_text(path: str) -> str:
        if path not in (files or {}):
            raise FileNotFoundError(path)
        return (files or {})[path]

    def version_of(name: str) -> str:
        if name not in (versions or {}):
            raise PackageNotFoundError(name)
        return (versions or {})[name]

    return Surroundings(
        find_spec=find_spec or (lambda name: (specs or {}).get(name)),
        import_module=import_module,
        which=lambda program: f"/opt/bin/{program}" if program in programs else None,
        version_of=version_of,
        read_text=read_text,
        env=env or {},
    )


def spec(name: str, folder: Path | str = "/site") -> ModuleSpec:
    made = ModuleSpec(name, None, origin=f"{folder}/{name}/__init__.py", is_package=True)
    made.submodule_search_locations = [f"{folder}/{name}"]
    return made


# -- devices --


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


# -- libraries --

FLASHINFER = SimpleNamespace(fp4_quantize=1, nvfp4_block_scale_interleave=1)
FUSED_MOE = SimpleNamespace(cutlass_fused_moe=1, trtllm_fp4_block_scale_moe=1)
FLASHINFER_MODULES = {"flashinfer": FLASHINFER, "flashinfer.fused_moe": FUSED_MOE}
FLASHINFER_SPECS = {name: spec(name) for name in ("flashinfer", "flashinfer_cubin", "flashinfer.fused_moe")}


def probe(name: str, kind: str, here: Surroundings) -> LibraryProbe:
    return {found.name: found for found in probe_libraries(kind, here)}[name]


def without(mapping: dict[str, Any], *names: str) -> dict[str, Any]:
    return {key: value for key, value in mapping.items() if key not in names}


def test_one_probe_for_each_library_in_order() -> None:
    for kind in ("cuda", "rocm", "xpu", "cpu", "tpu"):
        probes = probe_libraries(kind, around())
        assert [found.name for found in probes] == list(LIBRARIES)
        assert not any(found.present for found in probes)
    assert set(KINDS) == set(INSTALL) == set(LIBRARIES)


@pytest.mark.parametrize("kind", ["rocm", "xpu", "cpu"])
def test_a_library_of_another_kind_is_not_looked_for(kind: str) -> None:
    here = around({name: raises(AssertionError()) for name in LIBRARIES}, find_spec=raises(AssertionError("looked")))
    for found in probe_libraries(kind, here):
        if kind not in KINDS[found.name]:
            assert not found.present
            assert found.detail == f"its kernels run on {' and '.join(KINDS[found.name])} only"


def test_flashinfer_whole() -> None:
    found = probe(
        "flashinfer", "cuda", around(FLASHINFER_MODULES, FLASHINFER_SPECS, versions={"flashinfer-python": "0.6"})
    )
    assert found.present
    assert found.version == "0.6"
    assert "flashinfer_cubin" in found.detail


@pytest.mark.parametrize(
    ("env", "programs", "kernels"),
    [
        ({"VLLM_HAS_FLASHINFER_CUBIN": "1"}, (), "VLLM_HAS_FLASHINFER_CUBIN=1"),
        ({"VLLM_HAS_FLASHINFER_CUBIN": "0"}, ("nvcc",), "nvcc, /opt/bin/nvcc"),
        ({"VLLM_HAS_FLASHINFER_CUBIN": "yes"}, ("nvcc",), "nvcc, /opt/bin/nvcc"),
        ({}, ("nvcc",), "nvcc, /opt/bin/nvcc"),
    ],
)
def test_flashinfer_kernels_without_the_cubin_package(
    env: dict[str, str], programs: tuple[str, ...], kernels: str
) -> None:
    specs = without(FLASHINFER_SPECS, "flashinfer_cubin")
    found = probe("flashinfer", "cuda", around(FLASHINFER_MODULES, specs, programs, env=env))
    assert found.present
    assert found.detail.endswith(f"kernels from {kernels}")


@pytest.mark.parametrize(
    ("here", "missing"),
    [
        (around(FLASHINFER_MODULES, without(FLASHINFER_SPECS, "flashinfer")), "module flashinfer is not found"),
        (around(FLASHINFER_MODULES, without(FLASHINFER_SPECS, "flashinfer_cubin")), "no nvcc is on PATH"),
        (
            around(
                FLASHINFER_MODULES,
                without(FLASHINFER_SPECS, "flashinfer_cubin"),
                env={"VLLM_HAS_FLASHINFER_CUBIN": "yes"},
            ),
            "VLLM_HAS_FLASHINFER_CUBIN='yes' is no integer",
        ),
        (
            around(FLASHINFER_MODULES, without(FLASHINFER_SPECS, "flashinfer.fused_moe")),
            "flashinfer.fused_moe is not found",
        ),
        *(
            (
                around(
                    FLASHINFER_MODULES | {module: SimpleNamespace(**without(vars(whole), attribute))}, FLASHINFER_SPECS
                ),
                f"{module}.{attribute} is missing",
            )
            for module, whole in (("flashinfer", FLASHINFER), ("flashinfer.fused_moe", FUSED_MOE))
            for attribute in vars(whole)
        ),
        (
            around(FLASHINFER_MODULES | {"flashinfer": OSError("libtvm_ffi.so")}, FLASHINFER_SPECS),
            "it is broken: OSError: libtvm_ffi.so",
        ),
        (around(FLASHINFER_MODULES | {"flashinfer": SystemExit()}, FLASHINFER_SPECS), "it is broken: SystemExit"),
        (around(find_spec=raises(ValueError("flashinfer.__spec__ is None"))), "it is broken: ValueError"),
    ],
)
def test_flashinfer_fails_at_each_step(here: Surroundings, missing: str) -> None:
    found = probe("flashinfer", "cuda", here)
    assert not found.present
    assert missing in found.detail
    assert found.install == INSTALL["flashinfer"]


def test_a_parent_that_is_missing_is_missing() -> None:
    here = around(FLASHINFER_MODULES, find_spec=raises(ModuleNotFoundError("No module named 'flashinfer'")))
    assert probe("flashinfer", "cuda", here).detail == "module flashinfer is not found"


def test_deep_gemm_at_the_top() -> None:
    found = probe(
        "deep_gemm", "cuda", around(specs={"deep_gemm": spec("deep_gemm")}, versions={"sgl-deep-gemm": "0.2.5"})
    )
    assert found == LibraryProbe("deep_gemm", True, "module deep_gemm, /site/deep_gemm/__init__.py", "0.2.5")


def vllm_folder(tmp_path: Path, *files: str) -> dict[str, ModuleSpec]:
    for name in ("__init__.py", *files):
        path = tmp_path / "vllm" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return {"vllm": spec("vllm", tmp_path)}


def test_deep_gemm_inside_vllm(tmp_path: Path) -> None:
    found = probe("deep_gemm", "cuda", around(specs=vllm_folder(tmp_path, "third_party/deep_gemm/__init__.py")))
    assert found.present
    assert found.detail.startswith("the copy inside vllm, ")


def test_deep_gemm_nowhere(tmp_path: Path) -> None:
    assert probe("deep_gemm", "cuda", around()).detail == "module deep_gemm is not found"
    found = probe("deep_gemm", "cuda", around(specs=vllm_folder(tmp_path)))
    assert not found.present
    assert found.detail.endswith("holds no copy of it")


@pytest.mark.parametrize(
    ("files", "missing"),
    [
        (("_C.abi3.so", "_moe_C.abi3.so"), None),
        (("_C_stable_libtorch.abi3.so", "_moe_C_stable_libtorch.abi3.so"), None),
        (("_C.cpython-312-x86_64-linux-gnu.so", "_moe_C.cpython-312-x86_64-linux-gnu.so"), None),
        (("_C.abi3.so",), "_moe_C:"),  # vLLM's build for the CPU
        (("_moe_C.abi3.so", "_C_AVX2.abi3.so"), "_C:"),
        (("_custom_ops.py",), "_C:"),
    ],
)
def test_vllm_by_its_files(tmp_path: Path, files: tuple[str, ...], missing: str | None) -> None:
    for kind in ("cuda", "rocm"):
        found = probe("vllm", kind, around(specs=vllm_folder(tmp_path, *files), versions={"vllm": "0.16.0"}))
        assert found.present is (missing is None)
        assert found.version == "0.16.0"
        if missing is not None:
            assert f"no compiled {missing}" in found.detail


def test_aiter_and_xpu_kernels() -> None:
    assert probe("aiter", "rocm", around(specs={"aiter": spec("aiter")})).present
    assert probe("aiter", "rocm", around()).detail == "module aiter is not found"
    assert probe("vllm_xpu_kernels", "xpu", around(specs={"vllm_xpu_kernels": spec("vllm_xpu_kernels")})).present


def test_a_probe_imports_nothing_but_flashinfer(tmp_path: Path) -> None:
    """Real packages whose import would end the process are found, and stay unimported."""
    for name in ("vllm", "deep_gemm", "aiter", "vllm_xpu_kernels"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('imported')")
    for name in ("_C.abi3.so", "_moe_C.abi3.so"):
        (tmp_path / "vllm" / name).touch()
    code = """
import sys
from fp8moe.libraries import probe_libraries
found = {probe.name for kind in ("cuda", "rocm", "xpu") for probe in probe_libraries(kind) if probe.present}
assert found == {"vllm", "deep_gemm", "aiter", "vllm_xpu_kernels"}, found
assert not found & set(sys.modules), found & set(sys.modules)
assert "torch" not in sys.modules
"""
    path = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(Path(fp8moe.__file__).parents[1])!r}]\n"
    done = subprocess.run([sys.executable, "-c", path + code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
