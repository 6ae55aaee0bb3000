"""Which kernel libraries are found, and why not."""

import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import fp8moe
from fp8moe.libraries import INSTALL, KINDS, LibraryProbe, Surroundings, probe_libraries
from fp8moe.platforms import LIBRARIES
from tests.unit.surroundings import around, raises, spec

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
