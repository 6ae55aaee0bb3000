"""BATCHED_DEEPGEMM: DeepGEMM's masked grouped GEMM."""

from __future__ import annotations

import torch
from torch import Tensor

from fp8moe.backends.common import DEEP_GEMM_NEEDS, deep_gemm_device, one_of
from fp8moe.backends.deepgemm_stages import BY_DEEPGEMM, MULTIPLE, DeepGemmStages, pair_of
from fp8moe.backends.triton_stages import device_guard
from fp8moe.config import FusedMoEActivationFormat, FusedMoEConfig
from fp8moe.experts import MoEWeights
from fp8moe.quant import FusedMoEQuantConfig
from fp8moe.registry import BackendUnavailable, Fp8MoeBackend
from fp8moe.schemes import BLOCK
from fp8moe.support import Support

GEMM = "m_grouped_fp8_gemm_nt_masked"


class BatchedDeepGemmExperts(DeepGemmStages):
    """DeepGEMM over experts' batches."""

    backend = Fp8MoeBackend.BATCHED_DEEPGEMM
    contract = BY_DEEPGEMM
    support = Support(
        device=deep_gemm_device,
        needs=DEEP_GEMM_NEEDS,
        scheme=one_of(BLOCK),
        activations=frozenset({"silu"}),
        activation_format=FusedMoEActivationFormat.BatchedExperts,
    )
    names = (GEMM,)

    def __init__(self, config: FusedMoEConfig, quant: FusedMoEQuantConfig, weights: MoEWeights) -> None:
        super().__init__(config, quant, weights)
        inter = config.intermediate_size_per_partition
        sizes = {"hidden_dim": config.hidden_dim, "intermediate_size_per_partition": inter}
        wrong = [f"{name}={size}: expected a multiple of {MULTIPLE}" for name, size in sizes.items() if size % MULTIPLE]
        if wrong:
            raise BackendUnavailable(f"{type(self).__name__}: {'; '.join(wrong)}")

    @staticmethod
    def activation_format() -> FusedMoEActivationFormat:
        return FusedMoEActivationFormat.BatchedExperts

    def apply_batched(self, hidden_states: Tensor, expert_num_tokens: Tensor) -> Tensor:
        experts, longest, hidden = hidden_states.shape
        if experts * longest == 0:
            return torch.empty_like(hidden_states)
        counts = expert_num_tokens.to(torch.int32).contiguous()
        filled = torch.arange(longest, device=counts.device) < counts[:, None]
        present = (filled.to(torch.int32) - 1).flatten()
        a = self.quantised(hidden_states.reshape(-1, hidden).contiguous(), present)
        gate_up = self.gemm(a, "w13", counts, longest)
        a = self.quantised(self.activated(gate_up, present), present)
        return self.gemm(a, "w2", counts, longest).view(experts, longest, hidden)

    def gemm(self, a: tuple[Tensor, Tensor], name: str, counts: Tensor, longest: int) -> Tensor:
        """The first rows of each expert's batch times its w13 or w2, scaled, in bf16: (E * longest, rows of the
        weight); rows past a batch's count are left undefined."""
        matrix, _ = self.matrices[name]
        codes, scale = (part.view(len(counts), longest, -1) for part in a)
        out = matrix.new_empty(len(counts), longest, matrix.shape[1], dtype=torch.bfloat16)
        # The last argument decides the tiles alone; how many rows there are, only the device knows.
        with device_guard(out.device):
            getattr(self.deep_gemm, GEMM)(pair_of(codes, scale), self.matrices[name], out, counts, longest)
        return out.flatten(0, 1)
