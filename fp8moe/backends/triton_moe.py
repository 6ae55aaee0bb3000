"""The launches of one MoE with our Triton kernels, in order. Importing this imports triton."""

from __future__ import annotations

import torch
from torch import Tensor
from triton.runtime import JITFunction

from fp8moe.experts import MoEWeights
from fp8moe.kernels.activation import silu_mul_quantize
from fp8moe.kernels.align import align_pairs
from fp8moe.kernels.grouped_gemm import grouped_gemm, grouped_gemm_kernel
from fp8moe.kernels.quantize import quantize_per_token_group
from fp8moe.kernels.reduce import weighted_sum

INTERPRETED = not isinstance(grouped_gemm_kernel, JITFunction)
"""Whether triton was imported with TRITON_INTERPRET=1; setting it later has no effect."""


def block_scaled_moe(
    hidden_states: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    weights: MoEWeights,
    output: Tensor,
    *,
    tile_rows: int,
    expert_map: Tensor | None,
    apply_router_weight_on_input: bool,
    amax_floor: float,
) -> None:
    """silu-gated MoE of the block scheme: 128x128 blocks of weights, 1x128 groups of activations; into `output`.

    Arguments as `FusedMoEPermuteExpertsUnpermute.apply`; at least one token-expert pair. A weight on the input is
    multiplied in fp32 and rounded to the dtype of the hidden states.
    """
    assert weights.w13_scale is not None
    assert weights.w2_scale is not None
    experts, top_k = weights.w13.shape[0], topk_ids.shape[1]
    if apply_router_weight_on_input:
        hidden_states = (hidden_states.float() * topk_weights).to(hidden_states.dtype)
    alignment = align_pairs(topk_ids, experts, tile_rows, expert_map)
    x, x_scale = quantize_per_token_group(hidden_states, amax_floor=amax_floor)
    gate_up = grouped_gemm(
        x,
        x_scale,
        weights.w13,
        weights.w13_scale,
        alignment,
        pairs_per_row=top_k,
        parts=2,
        bias=weights.w13_bias,
    )
    h, h_scale = silu_mul_quantize(gate_up, alignment.local_ids, amax_floor=amax_floor)
    del gate_up  # the largest buffer: its memory serves for y
    y = grouped_gemm(h, h_scale, weights.w2, weights.w2_scale, alignment, pairs_per_row=1, bias=weights.w2_bias)
    weighted_sum(y, alignment.local_ids, output, None if apply_router_weight_on_input else topk_weights)


def device_guard(device: torch.device) -> torch.cuda.device:
    """Triton launches on the current device, which need not be the tensors'; without an index, changes nothing."""
    return torch.cuda.device(device.index if device.type == "cuda" and device.index is not None else -1)
