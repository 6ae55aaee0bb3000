"""Faults of scales: which of them a value meets, in what order they lie, what a loader makes of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from conformance.cases import Case
from conformance.zoo.around import _scales as scales
from conformance.zoo.around import _weights as weights
from conformance.zoo.inside import _computes as computes
from conformance.zoo.loaded_scales import (
    blocked_jointly,
    doubled,
    halves,
    last_block_of_the_neighbour,
    second_weights_scales,
    shifted_by_a_row,
    three_percent,
)
from conformance.zoo.plant import Fault
from conformance.zoo.quantisation import QUANTISATION, declaring, exponent_only, quantised_input, quantises
from fp8moe.keys import GroupShape
from fp8moe.quant import FusedMoEQuantDesc
from fp8moe.recipe import Recipe
from fp8moe.scaling import decode, dequantize, encode, quantize

BLOCK = Case(tokens=17)
CHANNEL = Case(tokens=17, scheme="channel_tok")
STATIC = Case(tokens=17, scheme="tensor_static")
DYNAMIC = Case(tokens=17, scheme="tensor_dyn")
SCALED = Case(tokens=17, values="block_scales")
EDGES = Case(tokens=17, hidden=272, inter=200)


def _repeated(self: Any, scale: Tensor) -> Tensor:
    """A scale a token, written four times over and read with one stride: every four tokens get the first's."""
    return scale.repeat(1, 4).reshape(-1, 1)[: len(scale)] if scale.shape[1] == 1 else scale


def _row_major(self: Any, scale: Tensor) -> Tensor:
    return scale.t().contiguous().view(scale.shape)


