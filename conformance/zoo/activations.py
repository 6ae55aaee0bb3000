"""Faults of the activation between the GEMMs, and of the biases before it and after."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu, silu

from conformance.cases import Case
from conformance.zoo.around import _weights as weights
from conformance.zoo.override import overriding
from conformance.zoo.plant import Fault
from fp8moe.activations import SWIGLU_LIMIT, SWIGLUOAI_ALPHA
from fp8moe.experts import MoEWeights

SILU = Case(tokens=17)
GELU = Case(tokens=17, activation="gelu")
OAI = Case(tokens=17, activation="swigluoai", values="loud_quiet")
STEP = Case(tokens=17, activation="swiglustep", values="loud_quiet")
BIASED = Case(tokens=17, bias=True)


def _halves(gate_up: Tensor) -> tuple[Tensor, Tensor]:
    gate, up = gate_up.chunk(2, -1)
    return gate, up


def _limited(values: Tensor) -> Tensor:
    return values.clamp(-SWIGLU_LIMIT, SWIGLU_LIMIT)


def _sigmoid_times(values: Tensor, alpha: float = SWIGLUOAI_ALPHA) -> Tensor:
    return values * torch.sigmoid(alpha * values)


@overriding(
    "activation",
    "swigluoai's up is limited from above only, as its gate is",
    catalogue="clamp-one-sided-mixup",
    subtle=True,
    witness=OAI,
)
def up_limited_from_above(right: Any, self: Any, gate_up: Tensor) -> Any:
    if self.config.activation != "swigluoai":
        return right(self, gate_up)
    gate, up = _halves(gate_up)
    return _sigmoid_times(gate.clamp(max=SWIGLU_LIMIT)) * (up.clamp(max=SWIGLU_LIMIT) + 1)


@overriding(
    "activation",
    "swigluoai's gate is limited from both sides, as its up is: one limit read for both",
    subtle=True,
    witness=replace(OAI, tokens=33, values="single_block"),
)
def gate_limited_from_below(right: Any, self: Any, gate_up: Tensor) -> Any:
    if self.config.activation != "swigluoai":
        return right(self, gate_up)
    gate, up = _halves(gate_up)
    return _sigmoid_times(_limited(gate)) * (_limited(up) + 1)


@overriding("activation", "swigluoai's limits change places: the gate's is the up's", subtle=True, witness=OAI)
def limits_exchanged(right: Any, self: Any, gate_up: Tensor) -> Any:
    if self.config.activation != "swigluoai":
        return right(self, gate_up)
    gate, up = _halves(gate_up)
    return _sigmoid_times(_limited(gate)) * (up.clamp(max=SWIGLU_LIMIT) + 1)


@overriding("activation", "swigluoai has no limits: a flag that stays None", subtle=True, witness=OAI)
def limits_missing(right: Any, self: Any, gate_up: Tensor) -> Any:
    if self.config.activation != "swigluoai":
        return right(self, gate_up)
    gate, up = _halves(gate_up)
    return _sigmoid_times(gate) * (up + 1)


@overriding(
    "activation", "swiglustep's up is not limited: the limit of the gate alone was ported", subtle=True, witness=STEP
)
def step_up_unlimited(right: Any, self: Any, gate_up: Tensor) -> Any:
    if self.config.activation != "swiglustep":
        return right(self, gate_up)
    gate, up = _halves(gate_up)
    return silu(gate).clamp(max=SWIGLU_LIMIT) * up


@overriding(
    "activation", "swiglustep limits the gate before silu, as swigluoai does, and not after", subtle=True, witness=STEP
)
def step_limited_before_silu(right: Any, self: Any, gate_up: Tensor) -> Any:
    if self.config.activation != "swiglustep":
        return right(self, gate_up)
    gate, up = _halves(gate_up)
    return silu(gate.clamp(max=SWIGLU_LIMIT)) * _limited(up)


@overriding("activation", "swigluoai's up lacks its + 1: taken for plain swiglu with limits", subtle=True, witness=OAI)
def one_not_added(right: Any, self: Any, gate_up: Tensor) -> Any:
    if self.config.activation != "swigluoai":
        return right(self, gate_up)
    gate, up = _halves(gate_up)
    return _sigmoid_times(gate.clamp(max=SWIGLU_LIMIT)) * _limited(up)


@overriding(
    "activation", "swigluoai's alpha is 1.7 instead of 1.702: a constant in few digits", subtle=True, witness=OAI
)
def alpha_of_two_digits(right: Any, self: Any, gate_up: Tensor) -> Any:
    if self.config.activation != "swigluoai":
        return right(self, gate_up)
    gate, up = _halves(gate_up)
    return _sigmoid_times(gate.clamp(max=SWIGLU_LIMIT), 1.7) * (_limited(up) + 1)


@overriding("activation", "gelu is its tanh approximation, the default of other frameworks", subtle=True, witness=GELU)
def gelu_by_tanh(right: Any, self: Any, gate_up: Tensor) -> Any:
    if self.config.activation not in ("gelu", "gelu_no_mul"):
        return right(self, gate_up)
    if not self.config.is_act_and_mul:
        return gelu(gate_up, approximate="tanh")
    gate, up = _halves(gate_up)
    return gelu(gate, approximate="tanh") * up


@overriding("activation", "silu has swigluoai's alpha: x sigmoid(1.702 x)", subtle=True, witness=SILU)
def silu_with_alpha(right: Any, self: Any, gate_up: Tensor) -> Any:
    if self.config.activation != "silu":
        return right(self, gate_up)
    gate, up = _halves(gate_up)
    return _sigmoid_times(gate) * up


@overriding(
    "activation",
    "silu's sigmoid is (1 + tanh(x / 2)) / 2 with a tanh of 11 bits, as NVIDIA's tanh.approx has",
    subtle=True,
    witness=SILU,
)
def sigmoid_by_coarse_tanh(right: Any, self: Any, gate_up: Tensor) -> Any:
    if self.config.activation != "silu":
        return right(self, gate_up)
    gate, up = _halves(gate_up)
    tanh = (torch.tanh(gate / 2).view(torch.int32) + (1 << 12) & -(1 << 13)).view(torch.float32)
    return gate * (0.5 + 0.5 * tanh) * up


@overriding("activation", "silu saturates outside +-4: a table for small arguments", subtle=True, witness=SILU)
def silu_saturates(right: Any, self: Any, gate_up: Tensor) -> Any:
    if self.config.activation != "silu":
        return right(self, gate_up)
    gate, up = _halves(gate_up)
    return torch.where(gate.abs() > 4, gate.clamp(min=0), silu(gate)) * up


@overriding(
    "activation",
    "relu2 is relu: the square is lost where activations are chosen by prefix of their names",
    subtle=True,
    witness=Case(tokens=17, activation="relu2_no_mul"),
)
def square_lost(right: Any, self: Any, gate_up: Tensor) -> Any:
    return gate_up.relu() if self.config.activation == "relu2_no_mul" else right(self, gate_up)


@overriding(
    "activation",
    "gate and up are read in turns though they lie one after the other",
    catalogue="interleaved-vs-halves",
    witness=SILU,
)
def gate_and_up_in_turns(right: Any, self: Any, gate_up: Tensor) -> Any:
    if not self.config.is_act_and_mul:
        return right(self, gate_up)
    return right(self, torch.cat([gate_up[:, ::2], gate_up[:, 1::2]], 1))


@overriding(
    "first_gemm", "w13's bias is forgotten: a path that was written for models without", subtle=True, witness=BIASED
)
def first_bias_forgotten(right: Any, self: Any, inputs: Tensor, index: int) -> Any:
    return self.rounded(inputs @ self.weight("w13", index).t(), self.recipe.gemm1_output)


@overriding("second_gemm", "w2's bias is added twice, by each of two parts of a split K", subtle=True, witness=BIASED)
def second_bias_twice(right: Any, self: Any, intermediate: Tensor, index: int) -> Any:
    result, bias = right(self, intermediate, index), self.weights.w2_bias
    return result if bias is None else result + bias[index].float()


@overriding(
    "first_gemm",
    "w13's bias is added to the sum before the weights' scale: the accumulator begins with it",
    subtle=True,
    witness=replace(BIASED, scheme="channel_tok"),
)
def bias_before_the_scale(right: Any, self: Any, inputs: Tensor, index: int) -> Any:
    result, scale, bias = right(self, inputs, index), self.weights.w13_scale, self.weights.w13_bias
    if bias is None or scale is None or self.quant.w1.shape.is_block():
        return result
    return result + bias[index].float() * (scale[index].reshape(-1) - 1)


def _in_turns(given: MoEWeights) -> MoEWeights:
    bias = given.w13_bias
    if bias is None or bias.shape[1] % 2:
        return given
    return replace(given, w13_bias=torch.stack(bias.chunk(2, 1), 2).reshape(bias.shape))


def _of_the_next_expert(given: MoEWeights) -> MoEWeights:
    bias = given.w2_bias
    return given if bias is None else replace(given, w2_bias=bias.roll(-1, 0))


ACTIVATIONS = (
    up_limited_from_above,
    gate_limited_from_below,
    limits_exchanged,
    limits_missing,
    step_up_unlimited,
    step_limited_before_silu,
    one_not_added,
    alpha_of_two_digits,
    gelu_by_tanh,
    silu_with_alpha,
    sigmoid_by_coarse_tanh,
    silu_saturates,
    square_lost,
    gate_and_up_in_turns,
    first_bias_forgotten,
    second_bias_twice,
    bias_before_the_scale,
    Fault(
        "bias_in_turns",
        "",
        "w13's bias lies in turns, its weights in halves: one of two tensors converted from gpt-oss' layout",
        True,
        weights(_in_turns),
        BIASED,
    ),
    Fault(
        "bias_of_the_next_expert",
        "",
        "w2's bias is the next expert's: a pointer advanced before it is read",
        True,
        weights(_of_the_next_expert),
        BIASED,
    ),
)
