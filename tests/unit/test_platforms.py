"""Platforms: what a description refuses, what follows from it, and the catalogue."""

import copy
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fp8moe.platforms import LIBRARIES, PLATFORMS, Platform, detected_platform


@pytest.mark.parametrize(
    ("field", "arguments"),
    [
        ("kind", {"kind": ""}),
        ("kind", {"kind": None}),
        ("kind", {"kind": 9}),
        ("capability", {"kind": "cuda", "capability": 90}),
        ("capability", {"kind": "cuda", "capability": (9,)}),
        ("capability", {"kind": "cuda", "capability": (9, 0, 0)}),
        ("capability", {"kind": "cuda", "capability": ("9", "0")}),
        ("capability", {"kind": "cuda", "capability": (9.0, 0.0)}),
        ("capability", {"kind": "cuda", "capability": "90"}),
        ("cuda_version", {"kind": "cuda", "cuda_version": "12.9"}),
        ("cuda_version", {"kind": "cuda", "cuda_version": 12}),
        ("gcn_arch", {"kind": "rocm", "gcn_arch": 942}),
        ("libraries", {"kind": "cuda", "libraries": "flashinfer"}),
        ("libraries", {"kind": "cuda", "libraries": None}),
        ("libraries", {"kind": "cuda", "libraries": [1]}),
    ],
)
def test_refusals_name_the_field(field: str, arguments: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=rf"^Platform\.{field}=.*: expected "):
        Platform(**arguments)


def test_pairs_and_libraries_are_normalised() -> None:
    platform = Platform("cuda", [9, 0], None, [12, 9], ["vllm", "vllm"])
    assert platform == Platform("cuda", (9, 0), None, (12, 9), frozenset({"vllm"}))
    assert hash(platform) == hash(Platform("cuda", (9, 0), None, (12, 9), {"vllm"}))


def test_frozen_copied_pickled() -> None:
    platform = PLATFORMS["b200"]
    hash(platform)
    with pytest.raises(AttributeError):
        platform.kind = "rocm"  # type: ignore[misc]
    for twin in (copy.copy(platform), copy.deepcopy(platform), pickle.loads(pickle.dumps(platform))):
        assert twin == platform
        assert hash(twin) == hash(platform)
    assert b"_hash" not in pickle.dumps(platform)  # texts hash otherwise in another process


@given(st.integers(0, 20), st.integers(0, 9), st.sampled_from(("cuda", "rocm", "xpu", "cpu")))
def test_families(major: int, minor: int, kind: str) -> None:
    platform = Platform(kind, (major, minor))
    assert platform.cap == 10 * major + minor
    for family in range(0, 200, 10):
        assert platform.in_family(family) is (major * 10 == family)
        assert platform.is_cuda_family(family) is (major * 10 == family and kind == "cuda")
    assert platform.has_fp8_hardware is (kind == "cuda" and 10 * major + minor >= 89)
    assert platform.architecture == (f"sm{10 * major + minor}" if kind == "cuda" else kind)


def test_unknown_capability_is_in_no_family() -> None:
    platform = Platform("cuda")
    assert platform.cap is None
    assert not any(platform.in_family(family) for family in range(0, 200, 10))
    assert not platform.has_fp8_hardware
    assert platform.architecture == "cuda"


@pytest.mark.parametrize(
    ("arch", "gfx9", "fnuz"),
    [
        ("gfx90a", True, False),
        ("gfx942", True, True),
        ("gfx942:sramecc+:xnack-", True, True),
        ("gfx940", False, True),
        ("gfx950", True, False),
        ("gfx908", False, False),
        ("gfx1100", False, False),
        ("gfx1201", False, False),
        ("", False, False),
        (None, False, False),
    ],
)
def test_rocm_architectures(arch: str | None, gfx9: bool, fnuz: bool) -> None:
    platform = Platform("rocm", gcn_arch=arch)
    assert platform.is_rocm_gfx9 is gfx9
    assert platform.has_fp8_hardware is gfx9
    assert platform.uses_fnuz is fnuz
    elsewhere = Platform("cuda", gcn_arch=arch)
    assert not elsewhere.is_rocm_gfx9
    assert not elsewhere.uses_fnuz


def test_libraries_are_replaced_not_added() -> None:
    platform = PLATFORMS["h100"].with_libraries("aiter")
    assert platform.libraries == {"aiter"}
    assert platform.has("aiter")
    assert not platform.has("flashinfer")
    assert PLATFORMS["h100"].has("flashinfer")


def test_texts() -> None:
    assert str(PLATFORMS["h100"]) == "cuda sm90 (deep_gemm, flashinfer, vllm)"
    assert str(PLATFORMS["mi300x"]) == "rocm gfx942 (aiter, vllm)"
    assert str(PLATFORMS["cpu"]) == "cpu (no kernel libraries)"


def test_catalogue_is_wide() -> None:
    assert len(PLATFORMS) >= 16
    named = "t4 a100 l4 l40s h100 h200 b200 b300 rtx_pro_6000 mi210 mi300x mi325x mi355x pvc bmg cpu tpu"
    assert set(named.split()) <= set(PLATFORMS)
    capabilities = {platform.cap for platform in PLATFORMS.values() if platform.is_cuda}
    assert {75, 80, 89, 90, 100, 103, 110, 120} <= capabilities
    assert {"gfx90a", "gfx942", "gfx950"} <= {platform.gcn_arch for platform in PLATFORMS.values()}


@pytest.mark.parametrize("name", PLATFORMS)
def test_catalogue_entries_are_whole(name: str) -> None:
    platform = PLATFORMS[name]
    assert name == name.lower()
    assert platform.libraries <= set(LIBRARIES)
    expected = {
        "cuda": {"deep_gemm", "flashinfer", "vllm"},
        "rocm": {"aiter", "vllm"},
        "xpu": {"vllm_xpu_kernels"},
        "cpu": set(),
        "tpu": set(),
    }
    assert platform.libraries == expected[platform.kind]
    assert (platform.capability is not None) is platform.is_cuda
    assert (platform.cuda_version is not None) is platform.is_cuda
    assert (platform.gcn_arch is not None) is platform.is_rocm


def test_detected_platform_is_asked_once() -> None:
    assert detected_platform() is detected_platform()
    assert detected_platform() == Platform.detect()
