"""FLASHINFER_CUTLASS: FlashInfer's CUTLASS fused MoE."""

from __future__ import annotations

from fp8moe.backends.common import AdapterNotWritten
from fp8moe.config import FusedMoEActivationFormat
from fp8moe.envs import Env
from fp8moe.keys import QuantKey
from fp8moe.platforms import Platform
from fp8moe.schemes import BLOCK, NVFP4, TENSOR_STATIC, UNQUANTISED
from fp8moe.support import Support


def _device(platform: Platform, _env: Env) -> bool:
    families = (100, 110, 120)
    return (
        platform.is_cuda
        and (platform.cap == 90 or any(platform.in_family(family) for family in families))
        and platform.has("flashinfer")
    )


def _scheme(platform: Platform, weight_key: QuantKey | None, activation_key: QuantKey | None) -> bool:
    scheme, cap = (weight_key, activation_key), platform.cap
    if not platform.is_cuda or cap is None:
        return False
    return (
        (scheme in (UNQUANTISED, TENSOR_STATIC) and cap >= 90)
        or (scheme == BLOCK and cap == 90)
        or (scheme == NVFP4 and cap >= 100)
    )


class FlashInferCutlassExperts(AdapterNotWritten):
    """FlashInfer's CUTLASS fused MoE."""

    package = "flashinfer"
    support = Support(
        device=_device,
        needs="CUDA SM90, SM10x, SM11x or SM12x, and a FlashInfer whose fused MoE can be used",
        scheme=_scheme,
        activations=frozenset({"silu", "relu2_no_mul"}),
        activation_format=FusedMoEActivationFormat.Standard,
        parallel=lambda parallel: not parallel.is_sequence_parallel,
        non_gated=True,
    )

    @staticmethod
    def activation_format() -> FusedMoEActivationFormat:
        return FusedMoEActivationFormat.Standard
