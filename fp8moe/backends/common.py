"""What several backends' predicates share."""

from __future__ import annotations

from collections.abc import Callable

from fp8moe.config import FusedMoEParallelConfig
from fp8moe.envs import Env
from fp8moe.keys import QuantKey
from fp8moe.platforms import Platform
from fp8moe.schemes import Scheme

SchemeCheck = Callable[[Platform, QuantKey | None, QuantKey | None], bool]


def one_of(*schemes: Scheme) -> SchemeCheck:
    """The same schemes on every device."""
    accepted = frozenset(schemes)
    return lambda _platform, weight_key, activation_key: (weight_key, activation_key) in accepted


def no_flashinfer_all2all(parallel: FusedMoEParallelConfig) -> bool:
    return not parallel.use_fi_all2allv_kernels


def deep_gemm_device(platform: Platform, env: Env) -> bool:
    """VLLM_USE_DEEP_GEMM's value first, then the library, then Hopper or SM10x."""
    return (
        env.use_deep_gemm
        and platform.has("deep_gemm")
        and platform.is_cuda
        and (platform.cap == 90 or platform.in_family(100))
    )


DEEP_GEMM_NEEDS = "CUDA SM90 or SM10x, the library deep_gemm, and VLLM_USE_DEEP_GEMM not 0"


def vllm_cutlass_device(platform: Platform, _env: Env) -> bool:
    """SM90 to SM109, with vLLM's operators compiled by a CUDA new enough for the architecture."""
    cap = platform.cap
    if not platform.is_cuda or cap is None or not 90 <= cap < 110 or not platform.has("vllm"):
        return False
    return (platform.cuda_version or (0, 0)) >= ((12, 8) if cap >= 100 else (12, 3))


VLLM_CUTLASS_NEEDS = "CUDA SM90 to SM109 and vLLM's operators built with CUDA 12.3 (SM9x) or 12.8 (SM10x)"
