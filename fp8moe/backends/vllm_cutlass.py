"""VLLM_CUTLASS: vLLM's CUTLASS grouped GEMM, with Triton for few tokens on SM10x."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fp8moe.backends.common import VLLM_CUTLASS_NEEDS, one_of, vllm_cutlass_device
from fp8moe.backends.libraries import LibraryCall, LibraryExperts
from fp8moe.backends.triton_experts import TritonExperts
from fp8moe.backends.vllm_ops import ACTIVATIONS, operators
from fp8moe.config import FusedMoEActivationFormat, FusedMoEConfig, FusedMoEParallelConfig
from fp8moe.experts import MoEWeights
from fp8moe.platforms import Platform
from fp8moe.quant import FusedMoEQuantConfig
from fp8moe.recipe import Contract, Recipe
from fp8moe.registry import BackendUnavailable, Fp8MoeBackend
from fp8moe.schemes import CHANNEL_TOKEN, TENSOR_DYNAMIC, TENSOR_STATIC, scheme_name
from fp8moe.support import Support

CUTLASS_ACTIVATIONS = frozenset({"silu", "gelu", "swigluoai"})
SCHEMES = (CHANNEL_TOKEN, TENSOR_DYNAMIC, TENSOR_STATIC)
CUTLASS_SCHEMES = one_of(*SCHEMES)
GEMM = ("cutlass_moe_mm", "get_cutlass_moe_mm_problem_sizes_from_expert_offsets")
QUANTISE = ("static_scaled_fp8_quant", "dynamic_scaled_fp8_quant", "dynamic_per_token_scaled_fp8_quant")
PERMUTE = ("moe_permute", "moe_unpermute")
FEW_TOKENS = 8
"""On SM10x, up to so many go to Triton (specification section 2.4)."""
SWAPPED_ROWS = 64
"""Up to so many rows over all experts the kernel computes the transposed product, and takes sizes that way round."""
MULTIPLE = 16
"""Of both sizes, for 128-bit loads of 8-bit numbers."""


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


class VllmCutlassExperts(LibraryExperts):
    """vLLM's CUTLASS or Triton, decided per call on the number of tokens.

    With CUTLASS: activations are quantised, gathered by expert, multiplied, activated, quantised again, multiplied, and
    summed up, each by vLLM's operator; results in between are in the hidden states' dtype.

    Raises:
        BackendUnavailable: another device, no operators, or a layer that the kernels cannot take.
    """

    backend = Fp8MoeBackend.VLLM_CUTLASS
    written_from = "vllm 0.25.1"
    package = "vllm"
    contract = Contract(Recipe(gemm1_output="input", activation_output="input", gemm2_output="input"))
    support = VLLM_CUTLASS_ALONE.and_fallback(TritonExperts.support)

    def __init__(self, config: FusedMoEConfig, quant: FusedMoEQuantConfig, weights: MoEWeights) -> None:
        super().__init__(config, quant, weights)
        name, platform = type(self).__name__, self.platform()
        if not takes(platform):
            raise BackendUnavailable(
                f"{name}: vLLM's grouped GEMM is for CUDA SM90 to SM109, not {platform.architecture}"
            )
        refusal = refused(config, quant, weights)
        if refusal:
            raise BackendUnavailable(f"{name}: {refusal}")
        self.ops = self.library()
        self.per_token = (quant.weight_key, quant.activation_key) == CHANNEL_TOKEN
        self.scales = {name: _scale_of(weights, name) for name in ("w13", "w2")}
        self.strides = {size: _strides(weights, size) for size in {*weights.w13.shape[1:], *weights.w2.shape[1:]}}
        self.few = TritonExperts(config, quant, weights) if platform.cap is not None and platform.cap >= 100 else None

    def library(self) -> Any:
        """The operators.

        Raises:
            BackendUnavailable: they do not load, or one of them is missing.
        """
        activation = (ACTIVATIONS[self.config.activation],)
        return operators(type(self).__name__, {"_C": (*GEMM, *QUANTISE, *activation), "_moe_C": PERMUTE})

    def compute(self, call: LibraryCall, output: Tensor) -> None:
        if self.few is not None and len(call.hidden_states) <= FEW_TOKENS:
            self.few.apply(call.hidden_states, call.weights, call.ids, expert_map=call.expert_map, output=output)
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
        first, second = ids.new_empty(local, 3), ids.new_empty(local, 3)
        swapped = rows <= SWAPPED_ROWS
        self.ops.get_cutlass_moe_mm_problem_sizes_from_expert_offsets(offsets, first, second, inter, hidden, swapped)
        gate_up = call.hidden_states.new_empty(rows, 2 * inter)
        if not self.per_token and placed is not None:
            gate_up.zero_()  # rows without an expert here are part of the one scale of all
        self.gemm(gate_up, taken, scale, "w13", offsets[:-1], first)
        values = call.hidden_states.new_empty(rows, inter)
        getattr(self.ops, ACTIVATIONS[self.config.activation])(values, gate_up)
        if not self.per_token and self.weights.a2_scale is None:
            values.masked_fill_(~call.present.flatten()[pair, None], 0.0)  # nor are absent pairs part of it
        codes, scale = self.quantised(values, self.weights.a2_scale)
        results = call.hidden_states.new_empty(rows, hidden)
        self.gemm(results, codes, scale, "w2", offsets[:-1], second)
        self.ops.moe_unpermute(results, call.weights, places, offsets, top_k, output)

    def quantised(self, values: Tensor, static: Tensor | None) -> tuple[Tensor, Tensor]:
        """(rows, columns) FP8, and fp32 scales (rows, 1) or (1,)."""
        codes = torch.empty_like(values, dtype=torch.float8_e4m3fn)
        if static is not None:
            scale = static.reshape(1)
            self.ops.static_scaled_fp8_quant(codes, values, scale, None)
            return codes, scale
        if self.per_token:
            scale = values.new_empty(len(values), 1, dtype=torch.float32)
            self.ops.dynamic_per_token_scaled_fp8_quant(codes, values, scale, None)
            return codes, scale
        scale = values.new_empty(1, dtype=torch.float32)
        self.ops.dynamic_scaled_fp8_quant(codes, values, scale)
        return codes, scale

    def gemm(self, out: Tensor, a: Tensor, scale: Tensor, name: str, offsets: Tensor, sizes: Tensor) -> None:
        """Each expert's rows of `a`, from its offset on, times its w13 or w2, scaled, into `out`."""
        matrix: Tensor = getattr(self.weights, name)
        inner, outer = self.strides[a.shape[1]], self.strides[out.shape[1]]
        per = (self.per_token, self.per_token)
        self.ops.cutlass_moe_mm(out, a, matrix, scale, self.scales[name], offsets, sizes, inner, inner, outer, *per)


