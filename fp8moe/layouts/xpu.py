"""XPU: weights and their block scales with the last two dimensions the other way round; gate and up in turn."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from fp8moe.experts import MoEWeights
from fp8moe.layouts.halves import interleaved_halves


def transposed(weights: MoEWeights) -> MoEWeights:
    """w13 (E, H, 2I) and w2 (E, I, H), contiguous; scales with three dimensions alike, others as they are."""
    return replace(
        weights,
        w13=_turned(weights.w13),
        w2=_turned(weights.w2),
        w13_scale=_turned_scale(weights.w13_scale),
        w2_scale=_turned_scale(weights.w2_scale),
    )


def in_turn(weights: MoEWeights) -> MoEWeights:
    """Rows of w13 and of its bias gate, up, gate, up …, as the operator of swigluoai takes them.

    Raises:
        ValueError: block scales, which a gate's rows and an up's would share.
    """
    if weights.w13_scale is not None and weights.w13_scale.dim() > 2:
        shape = tuple(weights.w13_scale.shape)
        raise ValueError(f"w13_scale of shape {shape}: expected one scale for each expert where gate and up take turns")
    bias = weights.w13_bias
    return replace(
        weights,
        w13=interleaved_halves(weights.w13),
        w13_bias=None if bias is None else interleaved_halves(bias),
    )


def _turned(values: Tensor) -> Tensor:
    return values.transpose(1, 2).contiguous()


def _turned_scale(scale: Tensor | None) -> Tensor | None:
    return scale if scale is None or scale.dim() < 3 else _turned(scale)
