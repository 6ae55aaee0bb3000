"""DEEPGEMM: DeepGEMM's contiguous grouped GEMM, with Triton for the shapes it refuses."""

from __future__ import annotations

from fp8moe.backends.common import (
    DEEP_GEMM_NEEDS,
    AdapterNotWritten,
    deep_gemm_device,
    no_flashinfer_all2all,
    one_of,
)
from fp8moe.backends.triton_experts import TritonExperts
from fp8moe.config import FusedMoEActivationFormat
from fp8moe.schemes import BLOCK
from fp8moe.support import Support

DEEP_GEMM_ALONE = Support(
    device=deep_gemm_device,
    needs=DEEP_GEMM_NEEDS,
    scheme=one_of(BLOCK),
    activations=frozenset({"silu", "swiglustep"}),
    activation_format=FusedMoEActivationFormat.Standard,
    parallel=no_flashinfer_all2all,
)


class DeepGemmExperts(AdapterNotWritten):
    """DeepGEMM or Triton, decided per call on the shapes."""

    package = "deep_gemm"
    support = DEEP_GEMM_ALONE.and_fallback(TritonExperts.support)

    @staticmethod
    def activation_format() -> FusedMoEActivationFormat:
        return FusedMoEActivationFormat.Standard
