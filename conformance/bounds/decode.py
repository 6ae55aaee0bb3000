"""Which elements of a token's intermediate were rounded the other way, read off the token's output.

A flipped element adds a known multiple of a column of w2 to the whole output row, so least squares finds the flips
among the elements that can flip at all (formula 5 of spec/bounds.md); what is left is judged without them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from conformance.bounds.allowance import Allowance, half_spacing
from conformance.bounds.statistics import element_ratio
from fp8moe.reference.recipe import RecipeTrace
from fp8moe.reference.rounding import round_to

DECIDABLE = 144.0
"""Squared norm, in units of the noise, of a column that can be told from none: rounding its coefficient to 0 or 1 goes
wrong at half of 12 standard deviations."""
SMOOTH_SIGMAS = 3.0
"""B0 is about six standard deviations of the errors in it, or a sound bound of few of them: B0 / 3 is cautious."""
MOST_COLUMNS = 1 / 3
"""Decidable columns a column of the output; with more, the fit would absorb what is to be judged."""
SWEEPS = 8
"""Sweeps of coordinate descent over the codes, after least squares; one or two change anything."""
LAWSON_STEPS = 40
"""Reweightings towards the smallest largest ratio, where least squares leaves an element outside."""


@dataclass(frozen=True)
class Decoded:
    """A token's flips: `moved` (H,) is what they add to its output, `undecided` (H,) bounds what others may add."""

    moved: Tensor
    undecided: Tensor


def decode_flips(trace: RecipeTrace, allowance: Allowance, token: int, error: Tensor) -> Decoded:
    """Reads the flips of one judged token.

    Args:
        error: (H,) float64, output - trace.smooth.
    """
    fmt, smooth = trace.problem.carrier, allowance.smooth[token]
    below, above, place, nominal, scale = _candidates(trace, allowance, token)
    if not below.numel():
        return Decoded(torch.zeros_like(error), torch.zeros_like(error))
    columns = _columns(trace, place)
    hulp = half_spacing(trace.smooth[token].abs() + smooth, fmt)
    precision = 1 / (hulp.square() / 3 + (smooth / SMOOTH_SIGMAS).square())
    reach = torch.maximum(below, above)
    decidable = reach.square() * (columns.square() * precision[:, None]).sum(0) >= DECIDABLE
    undecided = columns[:, ~decidable].abs() @ reach[~decidable]
    if int(decidable.sum()) > MOST_COLUMNS * error.numel():
        return Decoded(torch.zeros_like(error), allowance.flips[token])
    fit = _Fit(
        columns[:, decidable], error, -below[decidable], above[decidable], nominal[decidable], scale[decidable], trace
    )
    codes = fit.to_codes(fit.least_squares(precision))
    best = fit.descend(codes, precision)

    def worst(moves: Tensor) -> float:
        moved = fit.columns @ moves
        ratio = element_ratio(error - moved, trace.smooth[token] + moved, smooth + undecided, fmt)
        return float(ratio.max())

    if worst(best) > 1:
        limit = 2 * hulp + smooth + undecided
        best = min((best, fit.smallest_largest(precision, limit)), key=worst)
    return Decoded(fit.columns @ best, undecided)


