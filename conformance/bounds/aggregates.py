"""Ratios of many errors together, each with limit 1, over parts of an output that do not drown one another.

Blocks of columns, the tokens of one expert, the whole case: what is wrong with a part is not averaged with the rest.

Everything here rests on three facts about an honest output y = round(R + s), R the reference:

- *sound*: |s| is at most the slack, what may come before the rounding (B0, flips that cannot be told).
- *six sigma*: where R lies between two numbers of the format is uniform, and independent from element to element, but
  for those that are rounded alike. How far this fails is known from R itself and added: see `own_rounding`, `_forced`.
- *union bound*: N tests at once fail with N times the probability of one. A tail of exp(-z^2 / 2) stays at that of one
  test of six deviations where z^2 / 2 = 6^2 / 2 + ln N (`exponent`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from conformance.bounds.accumulation import SIGMAS
from conformance.bounds.allowance import half_spacing
from conformance.bounds.statistics import SAME_MANTISSA, own_rounding, same_mantissa
from fp8moe.reference.rounding import FloatFormat

BLOCK = 128
"""Columns of a block: those that share the scales of w2 and that most kernels give to one tile."""
DIRECTIONS = ("gain", "away", "upward")
"""What errors may be correlated with: the reference, its sign, and nothing, a plain sum."""


def exponent(tests: int) -> float:
    """L: a tail probability of exp(-L) for each of `tests` tests is exp(-18), six sub-Gaussian deviations, for all."""
    return SIGMAS**2 / 2 + math.log(max(tests, 1))


def bernstein(variance: Tensor, largest: Tensor, level: float) -> Tensor:
    """t with P(sum > t) <= exp(-L), of independent terms of mean 0 and at most `largest`, their variances added up.

    Bernstein's inequality P(sum > t) <= exp(-t^2 / (2 V + 2 m t / 3)), solved for t. It holds for a single term, where
    six deviations of a Gaussian would not be enough.
    """
    linear = largest * level / 3
    return linear + (linear.square() + 2 * level * variance).sqrt()


@dataclass(frozen=True)
class Residuals:
    """Elements of an output: what is left of their errors, and what may be. Tensors of one shape, float64 but the last.

    Args:
        error: d = y - R.
        reference: R, before the output's rounding, with the flips that were read off the output.
        slack: a, how far R may be from what the backend rounded.
        half: h, half a spacing where the output may lie.
        own: round(R) - R.
        up, down: round(R + a) - round(R) and round(R - a) - round(R).
        mantissa: int64, the same for elements that are rounded alike.
    """

    error: Tensor
    reference: Tensor
    slack: Tensor
    half: Tensor
    own: Tensor
    up: Tensor
    down: Tensor
    mantissa: Tensor

    @classmethod
    def of(cls, error: Tensor, reference: Tensor, slack: Tensor, fmt: FloatFormat) -> Residuals:
        """What follows from the first three in an output of format `fmt`."""
        own = own_rounding(reference, fmt)
        up, down = (end + own_rounding(end, fmt) - reference - own for end in (reference + slack, reference - slack))
        half = half_spacing(reference.abs() + slack, fmt)
        return cls(error, reference, slack, half, own, up, down, same_mantissa(reference))

    def rows(self, index: Tensor) -> Residuals:
        """Rows of (T, H) residuals, flattened to (n,)."""
        return Residuals(*(getattr(self, field.name)[index].flatten() for field in fields(self)))


@dataclass(frozen=True)
class Segments:
    """Which elements are taken together, and which of these are rounded alike.

    Args:
        segment: (n,) int64, the segment of each element.
        count: of segments.
        group: (n,) int64, the same number for elements of one segment whose references have one mantissa.
        segment_of_group: (groups,) int64.
    """

    segment: Tensor
    count: int
    group: Tensor
    segment_of_group: Tensor

    @classmethod
    def of(cls, segment: Tensor, count: int, mantissa: Tensor) -> Segments:
        """From each element's segment and mantissa, (n,) int64."""
        different = int(SAME_MANTISSA) + 1
        keys, group = torch.unique(segment * different + mantissa, return_inverse=True)
        return cls(segment, count, group, keys // different)

    def total(self, values: Tensor) -> Tensor:
        """(count,): sums of (n,) values over each segment."""
        return values.new_zeros(self.count).index_add_(0, self.segment, values)

    def squares(self, values: Tensor) -> Tensor:
        """(count,): over a segment, of the squares of the sums over its groups."""
        return values.new_zeros(self.count).index_add_(0, self.segment_of_group, self._grouped(values).square())

    def largest(self, values: Tensor) -> Tensor:
        """(count,): of a segment, the largest sum over a group."""
        return values.new_zeros(self.count).scatter_reduce(0, self.segment_of_group, self._grouped(values), "amax")

    def _grouped(self, values: Tensor) -> Tensor:
        return values.new_zeros(len(self.segment_of_group)).index_add_(0, self.group, values)


def norm_ratios(residuals: Residuals, segments: Segments) -> Tensor:
    """(count,): sum d^2 over (sum v + excess + t), of each segment.

    d = r + s, r uniform within +-h: d^2 has at most the mean v = h^2 / 3 + a^2, a being the slack; less its mean, it is
    at most 2 h^2 / 3 + 2 h a, and its variance is at most 4 h^4 / 45 + 4 a^2 h^2 / 3. t is Bernstein's, at the level
    for as many tests as there are segments.

    Elements that are rounded alike are one term. The excess is what the reference's own roundings have beyond the mean
    of uniform ones, as in `token_norm_ratio`.

    Sound but for the uniform r. What it leaves open are flips too small for a token to be decoded for: those add
    nothing that counts, since an element that they carry past h has its token decoded.
    """
    half, slack = residuals.half, residuals.slack
    uniform = half.square() / 3
    excess = (segments.total(residuals.own.square()) - segments.total(uniform)).clamp(min=0.0)
    variance = segments.squares((4 / 45 * half.square() + 4 / 3 * slack.square()).sqrt() * half)
    largest = segments.largest(2 / 3 * half.square() + 2 * half * slack)
    level = exponent(segments.count)
    limit = segments.total(uniform + slack.square()) + excess + bernstein(variance, largest, level)
    return torch.where(limit == 0, 0.0, segments.total(residuals.error.square()) / limit)


@dataclass(frozen=True)
class DirectedSums:
    """Errors summed along a direction, of each segment, (count,) each; what `pooled` adds up over cases.

    Args:
        signed: sum (d - own) c.
        slack: of its sound part.
        variance: sub-Gaussian variance of its statistical part.
        jumps: variance of that part, by how often an output can jump.
        largest: the most that one term of it can be.
    """

    signed: Tensor
    slack: Tensor
    variance: Tensor
    jumps: Tensor
    largest: Tensor

    def ratios(self, tests: int) -> Tensor:
        """|signed| over slack + the smaller of sqrt(2 L variance) (Hoeffding) and Bernstein's of jumps and largest."""
        level = exponent(tests)
        statistical = torch.minimum((2 * level * self.variance).sqrt(), bernstein(self.jumps, self.largest, level))
        limit = self.slack + statistical
        return torch.where(limit == 0, 0.0, self.signed.abs() / limit)


def directed_sums(residuals: Residuals, segments: Segments, direction: Tensor) -> DirectedSums:
    """How far errors go along a direction c, (n,), which must not depend on the roundings.

    q = d - own = round(R + s) - round(R) is a whole number of spacings 2 h; where R lies uniformly between two numbers,
    it is s rounded down or up, of mean s. So sum q c has the mean sum s c, at most sum a |c| (sound). About it, q takes
    two neighbouring values: it is sub-Gaussian of variance h^2 (Hoeffding), and as it is a jump with the probability
    |s| / 2 h, its variance is at most 2 h a, its size 2 h (Bernstein). Elements that are rounded alike count as one.

    Where R is not uniform (a bias alone, a grid, ties), `_forced` is the most that the slack can make of these very
    references, and takes the place of sum a |c| where it is larger. It is sound by itself where all flips are known;
    the statistical part is what remains for those that are too small to be told.
    """
    half, slack, along = residuals.half, residuals.slack, direction.abs()
    return DirectedSums(
        signed=segments.total((residuals.error - residuals.own) * direction),
        slack=torch.maximum(segments.total(slack * along), _forced(residuals, segments, direction)),
        variance=segments.squares(half * along),
        jumps=segments.squares((half * torch.minimum(2 * slack, half)).sqrt() * along),
        largest=segments.largest(2 * half * along),
    )


def _forced(residuals: Residuals, segments: Segments, direction: Tensor) -> Tensor:
    """(count,): the largest |sum q c| that the slack allows; rounding is monotone, so q is from `down` to `up`."""
    positive = direction > 0
    along = segments.total(torch.where(positive, residuals.up, residuals.down) * direction)
    against = segments.total(torch.where(positive, residuals.down, residuals.up) * direction)
    return torch.maximum(along, -against)


def directions(residuals: Residuals) -> dict[str, Tensor]:
    """Each of `DIRECTIONS`, (n,), in units in which every element's own rounding counts the same."""
    deviation = (residuals.half.square() / 3 + residuals.slack.square()).sqrt()
    there = (residuals.reference != 0) | (residuals.slack != 0)  # elsewhere the output is 0, and says nothing
    return {
        "gain": residuals.reference / deviation.square(),
        "away": torch.sign(residuals.reference) / deviation,
        "upward": there / deviation,
    }


def columns_ratios(residuals: Residuals, shape: tuple[int, int]) -> Tensor:
    """(T, blocks): `norm_ratios` of each token's blocks of 128 columns; the last one may be short."""
    tokens, hidden = shape
    blocks = -(-hidden // BLOCK)
    device = residuals.error.device
    block = torch.arange(hidden, device=device) // BLOCK
    segment = (torch.arange(tokens, device=device)[:, None] * blocks + block).flatten()
    return norm_ratios(residuals, Segments.of(segment, tokens * blocks, residuals.mantissa)).view(tokens, blocks)


def case_sums(residuals: Residuals) -> dict[str, DirectedSums]:
    """Over all elements at once, along each of `DIRECTIONS`."""
    segment = torch.zeros_like(residuals.error, dtype=torch.int64)
    segments = Segments.of(segment, 1, residuals.mantissa)
    return {name: directed_sums(residuals, segments, along) for name, along in directions(residuals).items()}


def bias_ratio(sums: Mapping[str, DirectedSums]) -> float:
    """Rounding that leans to one side: away from zero or towards it (truncation), up or down. Two tests."""
    sides = ("away", "upward")
    return max(float(sums[name].ratios(len(sides))) for name in sides)


def expert_ratios(residuals: Residuals, expert: Tensor, count: int, result: Tensor) -> tuple[Tensor, Tensor]:
    """(count,) each: `norm_ratios` over an expert's tokens, and the gain of its own part in them.

    An expert's gain is taken along its own weighted result, not along the whole output, so that neither the other
    experts of its tokens nor the tokens of others hide it.

    Args:
        residuals: (n,), all columns of each pair's token; a token once for each of its experts.
        expert: (n,) int64, from 0 to count - 1.
        result: (n,) what that expert adds to the reference.
    """
    segments = Segments.of(expert, count, residuals.mantissa)
    variance = residuals.half.square() / 3 + residuals.slack.square()
    gain = directed_sums(residuals, segments, result / variance).ratios(count)
    return norm_ratios(residuals, segments), gain
