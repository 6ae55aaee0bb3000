"""The portable activations, step by step in fp32, as `fp8moe.kernels.activation` computes them on every device.

Each operation below is one IEEE rounding to nearest even: products, sums and quotients of fp32 tensors, and `fma32`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fp8moe.reference.rounding import fma32

LARGEST_ARGUMENT = 88.72283172607422
ROUNDER = 12582912.0  # 1.5 * 2^23: adding it leaves an integer in the low bits
EXPONENTIAL = (0.0013814598787575960, 0.008368717506527901, 0.04166838899254799, 0.16666521131992340)
EXPONENTIAL_END = (0.49999994039535522, 1.0, 1.0)
GELU_POLYNOMIAL = (
    -3.1558392947772518e-05,
    -4.9800783017417416e-05,
    0.00039552670205011964,
    0.00088136515114456415,
    -0.0018838857067748904,
    -0.015101753175258636,
    -0.046630315482616425,
    -0.096784129738807678,
    -0.15197417140007019,
    -0.18882128596305847,
)
LIMIT = 7.0
ALPHA = 1.702


def _constant(value: float, like: Tensor) -> Tensor:
    return torch.full_like(like, value)


def exponential(x: Tensor) -> Tensor:
    """e^x: n = x / ln 2 rounded, r = x - n ln 2 with ln 2 in two parts, a polynomial in r, times 2^n in two factors."""

    def constant(value: float) -> Tensor:
        return _constant(value, x)

    clamped = torch.where(x > LARGEST_ARGUMENT, LARGEST_ARGUMENT, torch.where(x < -104.0, -104.0, x))
    clamped = torch.where(x == x, clamped, 0.0)
    n = fma32(clamped, constant(1.4426950216293335), constant(ROUNDER)) - ROUNDER
    r = fma32(n, constant(-0.693145751953125), clamped)
    r = fma32(n, constant(-1.428606765330187e-06), r)
    p = constant(EXPONENTIAL[0])
    for coefficient in (*EXPONENTIAL[1:], *EXPONENTIAL_END):
        p = fma32(p, r, constant(coefficient))
    whole = n.to(torch.int32)
    half = whole >> 1
    low, high = (((part + 127) << 23).view(torch.float32) for part in (half, whole - half))
    result = p * low * high
    return torch.where(x == x, torch.where(x > LARGEST_ARGUMENT, torch.inf, result), x)


def silu(x: Tensor) -> Tensor:
    return x / (1.0 + exponential(-x))


def gelu(x: Tensor) -> Tensor:
    """x Phi(x) as max(x, 0) - a q(a) e^(-a^2 / 2) with a = |x| and q a polynomial in 2t - 1, t = 1 / (1 + a / 4)."""

    def constant(value: float) -> Tensor:
        return _constant(value, x)

    a = x.abs()
    a = torch.where(a > 15.0, 15.0, a)
    s = a * 0.25
    t = constant(1.0) / (1.0 + s)
    lacking = t * fma32(-t, s, 1.0 - t)
    u = fma32(constant(2.0), lacking, fma32(constant(2.0), t, constant(-1.0)))
    p = constant(GELU_POLYNOMIAL[0])
    for coefficient in GELU_POLYNOMIAL[1:]:
        p = fma32(p, u, constant(coefficient))
    w = fma32(p, lacking, p * t) * a
    square = a * a
    w = fma32(w, fma32(-a, a, square) * 0.5, w)
    return fma32(exponential(square * -0.5), w, torch.where(x < 0, x * 0.0, x))


def _clamped(x: Tensor) -> Tensor:
    """To +-LIMIT; NaN stays NaN."""
    return torch.where(x > LIMIT, LIMIT, torch.where(x < -LIMIT, -LIMIT, x))


def _at_most(x: Tensor) -> Tensor:
    return torch.where(x > LIMIT, LIMIT, x)


def _swigluoai(gate: Tensor) -> Tensor:
    gate = _at_most(gate)
    return gate / (1.0 + exponential(-(gate * _constant(ALPHA, gate))))


@dataclass(frozen=True)
class Portable:
    """(P, 2I) gate then up, or (P, I), to (P, I).

    Args:
        of_gate: the gate's part, or all of an activation without one.
        of_up: what that is multiplied with; None without a gate.
    """

    of_gate: Callable[[Tensor], Tensor]
    of_up: Callable[[Tensor], Tensor] | None = None

    def __call__(self, first: Tensor, gate_dtype: torch.dtype = torch.float32) -> Tensor:
        """`gate_dtype`: what the gate's part is rounded to before the product, where there is one."""
        if self.of_up is None:
            return self.of_gate(first)
        gate, up = first.chunk(2, dim=-1)
        return self.of_gate(gate).to(gate_dtype).float() * self.of_up(up)


PORTABLE = {
    "silu": Portable(silu, lambda up: up),
    "gelu": Portable(gelu, lambda up: up),
    "swigluoai": Portable(_swigluoai, lambda up: _clamped(up) + 1.0),
    "swiglustep": Portable(lambda gate: _at_most(silu(gate)), _clamped),
    "silu_no_mul": Portable(silu),
    "gelu_no_mul": Portable(gelu),
    "relu2_no_mul": Portable(lambda x: torch.where(x > 0, x, torch.where(x == x, 0.0, x)).square()),
}
"""By the names of `fp8moe.activations`."""
