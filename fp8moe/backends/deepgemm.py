"""DEEPGEMM: DeepGEMM's contiguous grouped GEMM, with Triton for the shapes it refuses."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fp8moe.backends.common import (
    DEEP_GEMM_NEEDS,
    deep_gemm_device,
    no_flashinfer_all2all,
    one_of,
)
from fp8moe.backends.deepgemm_stages import BY_DEEPGEMM, MULTIPLE, DeepGemmStages, pair_of
from fp8moe.backends.libraries import LibraryCall, LibraryExperts, by_fallback
from fp8moe.backends.triton_experts import TritonExperts
from fp8moe.backends.triton_stages import device_guard
from fp8moe.config import FusedMoEActivationFormat, FusedMoEConfig
from fp8moe.dispatch import places_by_expert
from fp8moe.experts import FusedMoEPermuteExpertsUnpermute, MoEWeights
from fp8moe.layouts.deepgemm import contiguous_rows
from fp8moe.quant import FusedMoEQuantConfig
from fp8moe.registry import BackendUnavailable, Fp8MoeBackend
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
ALIGNMENT = "get_mk_alignment_for_contiguous_layout"
NARROW = 512
"""An intermediate size up to this goes to Triton (specification section 2.4)."""


@dataclass(frozen=True)
class ContiguousLayout:
    """Rows of the contiguous layout: each expert's pairs together, from a multiple of the alignment on.

    Args:
        expert: (rows,) int32 local ids, -1 where a row has no pair; such rows are never read.
        row: (M * k,) int64, the row of a pair; one past the last where the pair has no expert here.
        local: (M * k,) int32 local ids, -1 for a pair without an expert here.
    """

    expert: Tensor
    row: Tensor
    local: Tensor

    @classmethod
    def of(cls, local: Tensor, experts: int, alignment: int) -> ContiguousLayout:
        """
        Args:
            local: (M, k) local ids, -1 where absent. Their number alone decides how many rows there are, so that
                nothing waits for the device.
        """
        flat = local.reshape(-1).long()
        rows = contiguous_rows(flat.numel(), experts, alignment)
        within, counts = places_by_expert(flat, experts)
        whole = (counts.long() + alignment - 1) // alignment * alignment
        starts = whole.cumsum(0) - whole
        place = torch.where(flat < 0, rows, starts[flat.clamp(min=0)] + within)
        expert = flat.new_full((rows + 1,), -1, dtype=torch.int32)
        expert[place] = flat.to(torch.int32)
        return cls(expert[:rows], place, flat.to(torch.int32))

    def placed(self, values: Tensor) -> Tensor:
        """(M, columns) to (rows, columns): each pair's row its token's; rows without a pair are left undefined."""
        found = values.new_empty(len(self.expert) + 1, values.shape[1])
        found[self.row] = values.repeat_interleave(len(self.row) // len(values), dim=0)
        return found[:-1]

    def taken(self, values: Tensor) -> Tensor:
        """(rows, columns) to (M * k, columns), in the order of the pairs; any row for a pair without an expert here."""
        return values[self.row.clamp(max=len(values) - 1)]


class DeepGemmExperts(DeepGemmStages, LibraryExperts):
    """DeepGEMM or Triton, by the layer's sizes and each call's number of tokens (specification section 2.4, E8M0 off).

    Hidden states that are not contiguous are copied first, where upstream takes Triton: what is declared of a call
    depends on its number of tokens alone.
    """

    backend = Fp8MoeBackend.DEEPGEMM
    support = DEEP_GEMM_ALONE.and_fallback(TritonExperts.support)
    names = (GEMM, ALIGNMENT)

    def __init__(self, config: FusedMoEConfig, quant: FusedMoEQuantConfig, weights: MoEWeights) -> None:
        super().__init__(config, quant, weights)
        self.few = self.fallback()
        alignment = self.alignment()
        if alignment != MULTIPLE:
            remedy = f"deep_gemm.set_mk_alignment_for_contiguous_layout({MULTIPLE}) before layers are made"
            raise BackendUnavailable(f"{type(self).__name__}: {ALIGNMENT}() is {alignment}: call {remedy}")
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

    def alignment(self) -> int:
        """Of an expert's first row, as the library has it at present: it is one number for the whole process."""
        return int(getattr(self.deep_gemm, ALIGNMENT)())

    def fallback(self) -> FusedMoEPermuteExpertsUnpermute:
        """What computes the calls that DeepGEMM does not."""
        return TritonExperts(self.config, self.quant, self.weights)

    def compute(self, call: LibraryCall, output: Tensor) -> None:
        if not self.takes_layer or len(call.hidden_states) < MULTIPLE:
            by_fallback(self.few, call, output, self.observe)
            return
        ids = call.ids.long()
        local = ids if call.expert_map is None else call.expert_map.long()[ids]
        local = local.masked_fill(~call.present, -1)
        layout = ContiguousLayout.of(local, self.config.num_local_experts, self.alignment())
        codes, scale = self.quantised(call.hidden_states, None)
        placed = layout.placed(codes.view(torch.uint8)).view(codes.dtype)
        gate_up = self.gemm(pair_of(placed, layout.placed(scale)), "w13", layout)
        self.show("first_gemm", gate_up, layout.taken)
        values = self.activated(gate_up, layout.expert)
        del gate_up
        self.show("activation", values, layout.taken)
        codes, scale = self.quantised(values, layout.expert)
        self.show("requantisation", codes, layout.taken)
        results = layout.taken(self.gemm(pair_of(codes, scale), "w2", layout))
        self.show("second_gemm", results, lambda pairs: pairs)
        self.combine(results, layout.local, output, call.weights)

    def gemm(self, a: tuple[Tensor, Tensor], name: str, layout: ContiguousLayout) -> Tensor:
        """Each row times its expert's w13 or w2, scaled, in bf16; rows without a pair are left undefined."""
        matrix, _ = self.matrices[name]
        out = matrix.new_empty(len(a[0]), matrix.shape[1], dtype=torch.bfloat16)
        with device_guard(out.device):
            getattr(self.deep_gemm, GEMM)(a, self.matrices[name], out, layout.expert)
        return out

    def combine(self, results: Tensor, local: Tensor, output: Tensor, weights: Tensor) -> None:
        """The weighted sum over a token's slots: bf16 results in the order of the pairs into (M, H)."""
        from fp8moe.kernels.reduce import weighted_sum

        with device_guard(output.device):
            weighted_sum(results, local, output, weights)
