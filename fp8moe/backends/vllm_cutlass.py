"""VLLM_CUTLASS: vLLM's CUTLASS grouped GEMM, with Triton for few tokens on SM10x."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from fp8moe.backends.common import VLLM_CUTLASS_NEEDS, one_of, vllm_cutlass_device
from fp8moe.backends.cutlass_stages import CutlassStages
from fp8moe.backends.libraries import LibraryExperts
from fp8moe.backends.triton_experts import TritonExperts
from fp8moe.backends.triton_stages import device_guard
from fp8moe.config import FusedMoEActivationFormat, FusedMoEConfig, FusedMoEParallelConfig
from fp8moe.experts import FusedMoEPermuteExpertsUnpermute, MoEWeights
from fp8moe.quant import FusedMoEQuantConfig
from fp8moe.recipe import Steps
from fp8moe.registry import Fp8MoeBackend
from fp8moe.schemes import CHANNEL_TOKEN, TENSOR_DYNAMIC, TENSOR_STATIC
from fp8moe.support import Support

CUTLASS_ACTIVATIONS = frozenset({"silu", "gelu", "swigluoai"})
SCHEMES = (CHANNEL_TOKEN, TENSOR_DYNAMIC, TENSOR_STATIC)
CUTLASS_SCHEMES = one_of(*SCHEMES)
SIZES = "get_cutlass_moe_mm_problem_sizes_from_expert_offsets"
FEW_TOKENS = 8
"""On SM10x, up to so many go to Triton (specification section 2.4)."""
SWAPPED_ROWS = 64
"""Up to so many rows over all experts the kernel computes the transposed product, and takes sizes that way round."""


def _steps(pairs: int) -> Steps:
    return Steps(scale_order="activation_first" if pairs <= SWAPPED_ROWS else "weights_first")


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


class VllmCutlassExperts(CutlassStages, LibraryExperts):
    """vLLM's CUTLASS or Triton, decided per call on the number of tokens.

    With CUTLASS: both products and the sizes they are told are vLLM's operators, the rest our kernels.
    """

    backend = Fp8MoeBackend.VLLM_CUTLASS
    support = VLLM_CUTLASS_ALONE.and_fallback(TritonExperts.support)
    schemes = SCHEMES
    more = (SIZES,)

    def __init__(self, config: FusedMoEConfig, quant: FusedMoEQuantConfig, weights: MoEWeights) -> None:
        super().__init__(config, quant, weights)
        cap = self.platform().cap
        if self.contract.steps is not None:
            self.contract = replace(self.contract, steps=_steps)
        self.few: FusedMoEPermuteExpertsUnpermute | None = None
        if cap is not None and cap >= 100:
            self.few = self.fallback()
            self.contract = replace(self.contract, fewer=(FEW_TOKENS + 1, self.few.contract))

    def fallback(self) -> FusedMoEPermuteExpertsUnpermute:
        """What computes few tokens on SM10x."""
        return TritonExperts(self.config, self.quant, self.weights)

    def compute_pairs(
        self, hidden_states: Tensor, weights: Tensor, ids: Tensor, expert_map: Tensor | None, output: Tensor
    ) -> None:
        if self.few is not None and len(hidden_states) <= FEW_TOKENS:
            self.few.observe = self.observe
            self.few.apply(hidden_states, weights, ids, expert_map=expert_map, output=output)
            return
        from fp8moe.kernels.places import place_pairs

        rows, hidden, local = ids.numel(), hidden_states.shape[1], self.config.num_local_experts
        inter = self.config.intermediate_size_per_partition
        with device_guard(ids.device):
            placed = place_pairs(ids, local, rows, 1, expert_map, rows_of_owner=int(self.dynamic), places=True)
        offsets = placed.starts
        first, second = placed.places.new_empty(2, local, 3)
        swapped = rows <= SWAPPED_ROWS
        self.ops.get_cutlass_moe_mm_problem_sizes_from_expert_offsets(offsets, first, second, inter, hidden, swapped)

        def in_order(values: Tensor) -> Tensor:
            return values[placed.places.long().clamp(min=0)]

        codes, scale = self.quantised_to(hidden_states, placed.places, None, rows)
        gate_up = hidden_states.new_empty(rows, 2 * inter)
        self.gemm(gate_up, codes, scale, "w13", offsets[:-1], first)
        self.show("first_gemm", gate_up, in_order)
        codes, scale = self.requantised(gate_up, placed.places, placed.owners, in_order)
        results = hidden_states.new_empty(rows, hidden)
        self.gemm(results, codes, scale, "w2", offsets[:-1], second)
        self.show("second_gemm", results, in_order)
        self.combine(results, placed.places, output, weights)
