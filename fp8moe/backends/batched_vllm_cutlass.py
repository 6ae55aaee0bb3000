"""BATCHED_VLLM_CUTLASS: vLLM's CUTLASS grouped GEMM over experts' batches."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from fp8moe.backends.common import VLLM_CUTLASS_NEEDS, vllm_cutlass_device
from fp8moe.backends.cutlass_stages import CutlassStages
from fp8moe.backends.vllm_cutlass import CUTLASS_ACTIVATIONS, CUTLASS_SCHEMES
from fp8moe.config import FusedMoEActivationFormat
from fp8moe.registry import Fp8MoeBackend
from fp8moe.schemes import CHANNEL_TOKEN, TENSOR_STATIC
from fp8moe.support import Support

SIZES = "get_cutlass_batched_moe_mm_data"


class BatchedVllmCutlassExperts(CutlassStages):
    """vLLM's CUTLASS kernels, batched. A dynamic scale per tensor is refused: the kernel takes one for all experts, and
    a batch is one expert's tensor."""

    backend = Fp8MoeBackend.BATCHED_VLLM_CUTLASS
    support = Support(
        device=vllm_cutlass_device,
        needs=VLLM_CUTLASS_NEEDS,
        scheme=CUTLASS_SCHEMES,
        activations=CUTLASS_ACTIVATIONS,
        activation_format=FusedMoEActivationFormat.BatchedExperts,
    )
    schemes = (CHANNEL_TOKEN, TENSOR_STATIC)
    more: ClassVar[dict[str, tuple[str, ...]]] = {"_C": (SIZES,)}

    @staticmethod
    def activation_format() -> FusedMoEActivationFormat:
        return FusedMoEActivationFormat.BatchedExperts

    def apply_batched(self, hidden_states: Tensor, expert_num_tokens: Tensor) -> Tensor:
        experts, longest, hidden = hidden_states.shape
        rows, inter = experts * longest, self.config.intermediate_size_per_partition
        if rows == 0:
            return torch.empty_like(hidden_states)
        counts = expert_num_tokens.to(torch.int32)
        starts = counts.new_empty(experts)
        first, second = counts.new_empty(experts, 3), counts.new_empty(experts, 3)
        self.ops.get_cutlass_batched_moe_mm_data(starts, first, second, counts, experts, longest, inter, hidden)
        offsets = starts.to(torch.int64)  # what the kernel reads, whatever the operator writes
        codes, scale = self.quantised(hidden_states.reshape(rows, hidden).contiguous(), self.weights.a13_scale)
        gate_up = hidden_states.new_empty(rows, 2 * inter)
        self.gemm(gate_up, codes, scale, "w13", offsets, first)
        codes, scale = self.quantised(self.activated(gate_up), self.weights.a2_scale)
        results = hidden_states.new_empty(rows, hidden)
        self.gemm(results, codes, scale, "w2", offsets, second)
        return results.view(experts, longest, hidden)
