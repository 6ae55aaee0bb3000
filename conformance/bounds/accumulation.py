"""How far a GEMM's accumulation may be from the exact sum: fp32 in any order, and matrix units that truncate.

u = 2^-24. Every formula is for one output element: K products p = a W, exact sum z, prefix sums in the order of K.
What is *sound* holds always; what is *six sigma* holds for errors that are independent and uniform where nothing else
is known of them. `tests/unit/test_accumulation.py` measures error/bound against a simulator of the exact rule.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from fp8moe.recipe import Arithmetic
from fp8moe.reference.problem import chunk_elements

U = 2.0**-24
"""Unit roundoff of fp32."""
TINY = 2.0**-126
"""Smallest normal fp32 number: a device may flush what is below."""
SIGMAS = 6.0
"""Two-sided 2e-9: a case has up to 1e8 elements of the intermediate, and hundreds of cases must raise no alarm."""
PREFIX = 128
"""Terms between two samples of the prefix sum under fp32: the formula was measured with this."""
SCALE_ROUNDINGS = 4
"""Roundings of a result's way out of the accumulator: two scales, their product, the bias (sound)."""
PRODUCT_ROUNDINGS = 3
"""Roundings of one product: both factors, where they are dequantised first, and itself."""
FP32_FRACTION_BITS = 23

UNKNOWN = Arithmetic("unknown", fraction_bits=13, group=32, promote_every=128)
"""What an undeclared arithmetic is judged as: the coarsest FP8 unit in use (Hopper's wgmma and Ada's mma keep 13 bits),
promoted to fp32 every 128 terms. Without promotion the bound would grow with K until nothing could fail it, so a
backend that never promotes has to say so."""


@dataclass(frozen=True)
class Operands:
    """The two sides of a GEMM, a @ weight.T, dequantised; all float64.

    Args:
        a: (P, K).
        weight: (N, K).
        least_a, least_weight: that broadcast to them: the smallest normal number of their format at their scales,
            which stands for a subnormal number's exponent; 0 where there is none to speak of.
        product_bits: fraction bits of a product: 6 for FP8 by FP8, 14 for bf16 by bf16, 20 for fp16 by fp16.
    """

    a: Tensor
    weight: Tensor
    least_a: Tensor
    least_weight: Tensor
    product_bits: int

    def rows(self, start: int, stop: int) -> Operands:
        """With a part of the weight's rows."""
        least = self.least_weight.expand(self.weight.shape[0], -1)[start:stop]
        return Operands(self.a, self.weight[start:stop], self.least_a, least, self.product_bits)