def _partial_group(self: Any, scale: Tensor) -> Tensor:
    """The group that the edge cuts off reads its neighbour's scale, in rows whose length is no multiple of 128."""
    columns = (self.config.hidden_dim, self.config.intermediate_size_per_partition)
    cut = {-(-size // 128) for size in columns if size % 128}
    if scale.shape[1] > 1 and scale.shape[1] in cut:
        scale = torch.cat([scale[:, :-1], scale[:, -2:-1]], 1)
    return scale


def _exact_weights(recipe: Recipe) -> Recipe:
    return replace(recipe, w13="exact", w2="exact")


def _unit_second_scale(base: Any) -> dict[str, Any]:
    def requantize(self: Any, intermediate: Tensor, expert: Tensor) -> Tensor:
        return intermediate if self.quant.a2.dtype is None else decode(encode(intermediate, self.fp8_dtype))

    return {"requantize": requantize}


def _second_scale_of_the_first(base: Any) -> dict[str, Any]:
    def requantize(self: Any, intermediate: Tensor, expert: Tensor) -> Tensor:
        scale = self.weights.a13_scale if self.weights.a2_scale is not None else None
        found: Tensor = self.through_fp8(intermediate, self.quant.a2, scale, None)
        return found

    return {"requantize": requantize}


def _static_ignored(base: Any) -> dict[str, Any]:
    def through_fp8(self: Any, values: Tensor, desc: FusedMoEQuantDesc, static: Tensor | None, *rest: Any) -> Tensor:
        found: Tensor = base.through_fp8(self, values, replace(desc, static=False), None, *rest)
        return found

    return {"through_fp8": through_fp8}


def _one_scale_for_all_tokens(base: Any) -> dict[str, Any]:
    def quantize_input(self: Any, tokens: Tensor, expert: Tensor | None) -> Tensor:
        desc = replace(self.quant.a1, shape=GroupShape.PER_TENSOR)
        found: Tensor = self.through_fp8(tokens, desc, self.weights.a13_scale, None)
        return found

    return {"quantize_input": quantize_input}


def _quantised_twice(self: Any, tokens: Tensor) -> Tensor:
    """Tokens arrive as FP8 with group scales, which nobody reads."""
    codes, _ = quantize(tokens, GroupShape(1, 128), dtype=self.fp8_dtype)
    return decode(codes)


def _from_the_wire(base: Any) -> dict[str, Any]:
    """Tokens are dispatched in FP8 with a scale for each 128 columns, then quantised once more as the scheme says."""

    def apply_batched(self: Any, hidden_states: Tensor, expert_num_tokens: Tensor) -> Tensor:
        group = GroupShape(1, 128)
        codes, scale = quantize(hidden_states, group)
        received = dequantize(codes, scale, group).to(hidden_states.dtype)
        found: Tensor = base.apply_batched(self, received, expert_num_tokens)
        return found

    return {"apply_batched": apply_batched}


def _scale_by_row(base: Any) -> dict[str, Any]:
    """Row r of an expert's batch takes the scale of expert r."""

    def second_gemm(self: Any, intermediate: Tensor, index: int) -> Tensor:
        scale = self.weights.w2_scale
        if scale is None or scale.dim() > 1:
            found: Tensor = base.second_gemm(self, intermediate, index)
            return found
        rows = torch.arange(len(intermediate), device=scale.device) % len(scale)
        total: Tensor = (intermediate @ decode(self.weights.w2[index]).t()) * scale[rows, None]
        bias = self.weights.w2_bias
        return total if bias is None else total + bias[index].float()

    return {"second_gemm": second_gemm}


def _multiplied_in_place(base: Any) -> dict[str, Any]:
    """In place of the weights' scale there is, after the first 16 rows, its product with the activations' scale."""

    def second_gemm(self: Any, intermediate: Tensor, index: int) -> Tensor:
        result: Tensor = base.second_gemm(self, intermediate, index)
        waves = torch.split(result, 16)
        factor = intermediate[:16].abs().amax() / 448
        return torch.cat([wave * factor**number for number, wave in enumerate(waves)])

    return {"second_gemm": second_gemm}


BOTH = ("w13_scale", "w2_scale")

SCALES = (
    *QUANTISATION,
    Fault(
        "token_scales_repeated",
        "per-token-scale-repeated",
        "a scale a token is written four times over, so that tokens read the scales of others",
        True,
        quantises(read=_repeated),
        CHANNEL,
    ),
    Fault(
        "token_scales_shifted",
        "",
        "an activation's scales are those of the token before: a row index that starts at 1 (made up)",
        False,
        quantises(read=lambda self, scale: scale.roll(1, 0)),
        SCALED,
    ),
    Fault(
        "activation_scales_row_major",
        "scale-rowmajor",
        "activation scales are written in the other order than they are read",
        False,
        quantises(read=_row_major),
        BLOCK,
    ),
    Fault(
        "static_scale_ignored",
        "",
        "activations are quantised with scales of their own where calibrated ones are given, as paths for dynamic "
        "scales do that are shared with static ones",
        True,
        _static_ignored,
        STATIC,
    ),
    Fault(
        "static_scale_twice",
        "",
        "the result meets a static activation scale twice: folded into the weights' scale and passed beside it",
        True,
        quantises(read=lambda self, scale: scale * scale if self.quant.a1.static else scale),
        STATIC,
    ),
    Fault(
        "static_scale_inverted",
        "",
        "a static scale is taken for its inverse: libraries disagree about which of them `scale` is",
        True,
        quantises(static=lambda self, scale: 1 / scale),
        STATIC,
    ),
    Fault(
        "second_static_scale_is_the_first",
        "",
        "the second GEMM's static scale is the first's: one entry of a checkpoint loaded for both",
        True,
        _second_scale_of_the_first,
        STATIC,
    ),
    Fault(
        "unit_second_scale",
        "gemm2-implicit-unit-scale",
        "the intermediate is cast to FP8 with scale 1",
        True,
        _unit_second_scale,
        STATIC,
    ),
    Fault(
        "partial_group_takes_its_neighbour",
        "",
        "a group that the edge cuts off reads the scale of the one before it: the count of groups rounded down",
        True,
        quantises(read=_partial_group),
        EDGES,
    ),
    Fault(
        "one_scale_for_all_tokens",
        "",
        "the first quantisation has one scale for the whole batch instead of one a token or group",
        True,
        _one_scale_for_all_tokens,
        CHANNEL,
    ),
    Fault(
        "scales_discarded",
        "dispatch-scale-discarded",
        "tokens are quantised, their scales lost, and the codes quantised again",
        False,
        quantised_input(_quantised_twice),
    ),
    Fault(
        "scale_by_row",
        "residual-scale-row-vs-expert",
        "a scale an expert is read by the row in the expert's batch",
        True,
        _scale_by_row,
        replace(STATIC, values="bimodal_scales"),
    ),
    Fault(
        "weight_scale_multiplied_in_place",
        "b-scale-mutated-across-waves",
        "after 16 rows of an expert the weights' scale holds its product with the activations'",
        False,
        _multiplied_in_place,
        Case(tokens=40, experts=2),
    ),
    Fault(
        "weight_scales_without_mantissa",
        "ue8m0-weights-not-requant",
        "of arbitrary weight scales only the exponent is used",
        False,
        weights(scales(exponent_only, *BOTH)),
    ),
    Fault(
        "weights_not_requantised",
        "",
        "weights quantised anew with powers of two are declared, and the checkpoint's are multiplied",
        True,
        declaring(computes(_exact_weights), w13="requantised", w2="requantised"),
    ),
    Fault(
        "weight_scales_in_bf16",
        "",
        "weight scales are stored as bf16 by a loader",
        True,
        weights(scales(lambda s: s.bfloat16().float(), *BOTH)),
    ),
    Fault(
        "weight_scales_in_fp16",
        "small-scale-precision",
        "weight scales pass through fp16, in which small ones keep few bits",
        True,
        weights(scales(lambda scale: scale.half().float(), *BOTH)),
        Case(tokens=17, values="bimodal_scales"),
    ),
    Fault(
        "fnuz_scales_doubled",
        "fnuz-scale-x2",
        "w13's scales are doubled for e4m3fnuz, and the codes are e4m3fn",
        True,
        weights(doubled),
    ),
    Fault(
        "channel_scales_shifted",
        "",
        "a weight row takes the scale of the row before it: an offset into a fused gate and up (made up)",
        False,
        weights(scales(shifted_by_a_row, *BOTH)),
        replace(CHANNEL, values="block_scales"),
    ),
    Fault(
        "second_weights_scales",
        "",
        "w13's scales are w2's: a loader that maps both names to one",
        False,
        weights(second_weights_scales),
    ),
    Fault(
        "gate_scale_for_both",
        "",
        "the up's weights take the gate's scales: one pointer to a fused tensor's",
        True,
        weights(scales(halves(lambda gate, up: (gate, gate)), "w13_scale")),
        SCALED,
    ),
    Fault(
        "larger_half_for_both",
        "",
        "gate and up take the larger of their scales, and the codes stay as they were: fusing two checkpoints' tensors",
        True,
        weights(scales(halves(lambda gate, up: (gate.maximum(up), gate.maximum(up))), "w13_scale")),
    ),
    Fault(
        "partial_block_takes_its_neighbour",
        "",
        "the last block of K of a weight reads the scale of the block before it: a count of blocks rounded down",
        True,
        weights(scales(last_block_of_the_neighbour, *BOTH)),
        EDGES,
    ),
    Fault(
        "halves_blocked_jointly",
        "",
        "w13's row blocks are counted through gate and up, though each half begins a block of its own",
        True,
        blocked_jointly,
        EDGES,
    ),
    Fault(
        "one_scale_three_percent",
        "",
        "one scale of w13 is 3% too large: the smallest slip of a repacking that bounds are asked to see",
        True,
        weights(scales(three_percent, "w13_scale")),
        SCALED,
    ),
    Fault(
        "scale_over_all_experts",
        "",
        "a dynamic per-tensor scale is the whole batch's where one of each expert is declared",
        True,
        computes(lambda recipe: replace(recipe, dynamic_tensor_scope="batch")),
        DYNAMIC,
        format="Batched",
    ),
    Fault(
        "quantised_on_the_wire",
        "",
        "tokens are dispatched in FP8 and quantised again on arrival, as low-latency dispatch does; undeclared",
        True,
        _from_the_wire,
        CHANNEL,
        format="Batched",
    ),
)
