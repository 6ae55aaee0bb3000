"""The activations of the recipe oracle in float64, as curves whose range over an interval is known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

LIMIT = 7.0
ALPHA = 1.702
SILU_MINIMUM = -1.2784645427610738
GELU_MINIMUM = -0.7517915246935645


def _silu(value: Tensor) -> Tensor:
    return value * torch.sigmoid(value)


def _gelu(value: Tensor) -> Tensor:
    return value * 0.5 * torch.erfc(value * -(0.5**0.5))


def _swigluoai(value: Tensor) -> Tensor:
    clamped = value.clamp(max=LIMIT)
    return clamped * torch.sigmoid(ALPHA * clamped)


def _same(value: Tensor) -> Tensor:
    return value


def _clamped(value: Tensor) -> Tensor:
    return value.clamp(-LIMIT, LIMIT)


@dataclass(frozen=True)
class Activation:
    """curve(gate) * linear(up), or curve(value) where nothing is gated.

    Args:
        curve: falls to its only minimum at `minimum`, and rises from there; None: it never falls.
        linear: never falls; None where nothing is gated.
        exponential_slope: s of the exponential exp(-s x) inside, whose argument's roundings cost s |x| units.
        erf: 1 + erf(x) cancels for negative x, so that its error is absolute.
    """

    curve: Callable[[Tensor], Tensor]
    minimum: float | None
    linear: Callable[[Tensor], Tensor] | None = None
    exponential_slope: float = 0.0
    erf: bool = False


ACTIVATIONS: dict[str, Activation] = {
    "silu": Activation(_silu, SILU_MINIMUM, _same, 1.0),
    "gelu": Activation(_gelu, GELU_MINIMUM, _same, erf=True),
    # alpha is itself rounded to float32, and multiplied: twice the slope.
    "swigluoai": Activation(_swigluoai, SILU_MINIMUM / ALPHA, lambda up: _clamped(up) + 1, 2 * ALPHA),
    "swiglustep": Activation(lambda gate: _silu(gate).clamp(max=LIMIT), SILU_MINIMUM, _clamped, 1.0),
    "silu_no_mul": Activation(_silu, SILU_MINIMUM, None, 1.0),
    "gelu_no_mul": Activation(_gelu, GELU_MINIMUM, None, erf=True),
    "relu2_no_mul": Activation(lambda value: value.clamp(min=0.0) ** 2, None),
}


def activation_of(name: str) -> Activation:
    """The activation of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"activation={name!r}: expected one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def gate_part(activation: Activation, first: Tensor) -> Tensor:
    """Of the first GEMM's result, (P, 2I) or (P, I): the curve, (P, I)."""
    return activation.curve(first if activation.linear is None else first.chunk(2, dim=-1)[0])


def activated(
    activation: Activation, first: Tensor, gate_rounded: Callable[[Tensor], Tensor] = lambda part: part
) -> Tensor:
    """The first GEMM's result, (P, 2I) gate then up or (P, I), to (P, I); of the gate's part what is made of it."""
    if activation.linear is None:
        return gate_part(activation, first)
    return gate_rounded(gate_part(activation, first)) * activation.linear(first.chunk(2, dim=-1)[1])
