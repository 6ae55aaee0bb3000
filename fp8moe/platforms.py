"""Platforms: what a device and its libraries are, as plain data; detection; a catalogue of real devices."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import lru_cache

from fp8moe.frozen import hash_once, state_without_derived

LIBRARIES = ("deep_gemm", "flashinfer", "aiter", "vllm", "vllm_xpu_kernels")


@dataclass(frozen=True)
class Platform:
    """A device and the kernel libraries beside it; frozen, hashable, and enough to answer every support question.

    Args:
        kind: "cuda", "rocm", "xpu", "cpu", "tpu" or any other name.
        capability: CUDA compute capability (major, minor), or None.
        gcn_arch: ROCm architecture name, such as "gfx942" or "gfx942:sramecc+:xnack-".
        cuda_version: (major, minor) that the kernels are compiled with; None counts as too old.
        libraries: names of `LIBRARIES` (or a vendor's own) that can be used; "flashinfer" stands for the whole
            probe of the specification's section 2.3, "vllm" for vLLM's compiled operators.

    Raises:
        ValueError: a capability or CUDA version that is no pair of integers, an empty kind.
    """

    kind: str
    capability: tuple[int, int] | None = None
    gcn_arch: str | None = None
    cuda_version: tuple[int, int] | None = None
    libraries: frozenset[str] = field(default_factory=frozenset)

    __hash__ = hash_once
    __getstate__ = state_without_derived

    def __post_init__(self) -> None:
        if not isinstance(self.kind, str) or not self.kind:
            raise ValueError(f"Platform.kind={self.kind!r}: expected a name such as 'cuda', 'rocm', 'xpu', 'cpu'")
        for name in ("capability", "cuda_version"):
            value = getattr(self, name)
            if value is None:
                continue
            pair = tuple(value) if isinstance(value, (tuple, list)) else ()
            if len(pair) != 2 or not all(isinstance(part, int) for part in pair):
                raise ValueError(f"Platform.{name}={value!r}: expected (major, minor), such as (9, 0)")
            object.__setattr__(self, name, pair)
        if self.gcn_arch is not None and not isinstance(self.gcn_arch, str):
            raise ValueError(f"Platform.gcn_arch={self.gcn_arch!r}: expected a name such as 'gfx942', or None")
        libraries = (
            None
            if isinstance(self.libraries, str) or not isinstance(self.libraries, Iterable)
            else frozenset(self.libraries)
        )
        if libraries is None or not all(isinstance(library, str) for library in libraries):
            raise ValueError(
                f"Platform.libraries={self.libraries!r}: expected a set of names, such as {{'flashinfer'}}"
            )
        object.__setattr__(self, "libraries", libraries)

    @property
    def cap(self) -> int | None:
        """10 * major + minor, or None where the capability is unknown."""
        return None if self.capability is None else 10 * self.capability[0] + self.capability[1]

    @property
    def is_cuda(self) -> bool:
        return self.kind == "cuda"

    @property
    def is_rocm(self) -> bool:
        return self.kind == "rocm"

    def is_cuda_family(self, family: int) -> bool:
        """CUDA and capability `family` to `family + 9`: 100 stands for SM100 to SM109."""
        return self.is_cuda and self.in_family(family)

    def in_family(self, family: int) -> bool:
        """Capability `family` to `family + 9`, whatever the kind."""
        return self.cap is not None and self.cap // 10 == family // 10

    def has_gcn_arch(self, *names: str) -> bool:
        """ROCm and one of `names` is part of the architecture's name (a substring test, as upstream)."""
        return self.is_rocm and any(name in (self.gcn_arch or "") for name in names)

    @property
    def is_rocm_gfx9(self) -> bool:
        """The CDNA devices that AITER and the FP8 kernels know."""
        return self.has_gcn_arch("gfx90a", "gfx942", "gfx950")

    @property
    def has_fp8_hardware(self) -> bool:
        """FP8 as the specification counts it (section 2.0); gfx90a is in, though it has no FP8 matrix unit."""
        return self.is_rocm_gfx9 or (self.is_cuda and self.cap is not None and self.cap >= 89)

    @property
    def uses_fnuz(self) -> bool:
        """FP8 tensors on this device are e4m3fnuz: a matter of weight conversion, never of selection."""
        return self.has_gcn_arch("gfx94")

    def has(self, library: str) -> bool:
        return library in self.libraries

    def with_libraries(self, *names: str) -> Platform:
        """The same device with exactly these libraries."""
        return replace(self, libraries=frozenset(names))

    @property
    def architecture(self) -> str:
        """Short name of the architecture: "sm90", "gfx942", or the kind."""
        if self.is_cuda and self.cap is not None:
            return f"sm{self.cap}"
        return self.gcn_arch or self.kind

    def __str__(self) -> str:
        libraries = ", ".join(sorted(self.libraries)) or "no kernel libraries"
        return (
            f"{self.kind} {self.architecture} ({libraries})"
            if self.architecture != self.kind
            else (f"{self.kind} ({libraries})")
        )

    @staticmethod
    def detect() -> Platform:
        """The device that torch sees first, and the libraries that can be found beside it; asks anew at each call."""
        from fp8moe.detection import detect_platform

        return detect_platform()


@lru_cache(maxsize=1)
def detected_platform() -> Platform:
    """`Platform.detect()`, asked once a process."""
    return Platform.detect()


def _cuda(major: int, minor: int) -> Platform:
    """CUDA with a full install: kernels built with CUDA 12.9."""
    return Platform("cuda", (major, minor), None, (12, 9), frozenset({"deep_gemm", "flashinfer", "vllm"}))


def _rocm(gcn_arch: str) -> Platform:
    return Platform("rocm", None, gcn_arch, None, frozenset({"aiter", "vllm"}))


PLATFORMS: dict[str, Platform] = {
    # NVIDIA
    "t4": _cuda(7, 5),
    "a100": _cuda(8, 0),
    "a10": _cuda(8, 6),
    "l4": _cuda(8, 9),
    "l40s": _cuda(8, 9),
    "rtx4090": _cuda(8, 9),
    "h100": _cuda(9, 0),
    "h200": _cuda(9, 0),
    "gh200": _cuda(9, 0),
    "b200": _cuda(10, 0),
    "gb200": _cuda(10, 0),
    "b300": _cuda(10, 3),
    "thor": _cuda(11, 0),
    "rtx5090": _cuda(12, 0),
    "rtx_pro_6000": _cuda(12, 0),
    "dgx_spark": _cuda(12, 1),
    # AMD
    "mi210": _rocm("gfx90a"),
    "mi250x": _rocm("gfx90a"),
    "mi300x": _rocm("gfx942"),
    "mi325x": _rocm("gfx942"),
    "mi355x": _rocm("gfx950"),
    "w7900": _rocm("gfx1100"),
    "r9700": _rocm("gfx1201"),
    # Intel
    "pvc": Platform("xpu", libraries=frozenset({"vllm_xpu_kernels"})),
    "bmg": Platform("xpu", libraries=frozenset({"vllm_xpu_kernels"})),
    # no GPU
    "cpu": Platform("cpu"),
    "tpu": Platform("tpu"),
}
