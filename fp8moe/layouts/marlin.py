"""MARLIN's layout of FP8 weights and of their scales, which go with 16-bit activations.

A warp multiplies 16 of k with 64 columns of n at a time, by products m16n8k16 of the tensor core. What a lane needs
of one 8-column tile (PTX ISA, fragment B of that shape: column `lane // 4`, k `2 (lane % 4) + {0, 1, 8, 9}`) is one
32-bit word, whose bytes lie in the order that makes the conversion to 16 bits cheap; tiles lie one after the other.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fp8moe.experts import MoEWeights
from fp8moe.layouts.halves import multiple_of, padded, padded_rows

TILE_K, TILE_N = 16, 64
"""What 32 lanes read at a time: 256 words."""
SCALES_OF_GROUPS = tuple(lane + 8 * run for lane in range(8) for run in range(8))
"""Of each run of 64 columns, which column's scale comes where: a thread's eight columns lie together."""
SCALES_OF_CHANNELS = tuple(2 * lane + of for lane in range(4) for of in (0, 1, 8, 9, 16, 17, 24, 25))
"""Of each run of 32, where scales are applied to the result, in the accumulator's order."""
EXPONENT_BITS = {torch.float16: 5, torch.bfloat16: 8}
E4M3_EXPONENT_BITS = 4


def padded_intermediate(intermediate: int, group: int) -> int:
    """The size to which I is filled up with zeros, each half of w13 apart: a multiple of 64 and of the scales' group.

    Args:
        group: 128 for block scales, -1 for others.
    """
    return multiple_of(intermediate, math.lcm(TILE_N, max(group, 1)))


def left_out(dtype: torch.dtype) -> int:
    """The power of two that the kernel's conversion of a code to fp16 or bf16 leaves out."""
    return (1 << (EXPONENT_BITS[dtype] - 1)) - (1 << (E4M3_EXPONENT_BITS - 1))


def weights(codes: Tensor) -> Tensor:
    """(E, n, k) FP8 to (E, k / 16, 4 n) int32, words of four codes.

    Raises:
        ValueError: n is no multiple of 64, or k none of 16.
    """
    experts, n, k = codes.shape
    if n % TILE_N or k % TILE_K:
        raise ValueError(f"weights of shape {tuple(codes.shape)}: expected n a multiple of {TILE_N}, k of {TILE_K}")
    word = torch.arange(TILE_K * TILE_N // 4, device=codes.device)[:, None]
    byte = torch.arange(4, device=codes.device)
    lane, tile = word // 8, word % 8
    column = 8 * tile + lane // 4
    row = 2 * (lane % 4) + byte // 2 + 8 * (byte % 2)
    tiles = codes.view(torch.uint8).reshape(experts, n // TILE_N, TILE_N, k // TILE_K, TILE_K).permute(0, 3, 1, 2, 4)
    packed = tiles[..., column.expand_as(row), row].contiguous()  # (E, k tiles, n tiles, 256 words, 4 bytes)
    return packed.view(torch.int32).reshape(experts, k // TILE_K, 4 * n)


def scales(scale: Tensor, rows: int, columns: int, group: int, dtype: torch.dtype, parts: int = 1) -> Tensor:
    """Scales of (E, rows, columns) weights to (E, groups of k, rows) of `dtype`, in the kernel's order, times 2^(what
    its conversion of a code leaves out of the exponent).

    Args:
        scale: per tensor (E,), per channel (E, rows, 1), or blocks of 128 x 128, those of each part of the rows apart.
        group: 128 for blocks, -1 for others.
        dtype: of the activations, fp16 or bf16.
        parts: 2 for w13 of a gated MLP.

    Raises:
        ValueError: another dtype; rows that are no multiple of 64, or a scale that `dtype` cannot hold.
    """
    if dtype not in EXPONENT_BITS:
        raise ValueError(f"dtype={dtype}: MARLIN takes activations of fp16 or bf16")
    if rows % TILE_N:
        raise ValueError(f"rows={rows}: expected a multiple of {TILE_N}")
    spread = _by_group(scale, rows, group, parts)
    order = SCALES_OF_GROUPS if 0 < group < columns else SCALES_OF_CHANNELS
    permuted = spread.reshape(*spread.shape[:-1], -1, len(order))[..., list(order)].flatten(-2)
    exponent = left_out(dtype)
    found: Tensor = permuted.to(dtype) * 2.0**exponent
    lost = ~found.isfinite() | ((found == 0) & (permuted != 0))
    if bool(lost.any()):
        worst = permuted[lost][0].item()
        raise ValueError(
            f"a weight scale of {worst:.3g} times 2^{exponent} is no number of {dtype}: MARLIN cannot take these "
            "weights; rescale the layer, or use other activations"
        )
    return found


def bias(values: Tensor) -> Tensor:
    """(E, rows) in the kernel's order.

    Raises:
        ValueError: rows that are no multiple of 32.
    """
    if values.shape[1] % len(SCALES_OF_CHANNELS):
        raise ValueError(f"bias of shape {tuple(values.shape)}: expected a multiple of {len(SCALES_OF_CHANNELS)} rows")
    return values.reshape(values.shape[0], -1, len(SCALES_OF_CHANNELS))[..., list(SCALES_OF_CHANNELS)].flatten(1)


def layer(given: MoEWeights, group: int, dtype: torch.dtype, *, gated: bool) -> MoEWeights:
    """All of a layer's weights, I filled up to a size that the kernel takes; activation scales are dropped.

    Args:
        group, dtype: as `scales`.

    Raises:
        ValueError: as `weights` and `scales`; weights without scales.
    """
    if given.w13_scale is None or given.w2_scale is None:
        raise ValueError("w13_scale, w2_scale: MARLIN takes FP8 weights, which have scales")
    parts, (_, hidden, intermediate) = 2 if gated else 1, given.w2.shape
    size = padded_intermediate(intermediate, group)
    full = padded(given, size, gated=gated)
    scale = given.w13_scale
    if group < 0 and scale.dim() == 3:  # of channels; the last block of a part has its scale already
        scale = padded_rows(scale, size, parts)
    return MoEWeights(
        weights(full.w13),
        weights(full.w2),
        scales(scale, parts * size, hidden, group, dtype, parts),
        scales(given.w2_scale, hidden, size, group, dtype),
        None if full.w13_bias is None else bias(full.w13_bias),
        None if full.w2_bias is None else bias(full.w2_bias),
    )


def _by_group(scale: Tensor, rows: int, group: int, parts: int) -> Tensor:
    """(E, groups of k, rows), one scale for each group and row; of a part's last block what its rows use."""
    experts = scale.shape[0]
    if group < 0:
        return scale.reshape(experts, 1, -1).expand(experts, 1, rows).contiguous()
    blocks = scale.reshape(experts, parts, -1, scale.shape[-1]).transpose(-1, -2)  # (E, parts, groups, row blocks)
    each = blocks.repeat_interleave(group, dim=-1)[..., : rows // parts]
    found: Tensor = each.transpose(1, 2).flatten(-2)
    return found
