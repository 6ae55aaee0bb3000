"""BATCHED_TRITON: our Triton kernels over experts' batches."""

from __future__ import annotations

import torch
from torch import Tensor

from fp8moe.backends.triton_arithmetic import LARGE_TILE
from fp8moe.backends.triton_stages import TRITON_NEEDS, TritonStages, device_guard, triton_device, triton_scheme
from fp8moe.config import FusedMoEActivationFormat
from fp8moe.support import Support


class BatchedTritonExperts(TritonStages):
    """Triton kernels over (E, T, H): every scheme of its predicate, bf16 and fp16.

    All tiles have one height, whatever the batch, so that a token's bits do not depend on how many came with it
    (where no scale is dynamic per tensor, which is then each expert's own).
    """

    batched = True
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

    def apply_batched(self, hidden_states: Tensor, expert_num_tokens: Tensor) -> Tensor:
        from fp8moe.kernels.align import align_batches

        experts, longest, hidden = hidden_states.shape
        rows = experts * longest
        self.check_size(experts * -(-longest // LARGE_TILE))
        if rows == 0:
            return hidden_states.new_empty(experts, longest, hidden, dtype=torch.float32)
        with device_guard(hidden_states.device):
            alignment = align_batches(expert_num_tokens, longest, LARGE_TILE)
            expert = torch.arange(experts, device=hidden_states.device).repeat_interleave(longest)
            y = self.experts(hidden_states.reshape(rows, hidden), alignment, 1, expert)
        return y.view(experts, longest, hidden)
