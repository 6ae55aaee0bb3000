"""XPU: Intel's kernels."""

from __future__ import annotations

from fp8moe.backends.common import AdapterNotWritten, one_of
from fp8moe.config import FusedMoEActivationFormat
from fp8moe.schemes import TENSOR_DYNAMIC, TENSOR_NONE, UNQUANTISED
from fp8moe.support import Support


class XpuExperts(AdapterNotWritten):
    """Intel XPU's fused MoE."""

    package = "vllm_xpu_kernels"
    support = Support(
        device=lambda platform, _env: platform.kind == "xpu",
        needs="an Intel XPU",
        scheme=one_of(UNQUANTISED, TENSOR_NONE, TENSOR_DYNAMIC),
        activations=frozenset({"silu", "gelu", "swigluoai"}),
        activation_format=FusedMoEActivationFormat.Standard,
    )

    @staticmethod
    def activation_format() -> FusedMoEActivationFormat:
        return FusedMoEActivationFormat.Standard