def accumulation_error(operands: Operands, arithmetic: Arithmetic) -> Tensor:
    """Bound of |computed - exact| for a GEMM: (P, N) float64."""
    bound = _float32_error(operands.a, operands.weight)
    if arithmetic.fraction_bits is None:
        return bound
    step = max(chunk_elements(bound.device) // max(operands.a.numel(), 1), 1)
    rows = range(0, operands.weight.shape[0], step)
    return bound + torch.cat([truncation_error(operands.rows(at, at + step), arithmetic) for at in rows], dim=1)


def grouped_products(a: Tensor, weight: Tensor, size: int) -> Tensor:
    """Partial sums of a @ weight.T over each `size` terms of K, the last ones partial: (groups, P, N)."""
    short = -a.shape[1] % size
    left = pad(a, (0, short)).view(a.shape[0], -1, size).transpose(0, 1)
    right = pad(weight, (0, short)).view(weight.shape[0], -1, size).permute(1, 2, 0)
    return torch.bmm(left, right)


def _float32_error(a: Tensor, weight: Tensor) -> Tensor:
    """fp32, rounded to nearest, any order: 2 u sqrt(K P^2 + (K + 9) Q^2), six sigma.

    A partial sum s is rounded with an error uniform in +-u |s|: variance u^2 s^2 / 3. Over random orders the mean
    square of s is z^2 / 3 + Q^2 / 6, Q^2 = sum p^2; so K additions have 6 sigma = 2 u sqrt(K) sqrt(z^2 + Q^2 / 2).
    The largest prefix P takes the place of |z|, for orders whose partial sums are larger than their end (the
    specification of error bounds measured error/bound at most 0.81). A product is itself rounded up to three times,
    two factors being dequantised to fp32: variance u^2 p^2, 6 sigma = 6 u Q, which is the 9. Sound: roundings of
    scales and bias after the sum, and products flushed to 0.
    """
    terms = a.shape[1]
    prefix = a.new_zeros(a.shape[0], weight.shape[0])
    largest = prefix
    for start in range(0, terms, PREFIX):
        block = slice(start, start + PREFIX)
        prefix = torch.addmm(prefix, a[:, block], weight[:, block].t())
        largest = torch.maximum(largest, prefix.abs())
    squares = a.square() @ weight.square().t()
    bound: Tensor = 2 * U * (terms * largest.square() + (terms + PRODUCT_ROUNDINGS**2) * squares).sqrt()
    return bound + SCALE_ROUNDINGS * U * prefix.abs() + terms * TINY


def truncation_error(operands: Operands, arithmetic: Arithmetic) -> Tensor:
    """What a matrix unit adds: it truncates towards zero, so its errors have a mean as well as a spread.

    The rule (measured on Hopper; of other units: MMA-Sim, arXiv 2511.10909): K is taken in groups of L. Of a group's
    products and the running sum c, E is the largest exponent, a product's being the sum of its factors', a subnormal
    one's that of the smallest normal number. Each is truncated to a multiple of 2^(E - F), they are added exactly, and
    the sum is truncated to F + 1 significant bits (fp32 where F > 23). A chain of `promote_every` terms starts from 0,
    and chains are added in fp32.

    With c the exact prefix sums and q = 2^-F max(|c before|, |c after|, largest product) >= 2^(E - F):

    - *sound*: (L + 1) q + r a group, where r = 2^-F |c after| (2^-23 for fp32) is its last bit's unit.
    - *mean and six sigma*: the sum's own truncation loses r / 2 on average, the aligned c loses q / 2, and of the
      products only those lose anything whose last bit lies below the quantum, |p| < 2^(product_bits + 1) q: at most
      |p|, q / 2 on average. The losses carry the sign of what is truncated, so the mean is a signed sum, small where
      signs mix and the whole of the error where they do not; a uniform loss of mean m has the variance m^2 / 3.

    The result is the smaller of the two. The "p14" formula of that specification,
    u_p (2 |z| + 4.1 sqrt((Q^2 + T^2) / 2)), was fitted to a model made before the rule was known: the rule exceeds it
    3.9-fold on same-sign data over 12 binades and, without promotion, 36-fold at K = 4096. Measured against the
    simulated rule on ten data laws, F = 13 and 25, K = 128 to 4096: error/bound at most 0.56 here.
    """
    group = arithmetic.group
    terms = operands.a.shape[1]
    chain = -(-min(arithmetic.promote_every or terms, terms) // group) * group

    def products(a: Tensor, weight: Tensor) -> Tensor:
        """(P, N, chains, groups, L)"""
        left, right = pad(a, (0, -terms % chain))[:, None], pad(weight, (0, -terms % chain))[None]
        return (left * right).view(len(a), len(weight), -1, chain // group, group)

    addends = products(operands.a, operands.weight)
    exponents = products(_lifted(operands.a, operands.least_a), _lifted(operands.weight, operands.least_weight))
    after = addends.sum(-1).cumsum(-1)
    before = pad(after[..., :-1], (1, 0))
    fraction_bits = arithmetic.fraction_bits or 0
    quantum = 2.0**-fraction_bits * torch.maximum(exponents.amax(-1), torch.maximum(after.abs(), before.abs()))
    carried = 2.0 ** -min(fraction_bits, FP32_FRACTION_BITS) * after.abs()
    sound = ((group + 1) * quantum + carried).sum((-1, -2))
    exact = exponents >= (2.0 ** (operands.product_bits + 1) * quantum).unsqueeze(-1)
    loss = torch.minimum(addends.abs(), quantum.unsqueeze(-1) / 2).masked_fill(exact, 0.0)
    mean = (
        torch.copysign(loss, addends).sum(-1) + torch.sign(after) * carried / 2 + torch.sign(before) * quantum / 2
    ).sum((-1, -2))
    variance = (loss.square().sum(-1) / 3 + (carried.square() + quantum.square()) / 12).sum((-1, -2))
    return torch.minimum(mean.abs() + SIGMAS * variance.sqrt(), sound)


def _lifted(values: Tensor, least: Tensor) -> Tensor:
    """Magnitudes whose exponents are those that the unit sees; 0 has none."""
    return torch.where(values == 0, 0.0, torch.maximum(values.abs(), least))
