"""AITER's layout, and the FP8 format of CDNA 3."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fp8moe.experts import MoEWeights

ROWS, COLUMNS, BYTES = 16, 32, 16
"""A tile of weights: 16 rows, and columns in parts of 16 bytes, which one lane loads at a time."""


def shuffled(codes: Tensor) -> Tensor:
    """(E, n, k) of one byte or two each, tile by tile: of each tile the first 16 bytes of all 16 rows, then the next
    ones. The shape stays, which tells nothing of where an element is.

    Raises:
        ValueError: n is no multiple of 16, or k none of 32.
    """
    experts, n, k = codes.shape
    if n % ROWS or k % COLUMNS:
        raise ValueError(
            f"weights of shape {tuple(codes.shape)}: expected a multiple of {ROWS} rows and {COLUMNS} columns"
        )
    part = BYTES // codes.element_size()
    tiles = codes.reshape(experts, n // ROWS, ROWS, k // COLUMNS, COLUMNS // part, part)
    return tiles.permute(0, 1, 3, 4, 2, 5).contiguous().view(experts, n, k)


def layer_shuffled(weights: MoEWeights) -> MoEWeights:
    """w13 and w2 as `shuffled`; scales and biases as they are."""
    return replace(weights, w13=shuffled(weights.w13), w2=shuffled(weights.w2))


def layer_as_fnuz(weights: MoEWeights) -> MoEWeights:
    """Both weights as `as_fnuz`, and static activation scales, which double alike: their codes are of that format, too.

    Raises:
        ValueError: as `as_fnuz`; weights without scales.
    """
    if weights.w13_scale is None or weights.w2_scale is None:
        raise ValueError("w13_scale, w2_scale: FP8 weights have scales")
    w13, w13_scale = as_fnuz(weights.w13, weights.w13_scale)
    w2, w2_scale = as_fnuz(weights.w2, weights.w2_scale)
    doubled = {
        name: None if scale is None else scale * 2
        for name, scale in (("a13_scale", weights.a13_scale), ("a2_scale", weights.a2_scale))
    }
    return replace(weights, w13=w13, w2=w2, w13_scale=w13_scale, w2_scale=w2_scale, **doubled)


def as_fnuz(codes: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3fn weights as e4m3fnuz, whose exponent is biased by one more: the same bits are half the value, so scales
    double. The bits of -0 are that format's NaN, and become 0.

    Raises:
        ValueError: another dtype, or a NaN, whose bits are a number there.
    """
    if codes.dtype != torch.float8_e4m3fn:
        raise ValueError(f"weights of dtype {codes.dtype}: expected torch.float8_e4m3fn")
    if bool(codes.float().isnan().any()):
        raise ValueError("weights with NaN: its bits are the number 240 in e4m3fnuz; expected numbers")
    bits = codes.view(torch.uint8)
    return torch.where(bits == 0x80, 0, bits).to(torch.uint8).view(torch.float8_e4m3fnuz), scale * 2
