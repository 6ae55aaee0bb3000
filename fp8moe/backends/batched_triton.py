"""BATCHED_TRITON: our Triton kernels over experts' batches."""

from __future__ import annotations

from fp8moe.backends.common import AdapterNotWritten
from fp8moe.backends.triton_experts import TRITON_NEEDS, triton_device, triton_scheme
from fp8moe.config import FusedMoEActivationFormat
from fp8moe.support import Support


class BatchedTritonExperts(AdapterNotWritten):
    """Triton, batched."""

    package = "Triton's batched kernels"
    support = Support(
        device=triton_device,
        needs=TRITON_NEEDS,
        scheme=triton_scheme,
        activations=frozenset({"silu", "gelu", "swigluoai", "silu_no_mul", "gelu_no_mul", "relu2_no_mul"}),
        activation_format=FusedMoEActivationFormat.BatchedExperts,
    )

    @staticmethod
    def activation_format() -> FusedMoEActivationFormat:
        return FusedMoEActivationFormat.BatchedExperts
