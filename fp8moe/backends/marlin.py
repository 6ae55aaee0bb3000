"""MARLIN: vLLM's Marlin kernels; FP8 weights, 16-bit activations."""

from __future__ import annotations

from fp8moe.backends.common import AdapterNotWritten, no_flashinfer_all2all
from fp8moe.config import FusedMoEActivationFormat
from fp8moe.envs import Env
from fp8moe.keys import QuantKey, kFp8Static128BlockSym, kFp8StaticChannelSym, kFp8StaticTensorSym, kNvfp4Static
from fp8moe.platforms import Platform
from fp8moe.support import Support

_WEIGHTS = frozenset({kFp8Static128BlockSym, kFp8StaticChannelSym, kFp8StaticTensorSym, kNvfp4Static})


def _device(platform: Platform, _env: Env) -> bool:
    return platform.is_cuda and platform.cap is not None and platform.cap >= 75 and platform.has("vllm")


def _scheme(_platform: Platform, weight_key: QuantKey | None, _activation_key: QuantKey | None) -> bool:
    """The activation key is ignored: the activations stay in 16 bits (quirk Q15)."""
    return weight_key in _WEIGHTS


class MarlinExperts(AdapterNotWritten):
    """vLLM's Marlin MoE."""

    package = "vllm"
    support = Support(
        device=_device,
        needs="CUDA SM75 or newer and vLLM's operators",
        scheme=_scheme,
        activations=frozenset({"silu", "gelu", "swigluoai", "silu_no_mul", "gelu_no_mul", "relu2_no_mul"}),
        activation_format=FusedMoEActivationFormat.Standard,
        parallel=no_flashinfer_all2all,
        non_gated=True,
    )

    @staticmethod
    def activation_format() -> FusedMoEActivationFormat:
        return FusedMoEActivationFormat.Standard