def takes(platform: Platform) -> bool:
    """Whether the device is one that the grouped GEMM is compiled for."""
    return platform.is_cuda and platform.cap is not None and 90 <= platform.cap < 110


def refused(config: FusedMoEConfig, quant: FusedMoEQuantConfig, weights: MoEWeights) -> str:
    """What the kernels cannot take of a layer; "" where they take it."""
    scheme = (quant.weight_key, quant.activation_key)
    if scheme not in SCHEMES:
        return f"{scheme_name(*scheme)}: expected {', '.join(scheme_name(*known) for known in SCHEMES)}"
    if weights.w13.dtype != torch.float8_e4m3fn:
        return f"weights of dtype {weights.w13.dtype}: expected torch.float8_e4m3fn"
    if config.activation not in ACTIVATIONS:
        return f"activation={config.activation}: expected {' or '.join(ACTIVATIONS)}, which this adapter has so far"
    if weights.w13_bias is not None or weights.w2_bias is not None:
        return "biases: the grouped GEMM has none"
    sizes = {"hidden_dim": config.hidden_dim, "intermediate_size_per_partition": config.intermediate_size_per_partition}
    wrong = [f"{name}={size}: expected a multiple of {MULTIPLE}" for name, size in sizes.items() if size % MULTIPLE]
    return "; ".join(wrong)


def _scale_of(weights: MoEWeights, name: str) -> Tensor:
    """(E, rows), or (E, 1) per tensor."""
    scale: Tensor = getattr(weights, f"{name}_scale")
    return scale.reshape(scale.shape[0], -1).contiguous()


def _strides(weights: MoEWeights, size: int) -> Tensor:
    """(E,) int64: the distance of rows of so many columns."""
    return torch.full((weights.w13.shape[0],), size, dtype=torch.int64, device=weights.w13.device)
