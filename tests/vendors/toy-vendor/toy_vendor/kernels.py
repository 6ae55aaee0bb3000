"""In place of a kernel library: a grouped GEMM of FP8 codes, scaled block by block of K, in PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from fp8moe.keys import GroupShape
from fp8moe.quant import quantize
from fp8moe.reference.portable import silu

BLOCK = 128


def scale_of_each_row(scale: Tensor, rows: int, halves: int = 1) -> Tensor:
    """(E, row blocks, K blocks), a scale for each block, to (E, rows, K blocks); gate and up are blocked apart."""
    return torch.cat([half.repeat_interleave(BLOCK, dim=1)[:, :rows] for half in scale.chunk(halves, dim=1)], dim=1)


def quantised(values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(P, K) to FP8 codes, and (P, K blocks) fp32 scales."""
    return quantize(values, GroupShape(1, BLOCK), dtype=dtype)


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """(P, 2I), gate then up, to (P, I)."""
    gate, up = gate_up.chunk(2, dim=1)
    return silu(gate) * up  # the portable one: its bits are the same everywhere


def grouped_gemm(
    codes: Tensor, scale: Tensor, expert: Tensor, weights: Tensor, weight_scale: Tensor, bias: Tensor | None
) -> Tensor:
    """(P, K) rows with their scales, each times the (E, N, K) weights of its expert: (P, N) fp32."""
    result = scale.new_zeros(codes.shape[0], weights.shape[1])
    for index in torch.unique(expert).tolist():
        rows = expert == index
        a, b = codes.float()[rows], weights[index].float()
        for block, start in enumerate(range(0, a.shape[1], BLOCK)):
            k = slice(start, start + BLOCK)
            result[rows] += a[:, k] @ b[:, k].t() * (scale[rows, block, None] * weight_scale[index, :, block])
        if bias is not None:
            result[rows] += bias[index].float()
    return result
