"""VLLM_CUTLASS: vLLM's CUTLASS grouped GEMM, with Triton for few tokens on SM10x."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from fp8moe.backends.common import VLLM_CUTLASS_NEEDS, one_of, vllm_cutlass_device
from fp8moe.backends.cutlass_stages import CutlassStages
from fp8moe.backends.libraries import LibraryCall, LibraryExperts, by_fallback
from fp8moe.backends.triton_experts import TritonExperts
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
PERMUTE = ("moe_permute", "moe_unpermute")
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

    With CUTLASS: activations are quantised, gathered by expert, multiplied, activated, quantised again, multiplied, and
    summed up. Gathering, products and sums are vLLM's operators, the rest our kernels.
    """

    backend = Fp8MoeBackend.VLLM_CUTLASS
    support = VLLM_CUTLASS_ALONE.and_fallback(TritonExperts.support)
    schemes = SCHEMES
    more: ClassVar[dict[str, tuple[str, ...]]] = {"_C": (SIZES,), "_moe_C": PERMUTE}

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

    def compute(self, call: LibraryCall, output: Tensor) -> None:
        if self.few is not None and len(call.hidden_states) <= FEW_TOKENS:
            by_fallback(self.few, call, output, self.observe)
            return
        (tokens, hidden), top_k = call.hidden_states.shape, call.ids.shape[1]
        rows, local = tokens * top_k, self.config.num_local_experts
        inter = self.config.intermediate_size_per_partition
        placed, ids = call.expert_map, call.ids
        codes, scale = self.quantised(call.hidden_states, self.weights.a13_scale)
        taken = codes.new_empty(rows, hidden)
        offsets = ids.new_empty(local + 1, dtype=torch.int64)
        places, pairs = torch.empty_like(ids), ids.new_full((rows,), rows)
        numbers = torch.arange(rows, dtype=torch.int32, device=ids.device).view(tokens, top_k)
        experts = local if placed is None else placed.numel()
        self.ops.moe_permute(codes, ids, numbers, placed, experts, local, top_k, taken, offsets, places, pairs)
        pair = pairs.clamp(max=rows - 1).long()  # rows without an expert here hold none
        if self.per_token:
            scale = scale[pair // top_k]
        here = (pairs < rows) & call.present.flatten()[pair]
        present = here.to(torch.int32) - 1
        first, second = ids.new_empty(local, 3), ids.new_empty(local, 3)
        swapped = rows <= SWAPPED_ROWS
        self.ops.get_cutlass_moe_mm_problem_sizes_from_expert_offsets(offsets, first, second, inter, hidden, swapped)
        gate_up = call.hidden_states.new_empty(rows, 2 * inter)
        self.gemm(gate_up, taken, scale, "w13", offsets[:-1], first)

        def in_order(values: Tensor) -> Tensor:
            return values[places.flatten().long()]

        self.show("first_gemm", gate_up, in_order)
        values = self.activated(gate_up, present)
        self.show("activation", values, in_order)
        codes, scale = self.quantised(values, self.weights.a2_scale, present)
        self.show("requantisation", codes, in_order)
        results = call.hidden_states.new_empty(rows, hidden)
        self.gemm(results, codes, scale, "w2", offsets[:-1], second)
        self.show("second_gemm", results, in_order)
        # An absent pair's row may hold NaN, which a weight of 0 does not hide: as of no expert here, it is not read.
        places.masked_fill_(~call.present, rows)
        self.ops.moe_unpermute(results, call.weights, places, offsets, top_k, output)