def _candidates(trace: RecipeTrace, allowance: Allowance, token: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """below, above, (pair, element), nominal value and scale of a token's elements that can flip."""
    pairs, spread = trace.pairs, allowance.spread
    mine = (pairs.token == token).nonzero()[:, 0]
    if not spread.flips:
        mine = mine[:0]
    place = (spread.farthest[mine] > 0).nonzero()
    place[:, 0] = mine[place[:, 0]]
    pair, element = place.unbind(1)
    width = -(-trace.intermediate.shape[1] // trace.scale.shape[1])
    if spread.group is not None and spread.group.is_per_group():
        width = spread.group.col
    return (
        spread.below[pair, element],
        spread.above[pair, element],
        place,
        trace.intermediate[pair, element],
        trace.scale[pair, element // width],
    )


def _columns(trace: RecipeTrace, place: Tensor) -> Tensor:
    """(H, n): what one unit of each candidate adds to the output."""
    pairs = trace.pairs
    parts = []
    for pair in torch.unique_consecutive(place[:, 0]).tolist():
        weight = trace.problem.weight_columns("w2", int(pairs.expert[pair]), place[place[:, 0] == pair, 1])
        parts.append(weight * pairs.weight[pair])
    return torch.cat(parts, dim=1)


@dataclass(frozen=True)
class _Fit:
    """min |(error - columns @ moves) / sigma| over moves between `low` and `high`, or on the codes between them."""

    columns: Tensor
    error: Tensor
    low: Tensor
    high: Tensor
    nominal: Tensor
    scale: Tensor
    trace: RecipeTrace

    def least_squares(self, precision: Tensor) -> Tensor:
        weighted = self.columns * precision[:, None]
        gram = weighted.t() @ self.columns
        ridge = torch.diagonal(gram).clone() * torch.finfo(torch.float64).eps * len(gram)
        moves = torch.linalg.solve(gram + torch.diag(ridge), weighted.t() @ self.error)
        return moves.clamp(self.low, self.high)

    def to_codes(self, moves: Tensor) -> Tensor:
        """The nearest admissible values: FP8 codes at the nominal scale, or numbers of the 16-bit format."""
        problem = self.trace.problem
        quantised = problem.quant.a2.dtype is not None and problem.recipe.requantize
        fmt = problem.fp8 if quantised else problem.carrier
        values = round_to((self.nominal + moves) / self.scale, fmt) * self.scale
        return (values - self.nominal).clamp(self.low, self.high)

    def descend(self, moves: Tensor, precision: Tensor) -> Tensor:
        """Coordinate descent over the codes, from these moves or from none at all, whichever ends lower."""
        weighted = self.columns * precision[:, None]
        gram, target = weighted.t() @ self.columns, weighted.t() @ self.error
        curvature = torch.diagonal(gram)
        found = []
        for start in (moves, torch.zeros_like(moves)):
            current = start.clone()
            for _ in range(SWEEPS):
                gradient = target - gram @ current
                proposal = self.to_codes(current + gradient / curvature)
                step = proposal - current
                gain = step * (gradient - curvature * step / 2)
                if float(gain.max()) <= 0:
                    break
                for index in torch.argsort(gain, descending=True)[: int((gain > 0).sum())].tolist():
                    slope = target[index] - gram[index] @ current
                    wanted = self._one_code(index, current[index] + slope / curvature[index])
                    change = wanted - current[index]
                    if float(change * (slope - curvature[index] * change / 2)) > 0:
                        current[index] = wanted
            found.append((float(current @ (gram @ current) / 2 - target @ current), current))
        return min(found, key=lambda pair: pair[0])[1]

    def _one_code(self, index: int, move: Tensor) -> Tensor:
        one = slice(index, index + 1)
        part = _Fit(
            self.columns[:, one], self.error, self.low[one], self.high[one], self.nominal[one], self.scale[one], self.trace
        )
        return part.to_codes(move.reshape(1))[0]

    def smallest_largest(self, precision: Tensor, limit: Tensor) -> Tensor:
        """Moves anywhere in the box, reweighted (Lawson) towards the smallest largest |residual| / limit."""
        weight, best, least = precision.clone(), torch.zeros_like(self.low), torch.inf
        for _ in range(LAWSON_STEPS):
            moves = self.least_squares(weight)
            ratio = (self.error - self.columns @ moves).abs() / limit
            if float(ratio.max()) < least:
                best, least = moves, float(ratio.max())
            weight = weight * ratio
            weight = weight / weight.max() * precision.max() + precision * torch.finfo(torch.float64).eps
        return best
