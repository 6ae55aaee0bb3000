"""XPU: weights and their block scales with the last two dimensions the other way round."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from fp8moe.experts import MoEWeights


def transposed(weights: MoEWeights) -> MoEWeights:
    """w13 (E, H, 2I) and w2 (E, I, H), contiguous; scales with three dimensions alike, others as they are."""
    return replace(
        weights,
        w13=_turned(weights.w13),
        w2=_turned(weights.w2),
        w13_scale=_turned_scale(weights.w13_scale),
        w2_scale=_turned_scale(weights.w2_scale),
    )


def _turned(values: Tensor) -> Tensor:
    return values.transpose(1, 2).contiguous()


def _turned_scale(scale: Tensor | None) -> Tensor | None:
    return scale if scale is None or scale.dim() < 3 else _turned(scale)
