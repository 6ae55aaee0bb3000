"""The ratios of an error to its bound, each with limit 1: E1 and E3 for elements, TN and gain for tokens.

`aggregates.py` has those of parts of an output and of the whole."""

from __future__ import annotations

import torch
from torch import Tensor

from conformance.bounds.allowance import half_spacing
from fp8moe.reference.rounding import FloatFormat

NORM_SIGMAS = 5.4
"""Six standard deviations of the mean of d^2 / v over H_eff columns: for an error uniform in +-h, d^2 / (h^2 / 3) has
the mean 1 and the variance 4/5, and 6 sqrt(4/5) = 5.37."""
GAIN_SIGMAS = 6.0
"""Of the least-squares estimate of a gain, whose standard deviation is 1 / sqrt(sum R^2 / v)."""
SAME_MANTISSA = 2.0**20
"""Mantissas are compared to this many parts: fine enough that two of 7,168 random ones seldom agree."""


def element_ratio(error: Tensor, reference: Tensor, allowance: Tensor, fmt: FloatFormat) -> Tensor:
    """|d| / (2 hulp(|R| + B0 + X) + B0 + X): any faithful rounding of the output, and what may come before it.

    Where the reference and the allowance are 0 the output must be 0: anything else is infinitely wrong.
    """
    limit = element_bound(reference, allowance, fmt)
    return torch.where(limit == 0, torch.where(error == 0, 0.0, torch.inf), error.abs() / limit)


def element_bound(reference: Tensor, allowance: Tensor, fmt: FloatFormat) -> Tensor:
    """What the error of each element may be: 2 hulp(|R| + B0 + X) + B0 + X; 0 where both are 0."""
    nothing = (reference == 0) & (allowance == 0)
    return torch.where(nothing, 0.0, 2 * half_spacing(reference.abs() + allowance, fmt) + allowance)


def output_variance(reference: Tensor, allowance: Tensor, fmt: FloatFormat) -> Tensor:
    """v = hulp^2 / 3 + (B0 + X)^2: an output rounded to nearest errs uniformly within a half spacing."""
    return half_spacing(reference.abs() + allowance, fmt).square() / 3 + allowance.square()


def token_norm_ratio(error: Tensor, reference: Tensor, allowance: Tensor, fmt: FloatFormat) -> Tensor:
    """TN, (T,): (sum d^2 / sum v) / (1 + 5.4 / sqrt(H_eff)).

    The mean of hulp^2 / 3 in v takes outputs that lie anywhere between two numbers of the format. Where they do not
    (a bias alone, a few values in many columns), the reference's own rounding errors may add up to more: then those
    count, since the right output has them.

    H_eff = (sum v)^2 / sum of squares of the v of columns that are rounded alike (`rounded_alike`).
    """
    variance = output_variance(reference, allowance, fmt)
    scale = variance.amax(-1, keepdim=True)  # v itself may be too small to be squared
    relative = variance / scale
    own = own_rounding(reference, fmt).square()
    rounding = half_spacing(reference.abs() + allowance, fmt).square() / 3
    excess = ((own.sum(-1) - rounding.sum(-1)) / scale[:, 0]).clamp(min=0.0)
    total = relative.sum(-1) + excess
    effective = total.square() / rounded_alike(reference, relative).square().sum(-1)
    return (error.square() / scale).sum(-1) / total / (1 + NORM_SIGMAS / effective.sqrt())


def own_rounding(reference: Tensor, fmt: FloatFormat) -> Tensor:
    """What rounding the reference itself to nearest adds to it."""
    distance = 2 * half_spacing(reference, fmt)
    return (reference / distance).round() * distance - reference


def gain_ratio(error: Tensor, reference: Tensor, allowance: Tensor, fmt: FloatFormat) -> Tensor:
    """(T,): |sum d R / v| / (6 sqrt(sum R^2 / v) + |sum e R / v| + sum (B0 + X) |R| / v).

    Both sides over sum R^2 / v are a gain: the least-squares estimate of it, and how far it may be from 1.

    e is the reference's own rounding error, which the right output has: where a few values fill many columns, as in a
    token that is its bias alone, it is no mean of independent ones.
    Columns that are rounded alike err together: under the first root stands the sum of squares of their sums. And
    where the output is subnormal, errors follow R, of which all below half a spacing is lost: there the half spacing
    counts as allowance.
    """
    variance = output_variance(reference, allowance, fmt)
    subnormal = reference.abs() + allowance < 2.0**fmt.min_exponent
    slack = allowance + torch.where(subnormal, half_spacing(reference, fmt), 0.0)
    weight = reference / variance
    spread = rounded_alike(reference, reference.abs() / variance.sqrt()).square().sum(-1).sqrt()
    own = (own_rounding(reference, fmt) * weight).sum(-1).abs()
    limit = GAIN_SIGMAS * spread + own + (weight.abs() * slack).sum(-1)
    return torch.where(limit == 0, 0.0, (error * weight).sum(-1).abs() / limit)


def rounded_alike(reference: Tensor, values: Tensor) -> Tensor:
    """(T, H): sums of `values` over the columns of a token whose references have one mantissa, in any of its places.

    Such columns are rounded with the same relative error. Outputs of a token with a single element in its
    intermediate have no more than eight mantissas, which FP8 weights have.
    """
    mantissa = same_mantissa(reference)
    order = mantissa.argsort(dim=-1)
    mantissa, values = mantissa.gather(-1, order), values.gather(-1, order)
    first = torch.ones_like(mantissa, dtype=torch.int64)
    first[:, 1:] = (mantissa[:, 1:] != mantissa[:, :-1]).to(torch.int64)
    return torch.zeros_like(values).scatter_add(-1, first.cumsum(-1) - 1, values)


def same_mantissa(reference: Tensor) -> Tensor:
    """int64 from 0 to 2^20: elements that are rounded alike have it in common."""
    return (torch.frexp(reference.abs())[0] * SAME_MANTISSA).round().to(torch.int64)
