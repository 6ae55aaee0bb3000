"""BATCHED_VLLM_CUTLASS: vLLM's CUTLASS grouped GEMM over experts' batches."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fp8moe.backends.common import VLLM_CUTLASS_NEEDS, vllm_cutlass_device
from fp8moe.backends.cutlass_stages import CutlassStages
from fp8moe.backends.vllm_cutlass import CUTLASS_ACTIVATIONS, CUTLASS_SCHEMES, SCHEMES, SWAPPED_ROWS
from fp8moe.config import FusedMoEActivationFormat, FusedMoEConfig
from fp8moe.experts import MoEWeights
from fp8moe.quant import FusedMoEQuantConfig
from fp8moe.recipe import Steps
from fp8moe.registry import Fp8MoeBackend
from fp8moe.schemes import TENSOR_DYNAMIC
from fp8moe.support import Support

SIZES = "get_cutlass_batched_moe_mm_data"


class BatchedVllmCutlassExperts(CutlassStages):
    """vLLM's CUTLASS kernels, batched. A dynamic scale per tensor is each expert's own, since a batch is a tensor; the
    kernel takes it as a scale for each row. Batches are longer than they need be where all together would have so few
    rows that the kernel computed the transposed product, and rounded otherwise."""

    backend = Fp8MoeBackend.BATCHED_VLLM_CUTLASS
    support = Support(
        device=vllm_cutlass_device,
        needs=VLLM_CUTLASS_NEEDS,
        scheme=CUTLASS_SCHEMES,
        activations=CUTLASS_ACTIVATIONS,
        activation_format=FusedMoEActivationFormat.BatchedExperts,
    )
    schemes = SCHEMES
    more = (SIZES,)

    def __init__(self, config: FusedMoEConfig, quant: FusedMoEQuantConfig, weights: MoEWeights) -> None:
        super().__init__(config, quant, weights)
        recipe = replace(self.contract.recipe, dynamic_tensor_scope="expert")
        self.contract = replace(self.contract, recipe=recipe)
        if self.contract.steps is not None:
            steps = Steps(scale_order="weights_first", combine="slot_sum")
            shared = (quant.weight_key, quant.activation_key) == TENSOR_DYNAMIC  # with the batch's other tokens
            self.contract = replace(self.contract, steps=steps, batch_invariant=not shared)

    @staticmethod
    def activation_format() -> FusedMoEActivationFormat:
        return FusedMoEActivationFormat.BatchedExperts

    def apply_batched(self, hidden_states: Tensor, expert_num_tokens: Tensor) -> Tensor:
        experts, longest, hidden = hidden_states.shape
        if experts * longest == 0:
            return torch.empty_like(hidden_states)
        length = max(longest, SWAPPED_ROWS // experts + 1)
        rows, inter = experts * length, self.config.intermediate_size_per_partition

        def in_order(values: Tensor) -> Tensor:
            return values.view(experts, length, -1)[:, :longest]

        counts = expert_num_tokens.to(torch.int32).clamp(max=longest).contiguous()
        starts = counts.new_empty(experts)
        first, second = counts.new_empty(2, experts, 3)
        self.ops.get_cutlass_batched_moe_mm_data(starts, first, second, counts, experts, length, inter, hidden)
        offsets = starts.to(torch.int64)  # what the kernel reads, whatever the operator writes
        row = torch.arange(rows, dtype=torch.int32, device=counts.device).view(experts, length)
        present = torch.where(row % length < counts[:, None], row, -1)
        places = present[:, :longest].flatten().contiguous()  # flatten alone may give a view with a stride
        codes, scale = self.quantised_to(hidden_states.flatten(0, 1), places, places, rows)
        gate_up = hidden_states.new_empty(rows, 2 * inter)
        self.gemm(gate_up, codes, scale, "w13", offsets, first)
        self.show("first_gemm", gate_up, in_order)
        codes, scale = self.requantised(gate_up, places, present.flatten(), in_order)
        results = hidden_states.new_empty(rows, hidden)
        self.gemm(results, codes, scale, "w2", offsets, second)
        self.show("second_gemm", results, in_order)
        return in_order(results)

    def dynamic_scale(self, values: Tensor, present: Tensor | None) -> Tensor:
        """(E,), that of each batch: max(amax, floor) / 448, an IEEE division; NaN stays NaN."""
        assert present is not None
        amax = torch.where(present >= 0, values.abs().amax(-1).float(), 0.0)
        largest = amax.view(self.config.num_local_experts, -1).amax(1).clamp(min=self.contract.recipe.amax_floor)
        return largest / torch.full_like(largest, 448.0)  # not by a number, which torch may make a product
