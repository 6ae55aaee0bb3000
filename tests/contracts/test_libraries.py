"""What all adapters of libraries say of another device, a missing library, another version."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from conformance.build import build
from fp8moe import PLATFORMS, BackendUnavailable
from fp8moe.backends import (
    aiter,
    batched_vllm_cutlass,
    flashinfer_cutlass,
    flashinfer_trtllm,
    marlin,
    vllm_cutlass,
    vllm_ops,
    xpu,
)
from fp8moe.backends.libraries import LibraryBackend, loaded
from fp8moe.libraries import DISTRIBUTIONS
from tests.contracts.layers import case
from tests.contracts.released import AITER, DEFAULT, FLASHINFER, VLLM, XPU, Release, played


@pytest.mark.parametrize(
    ("cls", "why"),
    [
        (aiter.AiterExperts, "AITER is for ROCm on gfx942 and gfx950, not cpu"),
        (xpu.XpuExperts, "needs an Intel XPU, and this device is cpu"),
        (flashinfer_trtllm.FlashInferTrtllmExperts, "TRTLLM's kernels are for CUDA SM10x, not cpu"),
        (flashinfer_cutlass.FlashInferCutlassExperts, "kernels are for CUDA SM90, SM10x, SM11x and SM12x, not cpu"),
        (marlin.MarlinExperts, "MARLIN is for CUDA SM75 and newer, not cpu"),
        (vllm_cutlass.VllmCutlassExperts, "vLLM's grouped GEMM is for CUDA SM90 to SM109, not cpu"),
    ],
)
def test_another_device_is_told_and_nothing_is_loaded(
    cls: type[LibraryBackend], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fp8moe.backends.libraries.detected_platform", lambda: PLATFORMS["cpu"])
    tensors = build(case("block"), "cpu")
    with pytest.raises(BackendUnavailable, match=why):
        cls(tensors.config, tensors.quant, tensors.weights)


def test_a_missing_library_and_another_version_name_the_remedy() -> None:
    with pytest.raises(BackendUnavailable, match=r"X: no_such_library does not load \(ModuleNotFound.*\); get it"):
        loaded("no_such_library", (), "X", "get it")
    with pytest.raises(BackendUnavailable, match=r"X: json \(.*__init__\.py\) has no swirl: another version; get it"):
        loaded("json", ("loads", "swirl"), "X", "get it")


def test_a_library_that_ends_the_process_as_it_loads_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "fp8moe_that_exits.py").write_text("raise SystemExit('no device manager')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(BackendUnavailable, match=r"does not load \(SystemExit: no device manager\); get it"):
        loaded("fp8moe_that_exits", (), "X", "get it")


def test_the_release_that_was_found_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DISTRIBUTIONS, "json", ("torch",))
    with pytest.raises(BackendUnavailable, match=r"X: json of release \d.* \(.*\) has no swirl: another version"):
        loaded("json", ("swirl",), "X", "get it")


def test_a_parameter_that_is_no_more_is_an_error() -> None:
    call = played(AITER.signature("aiter/fused_moe.py", "fused_moe"), lambda given: given)
    with pytest.raises(TypeError, match="swirl"):
        call(1, 2, 3, 4, 5, swirl=6)
    with pytest.raises(TypeError, match="topk_ids"):
        call(1, 2, 3, 4)
    assert DEFAULT not in call(1, 2, 3, 4, 5).values()


def test_what_an_operator_has_to_take_is_what_the_release_registers() -> None:
    files = {"_C": "cutlass_", "_moe_C": "moe_"}
    for extension, part in files.items():
        names = [name for name in vllm_ops.ARGUMENTS if name.removeprefix("get_").startswith(part)]
        registered = VLLM.schemas(f"vllm/{extension}_stable_libtorch.abi3.so", names)
        for name, schema in registered.items():
            parsed = torch._C.parse_schema(f"played::{schema}")
            assert " ".join(argument.name for argument in parsed.arguments) == vllm_ops.ARGUMENTS[name]
    assert f"{VLLM.name} {VLLM.version}" == vllm_ops.RELEASE


@pytest.mark.parametrize(
    ("cls", "release"),
    [
        (aiter.AiterExperts, AITER),
        (xpu.XpuExperts, XPU),
        (flashinfer_trtllm.FlashInferTrtllmExperts, FLASHINFER),
        (flashinfer_cutlass.FlashInferCutlassExperts, FLASHINFER),
        (marlin.MarlinExperts, VLLM),
        (vllm_cutlass.VllmCutlassExperts, VLLM),
        (batched_vllm_cutlass.BatchedVllmCutlassExperts, VLLM),
    ],
)
def test_what_an_adapter_says_it_was_written_from_is_what_it_is_tried_beside(
    cls: type[LibraryBackend], release: Release
) -> None:
    assert cls.written_from == f"{release.name} {release.version}"
