"""The devices that kernels are compiled for: the compiler's name of each, its limits, the platform it stands for."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass
from typing import Literal

from fp8moe.platforms import PLATFORMS, Platform

KIB = 1024


@dataclass(frozen=True)
class CompileTarget:
    """One architecture as Triton is asked for it.

    Args:
        name: "sm_90", "gfx942".
        backend: of Triton's `GPUTarget`.
        arch: likewise; an integer for NVIDIA.
        warp_size: threads of a warp, or of a wavefront.
        shared_bytes: the most shared memory (LDS) that one program may have.
        device: a device of `fp8moe.platforms.PLATFORMS` with this architecture.
        tensor_columns: columns of tensor memory that one program may have, 512 where the device has it.
        without_e4m3: the compiler itself has no e4m3 there, so it has to refuse a kernel that takes such tensors. Where
            False and the predicate refuses FP8 all the same, refusing is our class's affair alone.
    """

    name: str
    backend: Literal["cuda", "hip"]
    arch: int | str
    warp_size: int
    shared_bytes: int
    device: str
    tensor_columns: int = 0
    without_e4m3: bool = False

    @property
    def platform(self) -> Platform:
        """What the selector's predicates are asked about."""
        return PLATFORMS[self.device]


def _cuda(arch: int, shared_kib: int, device: str, *, tensor_memory: bool = False) -> CompileTarget:
    columns = 512 if tensor_memory else 0
    return CompileTarget(f"sm_{arch}", "cuda", arch, 32, shared_kib * KIB, device, columns, without_e4m3=arch < 89)


def _hip(arch: str, shared_kib: int, device: str, warp_size: int) -> CompileTarget:
    return CompileTarget(arch, "hip", arch, warp_size, shared_kib * KIB, device)


# Shared memory of a block: CUDA C++ programming guide, table of technical specifications by compute capability.
# LDS of a work-group: AMD's instruction set guides for CDNA 2, 3 and 4, RDNA 3 and 4.
_TABLE = (
    _cuda(75, 64, "t4"),
    _cuda(80, 163, "a100"),
    _cuda(86, 99, "a10"),
    _cuda(89, 99, "l40s"),
    _cuda(90, 227, "h100"),
    _cuda(100, 227, "b200", tensor_memory=True),
    _cuda(103, 227, "b300", tensor_memory=True),
    _cuda(110, 227, "thor", tensor_memory=True),
    _cuda(120, 99, "rtx5090"),
    _cuda(121, 99, "dgx_spark"),
    _hip("gfx90a", 64, "mi250x", 64),
    _hip("gfx942", 64, "mi300x", 64),
    _hip("gfx950", 160, "mi355x", 64),
    _hip("gfx1100", 64, "w7900", 32),
    _hip("gfx1201", 64, "r9700", 32),
)
TARGETS: dict[str, CompileTarget] = {target.name: target for target in _TABLE}
SUBSET = {"sm_90": "*", "sm_100": "*gemm_*", "gfx942": "gemm_*_16", "gfx950": "gemm_*"}
"""In every run: one target whole, the GEMMs of another matrix unit and another vendor; as patterns of kernel names. The
tall tiles of gfx942, which widens e4m3, are left to `all`: they take longer than everything else here."""


def pairs_of(mode: str, kernels: tuple[str, ...]) -> list[tuple[str, str]]:
    """(target, kernel) of `--fp8moe-compile`: "subset", "all" or "none"."""
    patterns = {"none": {}, "subset": SUBSET, "all": dict.fromkeys(TARGETS, "*")}[mode]
    return [(target, kernel) for target, pattern in patterns.items() for kernel in fnmatch.filter(kernels, pattern)]
