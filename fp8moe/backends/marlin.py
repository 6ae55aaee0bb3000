"""MARLIN: vLLM's Marlin kernels; FP8 weights, 16-bit activations."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fp8moe.backends.common import no_flashinfer_all2all
from fp8moe.backends.libraries import LibraryCall, LibraryExperts
from fp8moe.backends.triton_stages import device_guard, interprets
from fp8moe.backends.vllm_ops import operators
from fp8moe.config import FusedMoEActivationFormat, FusedMoEConfig
from fp8moe.envs import Env
from fp8moe.experts import MoEWeights
from fp8moe.keys import QuantKey, kFp8Static128BlockSym, kFp8StaticChannelSym, kFp8StaticTensorSym, kNvfp4Static
from fp8moe.layouts.marlin import EXPONENT_BITS, left_out, padded_intermediate
from fp8moe.platforms import Platform
from fp8moe.quant import FusedMoEQuantConfig
from fp8moe.recipe import Contract, Recipe
from fp8moe.registry import BackendUnavailable, Fp8MoeBackend, LayerNotSupported
from fp8moe.support import Support

_WEIGHTS = frozenset({kFp8Static128BlockSym, kFp8StaticChannelSym, kFp8StaticTensorSym, kNvfp4Static})
OPERATORS = ("moe_align_block_size", "moe_wna16_marlin_gemm")
E4M3 = 2814749767172868
"""The id of float8_e4m3fn among vLLM's scalar types."""
TILES = (8, 16, 32, 48, 64)
"""Rows of a tile."""
FULL = 0.9
"""The smallest tile is taken that an expert's rows fill less than this, were they spread evenly."""
LOCKS_A_MULTIPROCESSOR = 4
K_MULTIPLE = 128
MOST_EXPERTS = 992
"""Of all ranks: vLLM's operator that lays many pairs out takes less than 1,024, filled up to a multiple of 32."""


BY_MARLIN = Recipe(
    quantize_input=False,
    requantize=False,
    gemm1_output="input",
    activation_output="input",
    gemm2_output="input",
    bias="input",
    routing_weights="input",
    weighted="input",
)


def _device(platform: Platform, _env: Env) -> bool:
    return _takes(platform) and platform.has("vllm")


def _takes(platform: Platform) -> bool:
    return platform.is_cuda and platform.cap is not None and platform.cap >= 75


def _scheme(_platform: Platform, weight_key: QuantKey | None, _activation_key: QuantKey | None) -> bool:
    """The activation key is ignored: the activations stay in 16 bits (quirk Q15)."""
    return weight_key in _WEIGHTS


@dataclass(frozen=True)
class Tiles:
    """Token-expert pairs as the GEMM takes them; P = M * top_k.

    Args:
        order: (n,) int32, each row's pair, P in rows that pad; tiles in use come first.
        owners: (n / rows,) int32, each tile's local expert.
        count: (1,) int32, rows of the tiles in use.
        rows: of a tile.
        weights: (P,) fp32, 0 for absent pairs.
        present: (P,) int32, negative for pairs without an expert here.
    """

    order: Tensor
    owners: Tensor
    count: Tensor
    rows: int
    weights: Tensor
    present: Tensor


