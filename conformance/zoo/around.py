"""Faults around a backend: in what it makes of its weights, of a call's tensors, of its result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from conformance.zoo.plant import ExpertsClass, Fault
from fp8moe.config import FusedMoEConfig
from fp8moe.experts import MoEWeights
from fp8moe.quant import FusedMoEQuantConfig

ChangeWeights = Callable[[MoEWeights], MoEWeights]


def _weights(change: ChangeWeights) -> Callable[[ExpertsClass], dict[str, Any]]:
    """The mutant converts its weights wrongly."""

    def members(base: ExpertsClass) -> dict[str, Any]:
        def __init__(self: Any, config: FusedMoEConfig, quant: FusedMoEQuantConfig, weights: MoEWeights) -> None:
            base.__init__(self, config, quant, change(weights))

        return {"__init__": __init__}

    return members


def _call(
    change: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]],
) -> Callable[[ExpertsClass], dict[str, Any]]:
    """The mutant changes (hidden states, weights, ids) on their way in."""

    def members(base: ExpertsClass) -> dict[str, Any]:
        def apply(self: Any, hidden: Tensor, weights: Tensor, ids: Tensor, **kwargs: Any) -> Tensor:
            return base.apply(self, *change(hidden, weights, ids), **kwargs)

        return {"apply": apply}

    return members


def _result(change: Callable[[Tensor], Tensor]) -> Callable[[ExpertsClass], dict[str, Any]]:
    """The mutant changes its result on the way out."""

    def members(base: ExpertsClass) -> dict[str, Any]:
        def apply(self: Any, *args: Any, output: Tensor | None = None, **kwargs: Any) -> Tensor:
            result = change(base.apply(self, *args, **kwargs))
            return result if output is None else output.copy_(result)

        return {"apply": apply}

    return members


def _scales(change: Callable[[Tensor], Tensor], *names: str) -> ChangeWeights:
    def changed(weights: MoEWeights) -> MoEWeights:
        given = {name: getattr(weights, name) for name in names}
        return replace(weights, **{name: change(scale.clone()) for name, scale in given.items() if scale is not None})

    return changed


def _swap_halves(tensor: Tensor) -> Tensor:
    first, second = tensor.chunk(2, dim=1)
    return torch.cat([second, first], dim=1)


def _gate_up_swapped(weights: MoEWeights) -> MoEWeights:
    scale = weights.w13_scale
    swapped = scale if scale is None or scale.dim() < 2 else _swap_halves(scale)
    return replace(weights, w13=_swap_halves(weights.w13.view(torch.uint8)).view(weights.w13.dtype), w13_scale=swapped)


def _expert0_scale(scale: Tensor) -> Tensor:
    return scale[:1].expand_as(scale).contiguous()


def _transposed(scale: Tensor) -> Tensor:
    """Read with the strides of the other order: for square scales no shape tells."""
    if scale.dim() < 3:
        return scale
    return scale.transpose(1, 2).contiguous().view_as(scale)


def _one_block_off(scale: Tensor) -> Tensor:
    scale.view(scale.shape[0], -1)[:, -1] *= 1.05
    return scale


def _tail_dropped(weights: MoEWeights) -> MoEWeights:
    """The last 32 of the first GEMM's K are never loaded."""
    w13 = weights.w13.clone()
    w13.view(torch.uint8)[..., -32 * w13.element_size() :] = 0
    return replace(weights, w13=w13)


def _duplicate_dropped(hidden: Tensor, weights: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    earlier = torch.tril(ids[:, :, None] == ids[:, None, :], diagonal=-1).any(dim=-1)
    return hidden, weights, torch.where(earlier, -1, ids)


def _last_token_lost(result: Tensor) -> Tensor:
    result = result.clone()
    result[-1:] = 0
    return result


def _truncated(result: Tensor) -> Tensor:
    """The output cast rounds toward zero: one unit less where the magnitude was rounded up."""
    shifted = result.view(torch.int16) - (result.view(torch.int16) & 1)
    return shifted.view(result.dtype)


def _renormalised(hidden: Tensor, weights: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    total = weights.sum(dim=-1, keepdim=True)
    return hidden, torch.where(total > 0, weights / total, weights), ids


def _weights_in_bf16(hidden: Tensor, weights: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return hidden, weights.to(torch.bfloat16).float(), ids


AROUND = (
    Fault("gate_up_swapped", "gate-up-swapped", "up rows are taken for gate rows", False, _weights(_gate_up_swapped)),
    Fault(
        "scales_not_swapped",
        "scales-not-swapped-with-weights",
        "the gate's scales meet the up's weights",
        False,
        _weights(_scales(lambda scale: _swap_halves(scale) if scale.dim() > 1 else scale.flip(0), "w13_scale")),
    ),
    Fault(
        "expert0_scale",
        "expert0-scale-for-all",
        "the scale's stride over experts is 0",
        False,
        _weights(_scales(_expert0_scale, "w13_scale", "w2_scale")),
    ),
    Fault(
        "scale_transposed",
        "weight-scale-transposed",
        "block scales are read in the other order",
        False,
        _weights(_scales(_transposed, "w13_scale", "w2_scale")),
    ),
    Fault(
        "one_block_off",
        "",
        "one scale of w2 in each expert is 5% too large",
        True,
        _weights(_scales(_one_block_off, "w2_scale")),
    ),
    Fault("tail_dropped", "k-tail-dropped", "the last 32 of K are skipped", False, _weights(_tail_dropped)),
    Fault(
        "duplicate_dropped",
        "duplicate-topk-dropped",
        "an expert listed twice for a token counts once",
        False,
        _call(_duplicate_dropped),
    ),
    Fault(
        "last_token_lost", "last-row-of-expert-lost", "the last row is never written", False, _result(_last_token_lost)
    ),
    Fault("weights_in_bf16", "weights-downcast", "routing weights are rounded to bf16", True, _call(_weights_in_bf16)),
    Fault(
        "renormalised",
        "renorm-flag-ignored",
        "routing weights are renormalised though the router gave them as they are",
        False,
        _call(_renormalised),
    ),
    Fault("gain_half_percent", "", "the result is 0.5% too large", True, _result(lambda result: result * 1.005)),
    Fault("output_truncated", "", "the last bit of the output is always 0", True, _result(_truncated)),
)
