"""What a faulty loader makes of the weights' scales."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from conformance.zoo.around import _scales as scales
from fp8moe.experts import MoEWeights
from fp8moe.scaling import decode


def shifted_by_a_row(scale: Tensor) -> Tensor:
    return scale.roll(1, 1) if scale.dim() == 3 else scale


def second_weights_scales(given: MoEWeights) -> MoEWeights:
    if given.w13_scale is None or given.w2_scale is None:
        return given
    wanted, other = (scale.reshape(len(scale), -1) for scale in (given.w13_scale, given.w2_scale))
    place = torch.arange(wanted.shape[1], device=wanted.device) % other.shape[1]
    return replace(given, w13_scale=other[:, place].reshape(given.w13_scale.shape))


def halves(change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Callable[[Tensor], Tensor]:
    """A change of the gate's and the up's scales, where they are apart."""

    def changed(scale: Tensor) -> Tensor:
        if scale.dim() == 1 or scale.shape[1] % 2:
            return scale
        return torch.cat(change(*scale.chunk(2, 1)), 1)

    return changed


def last_block_of_the_neighbour(scale: Tensor) -> Tensor:
    if scale.dim() == 3 and scale.shape[2] > 1:
        scale[..., -1] = scale[..., -2]
    return scale


def blocked_jointly(base: Any) -> dict[str, Any]:
    """Blocks of w13's rows are counted from the first row of the gate, also where the gate's last one is partial."""

    def weight(self: Any, name: str, index: int) -> Tensor:
        group = self.quant.w1.shape
        if name != "w13" or group is None or not group.is_block():
            found: Tensor = base.weight(self, name, index)
            return found
        codes, scale = self.weights.w13[index], self.weights.w13_scale[index]
        rows: Tensor = scale[torch.arange(len(codes), device=scale.device) // group.row]
        return decode(codes) * rows.repeat_interleave(group.col, 1)[:, : codes.shape[1]]

    return {"weight": weight}


def three_percent(scale: Tensor) -> Tensor:
    scale[(0,) * scale.dim()] *= 1.03
    return scale


def doubled(given: MoEWeights) -> MoEWeights:
    """As if these codes were to be read as e4m3fnuz, which makes half of them."""
    if given.w13.dtype != torch.float8_e4m3fn:
        return given
    return scales(lambda scale: 2 * scale, "w13_scale")(given)
