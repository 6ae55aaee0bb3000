"""BATCHED_DEEPGEMM: DeepGEMM's masked grouped GEMM."""

from __future__ import annotations

from fp8moe.backends.common import DEEP_GEMM_NEEDS, AdapterNotWritten, deep_gemm_device, one_of
from fp8moe.config import FusedMoEActivationFormat
from fp8moe.schemes import BLOCK
from fp8moe.support import Support


class BatchedDeepGemmExperts(AdapterNotWritten):
    """DeepGEMM over experts' batches."""

    package = "deep_gemm"
    support = Support(
        device=deep_gemm_device,
        needs=DEEP_GEMM_NEEDS,
        scheme=one_of(BLOCK),
        activations=frozenset({"silu"}),
        activation_format=FusedMoEActivationFormat.BatchedExperts,
    )

    @staticmethod
    def activation_format() -> FusedMoEActivationFormat:
        return FusedMoEActivationFormat.BatchedExperts
