"""FLASHINFER_CUTLASS and FLASHINFER_TRTLLM: halves the other way round, padding, and TRTLLM's order of rows."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fp8moe.experts import MoEWeights
from fp8moe.layouts.halves import interleaved_halves, multiple_of, padded, swapped_halves

INTERMEDIATE_MULTIPLE = {True: 16, False: 128}
"""To what I is filled up with per-tensor scales, by whether the MLP is gated."""
LEAST_BLOCK_SCALE = 1e-10
"""Smaller ones, of experts that never learnt, give NaN in the SM90 kernel (a remedy of vLLM's, 0.33.0)."""
TENSOR_TILE, BLOCK_TILE = 128, 64
"""Rows of TRTLLM's epilogue tile, which decide the order of the rows."""
BLOCK_K = 128


def cutlass_weights(weights: MoEWeights, *, gated: bool, block: bool) -> MoEWeights:
    """Rows [up; gate], their scales and biases alike; per tensor with I filled up, per block with scales that are not
    too small.

    Raises:
        ValueError: scales of channels, which neither kernel has.
    """
    scale = weights.w13_scale
    if not block and scale is not None and scale.dim() > 1:
        raise ValueError(f"w13_scale of shape {tuple(scale.shape)}: FlashInfer has one scale per tensor, or per block")
    if not block:
        weights = padded(weights, multiple_of(weights.w2.shape[2], INTERMEDIATE_MULTIPLE[gated]), gated=gated)
    if gated:
        weights = replace(
            weights,
            w13=swapped_halves(weights.w13),
            w13_scale=_swapped_scale(weights.w13_scale, block=block),
            w13_bias=None if weights.w13_bias is None else swapped_halves(weights.w13_bias),
        )
    if not block:
        return weights
    return replace(weights, w13_scale=_at_least(weights.w13_scale), w2_scale=_at_least(weights.w2_scale))


def _swapped_scale(scale: Tensor | None, *, block: bool) -> Tensor | None:
    return swapped_halves(scale) if scale is not None and block else scale


def _at_least(scale: Tensor | None) -> Tensor | None:
    return None if scale is None else scale.clamp(min=LEAST_BLOCK_SCALE)


@dataclass(frozen=True)
class OutputScales:
    """What TRTLLM multiplies results by, (E,) fp32 each.

    Args:
        gate: of the first GEMM's gate, before its activation.
        first: of the first GEMM's result, which the second takes in FP8.
        second: of the second GEMM's.
    """

    gate: Tensor
    first: Tensor
    second: Tensor


def output_scales(weights: MoEWeights, *, gated: bool) -> OutputScales:
    """From per-tensor weight scales and static activation scales.

    Raises:
        ValueError: one of the four is missing.
    """
    missing = [name for name in ("w13_scale", "w2_scale", "a13_scale", "a2_scale") if getattr(weights, name) is None]
    if missing:
        raise ValueError(f"{', '.join(missing)}: FLASHINFER_TRTLLM needs all scales per tensor, static ones")
    assert weights.w13_scale is not None
    assert weights.w2_scale is not None
    assert weights.a13_scale is not None
    assert weights.a2_scale is not None
    a13, a2 = weights.a13_scale.reshape(()), weights.a2_scale.reshape(())
    gate = weights.w13_scale * a13
    first = gate / a2 if gated else torch.ones_like(gate) / a2
    return OutputScales(gate, first, weights.w2_scale * a2)


def trtllm_weights(weights: MoEWeights, *, gated: bool, block: bool) -> MoEWeights:
    """As `cutlass_weights` before the rows' order of TRTLLM; with blocks w13 is (E, H / 128, 2I, 128), w2 alike.

    Raises:
        ValueError: rows that are no multiple of 16 (blocks) or 32, or columns none of 128 (blocks); scales of channels.
    """
    found = cutlass_weights(weights, gated=gated, block=block)
    w13 = found.w13 if block or not gated else interleaved_halves(found.w13)
    tile = BLOCK_TILE if block else TENSOR_TILE
    ordered = [shuffled_rows(codes, tile) for codes in (w13, found.w2)]
    first, second = [blocks_of_k(codes) for codes in ordered] if block else ordered
    return replace(found, w13=first, w2=second)


def shuffled_rows(codes: Tensor, tile: int) -> Tensor:
    """(E, n, k) with rows in the order in which TRTLLM's matrix A is read.

    In each run of 8 w rows, w being 2, or 4 where the tile is a multiple of 128, row w i + j comes to place i + 8 j.

    Raises:
        ValueError: n is no multiple of the run.
    """
    run = 32 if tile % 128 == 0 else 16
    if codes.shape[1] % run:
        raise ValueError(f"weights of shape {tuple(codes.shape)}: expected a multiple of {run} rows")
    experts, rows, columns = codes.shape
    return codes.reshape(experts, rows // run, 8, run // 8, columns).transpose(2, 3).reshape(codes.shape)


def blocks_of_k(codes: Tensor) -> Tensor:
    """(E, n, k) to (E, k / 128, n, 128).

    Raises:
        ValueError: k is no multiple of 128.
    """
    if codes.shape[2] % BLOCK_K:
        raise ValueError(f"weights of shape {tuple(codes.shape)}: expected a multiple of {BLOCK_K} columns")
    return codes.reshape(*codes.shape[:2], -1, BLOCK_K).transpose(1, 2).contiguous()
