"""DEEPGEMM: DeepGEMM's contiguous grouped GEMM, with Triton for the shapes it refuses; with E8M0 scales, without."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from fp8moe.backends.common import (
    DEEP_GEMM_NEEDS,
    deep_gemm_device,
    no_flashinfer_all2all,
    one_of,
)
from fp8moe.backends.deepgemm_stages import (
    ALIGNMENT,
    BY_DEEPGEMM,
    LAYOUT,
    MULTIPLE,
    DeepGemmStages,
    PowersOfTwo,
    by_powers_of_two,
)
from fp8moe.backends.libraries import LibraryExperts
from fp8moe.backends.triton_experts import TritonExperts
from fp8moe.backends.triton_stages import device_guard
from fp8moe.config import FusedMoEActivationFormat, FusedMoEConfig
from fp8moe.experts import FusedMoEPermuteExpertsUnpermute, MoEWeights
from fp8moe.layouts.deepgemm import contiguous_rows
from fp8moe.quant import FusedMoEQuantConfig
from fp8moe.registry import Fp8MoeBackend
from fp8moe.schemes import BLOCK
from fp8moe.support import Support

DEEP_GEMM_ALONE = Support(
    device=deep_gemm_device,
    needs=DEEP_GEMM_NEEDS,
    scheme=one_of(BLOCK),
    activations=frozenset({"silu", "swiglustep"}),
    activation_format=FusedMoEActivationFormat.Standard,
    parallel=no_flashinfer_all2all,
)
GEMM = "m_grouped_fp8_gemm_nt_contiguous"
NARROW = 512
"""An intermediate size up to this goes to Triton (specification section 2.4)."""


@dataclass(frozen=True)
class ContiguousLayout:
    """Rows of the contiguous layout: each expert's pairs together, from a multiple of the alignment on.

    Args:
        expert: (rows,) int32 local ids, -1 where a row has no pair; such rows are never read.
        places: (M * k,) int32, the row of a pair; -1 where the pair has no expert here.
    """

    expert: Tensor
    places: Tensor

    def taken(self, values: Tensor) -> Tensor:
        """(rows, columns) to (M * k, columns), in the order of the pairs; any row for a pair without an expert here."""
        return values[self.places.long().clamp(min=0)]


class ContiguousDeepGemm(DeepGemmStages, LibraryExperts):
    """A layer by the contiguous grouped GEMM, in whichever scale recipe."""

    backend = Fp8MoeBackend.DEEPGEMM
    matrices: dict[str, tuple[Tensor, Tensor]]

    def compute_pairs(
        self, hidden_states: Tensor, weights: Tensor, ids: Tensor, expert_map: Tensor | None, output: Tensor
    ) -> None:
        layout = self.layout_of(ids, expert_map)
        gate_up = self.gemm(self.quantised_to(hidden_states, layout.places, len(layout.expert)), "w13", layout)
        self.show("first_gemm", gate_up, layout.taken)
        codes, scale = self.requantised(gate_up, layout.places, layout.taken)
        del gate_up
        results = self.gemm((codes, scale), "w2", layout)
        self.show("second_gemm", results, layout.taken)
        self.combine(results, layout.places, output, weights)

    def layout_of(self, ids: Tensor, expert_map: Tensor | None) -> ContiguousLayout:
        """Of (M, k) ids, whose number alone decides how many rows there are: nothing waits for the device."""
        from fp8moe.kernels.places import place_pairs

        experts, alignment = self.config.num_local_experts, self.alignment()
        rows = contiguous_rows(ids.numel(), experts, alignment)
        with device_guard(ids.device):
            placed = place_pairs(ids, experts, rows, alignment, expert_map, rows_of_owner=1, places=True)
        return ContiguousLayout(placed.owners, placed.places)

    def gemm(self, a: tuple[Tensor, Tensor], name: str, layout: ContiguousLayout) -> Tensor:
        """Each row times its expert's w13 or w2, scaled, in bf16: codes and scales with the rows next to each other, so
        that the library copies nothing. Rows without a pair are left undefined."""
        matrix, _ = self.matrices[name]
        out = matrix.new_empty(len(a[0]), matrix.shape[1], dtype=torch.bfloat16)
        with device_guard(out.device):
            getattr(self.deep_gemm, GEMM)(a, self.matrices[name], out, layout.expert)
        return out


class DeepGemmExperts(ContiguousDeepGemm):
    """DeepGEMM or Triton, by the layer's sizes and each call's number of tokens (specification section 2.4, E8M0 off).

    Hidden states that are not contiguous are copied first, where upstream takes Triton: what is declared of a call
    depends on its number of tokens alone.
    """

    support = DEEP_GEMM_ALONE.and_fallback(TritonExperts.support)
    names = (GEMM, ALIGNMENT)
    variants: ClassVar[Mapping[str, str]] = {"E8M0 scales": f"{__name__}:DeepGemmE8M0Experts"}

    def __init__(self, config: FusedMoEConfig, quant: FusedMoEQuantConfig, weights: MoEWeights) -> None:
        super().__init__(config, quant, weights)
        self.few = self.fallback()
        self.check_alignment()
        inter = config.intermediate_size_per_partition
        self.takes_layer = (
            inter > NARROW
            and inter % MULTIPLE == 0
            and config.hidden_dim % MULTIPLE == 0
            and weights.w13.is_contiguous()
            and weights.w2.is_contiguous()
        )
        self.contract = self.few.contract
        if self.takes_layer:
            self.matrices = self.matrices_of_layer()
            self.contract = replace(BY_DEEPGEMM, fewer=(MULTIPLE, self.few.contract))

    def fallback(self) -> FusedMoEPermuteExpertsUnpermute:
        """What computes the calls that DeepGEMM does not."""
        return TritonExperts(self.config, self.quant, self.weights)

    def compute_pairs(
        self, hidden_states: Tensor, weights: Tensor, ids: Tensor, expert_map: Tensor | None, output: Tensor
    ) -> None:
        if self.takes_layer and len(hidden_states) >= MULTIPLE:
            super().compute_pairs(hidden_states, weights, ids, expert_map, output)
            return
        self.few.observe = self.observe
        self.few.apply(hidden_states, weights, ids, expert_map=expert_map, output=output)


class DeepGemmE8M0Experts(PowersOfTwo, ContiguousDeepGemm):
    """DEEPGEMM in its other recipe, E8M0: every call is DeepGEMM's, without Triton (specification section 2.4).

    It is registered as no backend of its own: `fp8moe check fp8moe.backends.deepgemm:DeepGemmE8M0Experts`.
    """

    contract = by_powers_of_two(BY_DEEPGEMM)
    support = DEEP_GEMM_ALONE
    names = (GEMM, ALIGNMENT, LAYOUT)

    def __init__(self, config: FusedMoEConfig, quant: FusedMoEQuantConfig, weights: MoEWeights) -> None:
        super().__init__(config, quant, weights)
        self.matrices = self.matrices_of_layer()
