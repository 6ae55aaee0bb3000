"""AITER: AMD's library on CDNA devices."""

from __future__ import annotations

from fp8moe.backends.common import AdapterNotWritten, no_flashinfer_all2all, one_of
from fp8moe.config import FusedMoEActivationFormat
from fp8moe.envs import Env
from fp8moe.platforms import Platform
from fp8moe.schemes import BLOCK, CHANNEL_TOKEN, TENSOR_DYNAMIC, TENSOR_STATIC, UNQUANTISED
from fp8moe.support import Support


def _device(platform: Platform, env: Env) -> bool:
    return platform.is_rocm_gfx9 and platform.has("aiter") and env.use_aiter_moe


class AiterExperts(AdapterNotWritten):
    """AITER's fused MoE."""

    package = "aiter"
    support = Support(
        device=_device,
        needs="ROCm on gfx90a, gfx942 or gfx950, the library aiter, and VLLM_ROCM_USE_AITER=1",
        scheme=one_of(UNQUANTISED, BLOCK, TENSOR_STATIC, TENSOR_DYNAMIC, CHANNEL_TOKEN),
        activations=frozenset({"silu", "gelu"}),
        activation_format=FusedMoEActivationFormat.Standard,
        parallel=no_flashinfer_all2all,
    )

    @staticmethod
    def activation_format() -> FusedMoEActivationFormat:
        return FusedMoEActivationFormat.Standard
