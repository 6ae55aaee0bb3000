"""How a device check is changed: narrowed, widened, or asked about another platform."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from fp8moe import Platform
from fp8moe.envs import Env

Device = Callable[[Platform, Env], bool]
CUTLASS = ("VLLM_CUTLASS", "BATCHED_VLLM_CUTLASS")
DEEP_GEMM = ("DEEPGEMM", "BATCHED_DEEPGEMM")
TRITON = ("TRITON", "BATCHED_TRITON")


def only(condition: Callable[[Platform], bool]) -> Callable[[Device], Device]:
    """The device check, and one more condition."""
    return lambda device: lambda platform, env: device(platform, env) and condition(platform)


def also(condition: Callable[[Platform], bool]) -> Callable[[Device], Device]:
    """The device check, or another condition."""
    return lambda device: lambda platform, env: device(platform, env) or condition(platform)


def as_if(change: Callable[[Platform], Platform]) -> Callable[[Device], Device]:
    """The device check of another platform than the one that is there."""
    return lambda device: lambda platform, env: device(change(platform), env)


def with_library(name: str) -> Callable[[Device], Device]:
    """The device check as if a library were there."""
    return as_if(lambda platform: replace(platform, libraries=platform.libraries | {name}))


def with_toolkit(change: Callable[[Platform], tuple[int, int] | None]) -> Callable[[Device], Device]:
    """The device check as if the kernels were compiled with another CUDA."""
    return as_if(lambda platform: replace(platform, cuda_version=change(platform)))


def cap(platform: Platform) -> int:
    return -1 if platform.cap is None else platform.cap
