"""BATCHED_VLLM_CUTLASS: vLLM's CUTLASS grouped GEMM over experts' batches."""

from __future__ import annotations

from fp8moe.backends.common import VLLM_CUTLASS_NEEDS, AdapterNotWritten, vllm_cutlass_device
from fp8moe.backends.vllm_cutlass import CUTLASS_ACTIVATIONS, CUTLASS_SCHEMES
from fp8moe.config import FusedMoEActivationFormat
from fp8moe.support import Support


class BatchedVllmCutlassExperts(AdapterNotWritten):
    """vLLM's CUTLASS kernels, batched."""

    package = "vllm"
    support = Support(
        device=vllm_cutlass_device,
        needs=VLLM_CUTLASS_NEEDS,
        scheme=CUTLASS_SCHEMES,
        activations=CUTLASS_ACTIVATIONS,
        activation_format=FusedMoEActivationFormat.BatchedExperts,
    )

    @staticmethod
    def activation_format() -> FusedMoEActivationFormat:
        return FusedMoEActivationFormat.BatchedExperts
