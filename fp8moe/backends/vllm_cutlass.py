"""VLLM_CUTLASS: vLLM's CUTLASS grouped GEMM, with Triton for few tokens on SM10x."""

from __future__ import annotations

from fp8moe.backends.common import VLLM_CUTLASS_NEEDS, AdapterNotWritten, one_of, vllm_cutlass_device
from fp8moe.backends.triton_experts import TritonExperts
from fp8moe.config import FusedMoEActivationFormat, FusedMoEParallelConfig
from fp8moe.schemes import CHANNEL_TOKEN, TENSOR_DYNAMIC, TENSOR_STATIC
from fp8moe.support import Support

CUTLASS_ACTIVATIONS = frozenset({"silu", "gelu", "swigluoai"})
CUTLASS_SCHEMES = one_of(CHANNEL_TOKEN, TENSOR_DYNAMIC, TENSOR_STATIC)


def _parallel(parallel: FusedMoEParallelConfig) -> bool:
    return not (parallel.use_fi_all2allv_kernels or parallel.use_deepep_ht_kernels)


VLLM_CUTLASS_ALONE = Support(
    device=vllm_cutlass_device,
    needs=VLLM_CUTLASS_NEEDS,
    scheme=CUTLASS_SCHEMES,
    activations=CUTLASS_ACTIVATIONS,
    activation_format=FusedMoEActivationFormat.Standard,
    parallel=_parallel,
)


class VllmCutlassExperts(AdapterNotWritten):
    """vLLM's CUTLASS or Triton, decided per call on the number of tokens."""

    package = "vllm"
    support = VLLM_CUTLASS_ALONE.and_fallback(TritonExperts.support)

    @staticmethod
    def activation_format() -> FusedMoEActivationFormat:
        return FusedMoEActivationFormat.Standard
