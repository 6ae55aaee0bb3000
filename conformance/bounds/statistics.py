"""The ratios of an error to its bound, each with limit 1: E1 and E3 per element, TN and gain per token (spec/bounds.md)."""

from __future__ import annotations

import torch
from torch import Tensor

from conformance.bounds.allowance import half_spacing
from fp8moe.reference.rounding import FloatFormat

NORM_SIGMAS = 5.4
"""Six standard deviations of the mean of d^2 / v over H_eff columns: an error uniform in +-h has d^2 / (h^2 / 3) of mean
1 and variance 4/5, so 6 sqrt(4/5) = 5.37."""
GAIN_SIGMAS = 6.0
"""Of the least-squares estimate of a gain, whose standard deviation is 1 / sqrt(sum R^2 / v)."""


def element_ratio(error: Tensor, reference: Tensor, allowance: Tensor, fmt: FloatFormat) -> Tensor:
    """|d| / (2 hulp(|R| + B0 + X) + B0 + X): any faithful rounding of the output, and what may come before it.

    Where the reference and the allowance are 0 the output must be 0: anything else is infinitely wrong.
    """
    limit = 2 * half_spacing(reference.abs() + allowance, fmt) + allowance
    nothing = (reference == 0) & (allowance == 0)
    return torch.where(nothing, torch.where(error == 0, 0.0, torch.inf), error.abs() / limit)


def output_variance(reference: Tensor, allowance: Tensor, fmt: FloatFormat) -> Tensor:
    """v = hulp^2 / 3 + (B0 + X)^2: an output rounded to nearest errs uniformly within a half spacing."""
    return half_spacing(reference.abs() + allowance, fmt).square() / 3 + allowance.square()


def token_norm_ratio(error: Tensor, variance: Tensor) -> Tensor:
    """TN, (T,): (sum d^2 / sum v) / (1 + 5.4 / sqrt(H_eff)), H_eff = (sum v)^2 / sum v^2."""
    scale = variance.amax(-1, keepdim=True)  # v itself may be too small to be squared
    relative = variance / scale
    total = relative.sum(-1)
    effective = total.square() / relative.square().sum(-1)
    return (error.square() / scale).sum(-1) / total / (1 + NORM_SIGMAS / effective.sqrt())


def gain_ratio(error: Tensor, reference: Tensor, allowance: Tensor, variance: Tensor) -> Tensor:
    """(T,): |sum d R / v / sum R^2 / v| / (6 / sqrt(sum R^2 / v) + sum (B0 + X) |R| / v / sum R^2 / v)."""
    weight = reference / variance
    information = (weight * reference).sum(-1)
    slack = GAIN_SIGMAS * information.sqrt() + (weight.abs() * allowance).sum(-1)
    return torch.where(information == 0, 0.0, (error * weight).sum(-1).abs() / slack)


def pooled_gain_ratio(error: Tensor, reference: Tensor, allowance: Tensor, variance: Tensor) -> float:
    """The same over all tokens at once."""
    flat = [value.reshape(1, -1) for value in (error, reference, allowance, variance)]
    return float(gain_ratio(*flat)[0]) if flat[0].numel() else 0.0
