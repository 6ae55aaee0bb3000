"""TRITON: our own Triton kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fp8moe.backends.common import no_flashinfer_all2all
from fp8moe.backends.triton_arithmetic import tile_height
from fp8moe.backends.triton_stages import TRITON_NEEDS, TritonStages, device_guard, triton_device, triton_scheme
from fp8moe.config import FusedMoEActivationFormat
from fp8moe.dispatch import weighted_input
from fp8moe.support import Support

if TYPE_CHECKING:
    from fp8moe.kernels.align import Alignment


class TritonExperts(TritonStages):
    """Triton kernels over tokens sorted by expert: every scheme and activation of its predicate, bf16 and fp16."""

    support = Support(
        device=triton_device,
        needs=TRITON_NEEDS,
        scheme=triton_scheme,
        activations=frozenset({"silu", "gelu", "swigluoai", "swiglustep"}),
        activation_format=FusedMoEActivationFormat.Standard,
        parallel=no_flashinfer_all2all,
    )

    @staticmethod
    def activation_format() -> FusedMoEActivationFormat:
        return FusedMoEActivationFormat.Standard

    def apply(
        self,
        hidden_states: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        *,
        expert_map: Tensor | None = None,
        apply_router_weight_on_input: bool = False,
        output: Tensor | None = None,
    ) -> Tensor:
        from fp8moe.kernels.align import most_tiles

        self.check_call(
            hidden_states,
            topk_weights,
            topk_ids,
            expert_map=expert_map,
            apply_router_weight_on_input=apply_router_weight_on_input,
            output=output,
        )
        pairs, experts = topk_ids.numel(), self.config.num_local_experts
        tile_rows = tile_height(pairs, self.config.num_experts)
        self.check_size(most_tiles(pairs, experts, tile_rows))
        if output is None:
            output = torch.empty_like(hidden_states, memory_format=torch.contiguous_format)
        if pairs == 0:
            return output.zero_()
        weights: Tensor | None = topk_weights
        if apply_router_weight_on_input:
            hidden_states, weights = weighted_input(hidden_states, topk_weights), None
        with device_guard(self.weights.w13.device):
            alignment, quantised = self.begin(hidden_states, topk_ids, tile_rows, expert_map)
            y = self.experts(hidden_states, alignment, topk_ids.shape[1], None, quantised)
            self.combine(y, alignment.local_ids, output, weights)
        self._show("combine", output)
        return output

    def begin(
        self, hidden_states: Tensor, topk_ids: Tensor, tile_rows: int, expert_map: Tensor | None
    ) -> tuple[Alignment, tuple[Tensor, Tensor] | None]:
        """The pairs' tiles; and the codes and scales of the hidden states, where few pairs let one launch make both,
        with the same bits."""
        from fp8moe.kernels.align import align_and_quantize, align_pairs
        from fp8moe.kernels.few import is_few

        given = (topk_ids, self.config.num_local_experts, tile_rows, expert_map)
        desc = self.quant.a1
        grouped = desc.dtype is not None and not desc.static and desc.shape is not None and desc.shape.is_per_group()
        few = is_few(topk_ids.numel(), self.config.num_local_experts)
        if grouped and few and type(self).quantize is TritonStages.quantize:
            return align_and_quantize(hidden_states, *given, amax_floor=self.contract.recipe.amax_floor)
        return align_pairs(*given), None

    def combine(self, y: Tensor, local_ids: Tensor, output: Tensor, weights: Tensor | None) -> None:
        """The weighted sum over a token's slots, (P, H) fp32 into (M, H)."""
        from fp8moe.kernels.reduce import weighted_sum

        weighted_sum(y, local_ids, output, weights)
