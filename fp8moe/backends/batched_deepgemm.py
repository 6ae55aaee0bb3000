"""BATCHED_DEEPGEMM: DeepGEMM's masked grouped GEMM, in both scale recipes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from fp8moe.backends.common import DEEP_GEMM_NEEDS, deep_gemm_device, one_of
from fp8moe.backends.deepgemm_stages import (
    ALIGNMENT,
    BY_DEEPGEMM,
    LAYOUT,
    DeepGemmStages,
    PowersOfTwo,
    by_powers_of_two,
)
from fp8moe.backends.triton_stages import device_guard
from fp8moe.config import FusedMoEActivationFormat, FusedMoEConfig
from fp8moe.experts import MoEWeights
from fp8moe.layouts.halves import multiple_of
from fp8moe.quant import FusedMoEQuantConfig
from fp8moe.recipe import Steps
from fp8moe.registry import Fp8MoeBackend
from fp8moe.schemes import BLOCK
from fp8moe.support import Support

GEMM = "m_grouped_fp8_gemm_nt_masked"
TILE_ROWS = 128
"""Of the largest tile. The kernel stores tiles whole: one that crosses a batch's end overwrites the next batch."""


class BatchedDeepGemmExperts(DeepGemmStages):
    """DeepGEMM over experts' batches."""

    backend = Fp8MoeBackend.BATCHED_DEEPGEMM
    contract = replace(BY_DEEPGEMM, steps=Steps(scale_order="product", combine="slot_sum"))
    support = Support(
        device=deep_gemm_device,
        needs=DEEP_GEMM_NEEDS,
        scheme=one_of(BLOCK),
        activations=frozenset({"silu"}),
        activation_format=FusedMoEActivationFormat.BatchedExperts,
    )
    names: ClassVar[tuple[str, ...]] = (GEMM,)
    variants: ClassVar[Mapping[str, str]] = {"E8M0 scales": f"{__name__}:BatchedDeepGemmE8M0Experts"}

    def __init__(self, config: FusedMoEConfig, quant: FusedMoEQuantConfig, weights: MoEWeights) -> None:
        super().__init__(config, quant, weights)
        self.check_sizes()
        self.matrices = self.matrices_of_layer()

    @staticmethod
    def activation_format() -> FusedMoEActivationFormat:
        return FusedMoEActivationFormat.BatchedExperts

    def apply_batched(self, hidden_states: Tensor, expert_num_tokens: Tensor) -> Tensor:
        experts, longest, _ = hidden_states.shape
        if experts * longest == 0:
            return torch.empty_like(hidden_states)
        rows = multiple_of(longest, TILE_ROWS)
        counts = expert_num_tokens.to(torch.int32).clamp(max=longest).contiguous()
        token = torch.arange(longest, dtype=torch.int32, device=counts.device)
        first = torch.arange(0, experts * rows, rows, dtype=torch.int32, device=counts.device)[:, None]
        places = torch.where(token < counts[:, None], first + token, -1).flatten()

        def given(values: Tensor) -> Tensor:
            return values.view(experts, rows, -1)[:, :longest]

        gate_up = self.gemm(self.quantised_to(hidden_states.flatten(0, 1), places, experts, rows), "w13", counts)
        self.show("first_gemm", gate_up, given)
        codes, scale = self.requantised(gate_up, places, given)
        results = self.gemm((codes, scale), "w2", counts)
        self.show("second_gemm", results, given)
        return given(results)

    def gemm(self, a: tuple[Tensor, Tensor], name: str, counts: Tensor) -> Tensor:
        """The first rows of each expert's batch times its w13 or w2, scaled, in bf16: (E, rows, rows of the weight);
        rows past a batch's count are left undefined."""
        matrix, _ = self.matrices[name]
        out = matrix.new_empty(*a[0].shape[:2], matrix.shape[1], dtype=torch.bfloat16)
        # The last argument decides the tiles: always the same, so that no later call compiles another kernel.
        with device_guard(out.device):
            getattr(self.deep_gemm, GEMM)(a, self.matrices[name], out, counts, TILE_ROWS)
        return out


class BatchedDeepGemmE8M0Experts(PowersOfTwo, BatchedDeepGemmExperts):
    """BATCHED_DEEPGEMM in its other recipe, E8M0.

    It is registered as no backend of its own:
    `fp8moe check fp8moe.backends.batched_deepgemm:BatchedDeepGemmE8M0Experts`.
    """

    contract = by_powers_of_two(BatchedDeepGemmExperts.contract)
    variants: ClassVar[Mapping[str, str]] = {}
    names = (GEMM, ALIGNMENT, LAYOUT)