class MarlinExperts(LibraryExperts):
    """vLLM's Marlin MoE: two grouped GEMMs on token-expert pairs in their order, and our sum over each token's.

    Its results in between are in the hidden states' dtype, a pair's times its routing weight; they are added in fp32.
    One workspace of locks serves a layer: two streams must not call one at the same time.

    Raises:
        BackendUnavailable: another device or no operators.
        LayerNotSupported: a layer that the kernels cannot take.
    """

    backend = Fp8MoeBackend.MARLIN
    written_from = "vllm 0.25.1"
    tried_on = "an H200"
    package = "vllm"
    contract = Contract(BY_MARLIN, graph_capturable=True)
    support = Support(
        device=_device,
        needs="CUDA SM75 or newer and vLLM's operators",
        scheme=_scheme,
        activations=frozenset({"silu", "gelu", "swigluoai", "silu_no_mul", "gelu_no_mul", "relu2_no_mul"}),
        activation_format=FusedMoEActivationFormat.Standard,
        parallel=no_flashinfer_all2all,
        non_gated=True,
    )

    def __init__(self, config: FusedMoEConfig, quant: FusedMoEQuantConfig, weights: MoEWeights) -> None:
        super().__init__(config, quant, weights)
        name, platform = type(self).__name__, self.platform()
        if not _takes(platform):
            raise BackendUnavailable(f"{name}: MARLIN is for CUDA SM75 and newer, not {platform.architecture}")
        refusal = _refusal(config, quant, weights) or self.refused_activation()
        if refusal:
            raise LayerNotSupported(f"{name}: {refusal}")
        interprets(name)
        self.contract = contract_for(config, quant)
        self.ops = self.library()
        self.converted = self.converted_weights(platform)
        group = -1 if quant.block_shape is None else quant.block_shape[1]
        self.inter = padded_intermediate(config.intermediate_size_per_partition, group)
        # Locks, which the kernels leave as they find them: at zero.
        device = weights.w13.device
        self.workspace = torch.zeros(self.multiprocessors() * LOCKS_A_MULTIPROCESSOR, dtype=torch.int32, device=device)

    def library(self) -> Any:
        """The operators of `OPERATORS`.

        Raises:
            BackendUnavailable: they do not load, or one of them is missing.
        """
        return operators(type(self).__name__, {"_moe_C": OPERATORS})

    def multiprocessors(self) -> int:
        """Of the weights' device."""
        return torch.cuda.get_device_properties(self.weights.w13.device).multi_processor_count

    def compute_pairs(
        self, hidden_states: Tensor, weights: Tensor, ids: Tensor, expert_map: Tensor | None, output: Tensor
    ) -> None:
        (tokens, hidden), (_, top_k) = hidden_states.shape, ids.shape
        pairs, wide = tokens * top_k, self.converted.w13.shape[2] // 4
        given = hidden_states.contiguous()
        tiles = self.tiles(given, weights, ids, expert_map)
        gate_up = given.new_empty(pairs, wide)
        self._gemm(given, gate_up, "w13", tiles, top_k, False, (tokens, wide, hidden))
        # Absent pairs, and those of other ranks, may hold anything from here on: rows do not mix.
        # vLLM's operator rounds the gate's part before the product, ours does not.
        values = self.activated_by_triton(gate_up, present=tiles.present, dtype=gate_up.dtype)
        results = given.new_empty(pairs, hidden)
        self._gemm(values, results, "w2", tiles, 1, True, (pairs, hidden, self.inter))
        self.combine(results, tiles.present, output, None, by_row=False)

    def tiles(self, hidden_states: Tensor, weights: Tensor, ids: Tensor, expert_map: Tensor | None) -> Tiles:
        """Of few pairs by one launch, ours; of many by ours and vLLM's."""
        from fp8moe.kernels.few import is_few

        pairs, experts = ids.numel(), self.config.num_local_experts
        rows = next((rows for rows in TILES if pairs / experts / rows < FULL), TILES[-1])
        if is_few(pairs, experts):
            return self.few_by_triton(weights, ids, expert_map, rows)
        call = LibraryCall.of(hidden_states, weights, ids, expert_map, experts)
        return self._many_by_library(call, rows)

    def few_by_triton(self, weights: Tensor, ids: Tensor, expert_map: Tensor | None, rows: int) -> Tiles:
        """By our kernel, which leaves absent pairs out."""
        from fp8moe.kernels.align import most_tiles
        from fp8moe.kernels.few import place_few_pairs

        pairs, experts = ids.numel(), self.config.num_local_experts
        with device_guard(ids.device):
            placed = place_few_pairs(
                ids, experts, most_tiles(pairs, experts, rows), rows, expert_map, pad=pairs, weights=weights
            )
        return Tiles(placed.pair_of_row, placed.owners, placed.count, rows, placed.weights, placed.local_ids)

    def _many_by_library(self, call: LibraryCall, rows: int) -> Tiles:
        ids, placed, pairs = call.ids, call.expert_map, call.ids.numel()
        experts = self.config.num_local_experts if placed is None else placed.numel()
        most = min(pairs + experts * (rows - 1), pairs * rows) if pairs < experts else pairs + experts * (rows - 1)
        order = ids.new_empty(most)
        owners = ids.new_empty(-(-most // rows))
        count = ids.new_empty(1)
        self.ops.moe_align_block_size(ids, experts, rows, order, owners, count, placed)
        return Tiles(order, owners, count, rows, call.weights, call.local_ids.flatten())

    def _gemm(
        self,
        a: Tensor,
        c: Tensor,
        name: str,
        tiles: Tiles,
        top_k: int,
        weighted: bool,
        size: tuple[int, int, int],
    ) -> None:
        """(m, k) times each pair's expert of w13 or w2, into c: pair p has row p // top_k of `a`; m, n, k in `size`."""
        codes, scale, bias = (getattr(self.converted, f"{name}{suffix}") for suffix in ("", "_scale", "_bias"))
        self.ops.moe_wna16_marlin_gemm(
            a,
            c,
            codes,
            bias,
            scale,
            None,  # a_scales: activations in 16 bits have none
            None,  # global_scale
            None,  # b_zeros
            None,  # g_idx
            None,  # perm
            self.workspace,
            tiles.order,
            tiles.owners,
            tiles.count,
            tiles.weights,
            tiles.rows,
            top_k,
            weighted,
            E4M3,
            *size,
            True,  # is_full_k
            False,  # use_atomic_add
            True,  # use_fp32_reduce
            False,  # is_zp_float
            -1,  # thread_k
            -1,  # thread_n
            -1,  # blocks_per_sm
        )


def contract_for(config: FusedMoEConfig, quant: FusedMoEQuantConfig) -> Contract:
    """Where K has several groups, their scales are multiplied with the codes, in 16 bits and before the GEMM; else with
    the result, and with them comes back what the codes' conversion leaves out of the exponent."""
    group = -1 if quant.block_shape is None else quant.block_shape[1]
    terms = {"w13": config.hidden_dim, "w2": padded_intermediate(config.intermediate_size_per_partition, group)}
    forms: dict[str, Any] = {}
    for name, size in terms.items():
        before = 0 < group < size
        forms[name] = "rounded" if before else "rounded_scales"
        forms[f"{name}_shift"] = 0 if before else left_out(config.in_dtype)
    return Contract(replace(BY_MARLIN, **forms), graph_capturable=True)


def _refusal(config: FusedMoEConfig, quant: FusedMoEQuantConfig, weights: MoEWeights) -> str:
    """What the kernels cannot take of a layer; "" where they take it."""
    if quant.w1.dtype is None or weights.w13.dtype != torch.float8_e4m3fn:
        return f"weights of dtype {weights.w13.dtype}: expected torch.float8_e4m3fn"
    if config.in_dtype not in EXPONENT_BITS:
        return f"hidden states of dtype {config.in_dtype}: MARLIN takes torch.float16 and torch.bfloat16"
    if config.hidden_dim % K_MULTIPLE:
        return f"hidden_dim={config.hidden_dim}: expected a multiple of {K_MULTIPLE}"
    if config.num_experts > MOST_EXPERTS:
        return f"num_experts={config.num_experts}: expected at most {MOST_EXPERTS}"
    return ""
