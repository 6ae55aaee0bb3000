"""Which elements of a token's intermediate were rounded the other way, read off the token's output.

A flipped element adds a known multiple of a column of w2 to the whole output row, so least squares finds the flips
among the elements that can flip at all (formula 5 of the specification of error bounds). What is left is judged as if
nothing had flipped.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from conformance.bounds.allowance import Allowance, half_spacing
from conformance.bounds.least_squares import BoxedFit
from conformance.bounds.statistics import element_ratio
from fp8moe.reference.recipe import RecipeTrace
from fp8moe.reference.rounding import round_to

DECIDABLE = 144.0
"""Squared norm, in units of the noise, of a column that can be told from none: rounding its coefficient to 0 or 1 goes
wrong at half of 12 standard deviations."""
SMOOTH_SIGMAS = 3.0
"""B0 is six standard deviations of errors, or a sound bound of a few of them: B0 / 3 as their deviation is cautious."""
MOST_COLUMNS = 1 / 3
"""Decidable columns a column of the output; with more, the fit would absorb what is to be judged."""
LARGEST_FIT = 512
"""And never more than these, for the time that a fit takes."""
CROSSINGS = 2
"""Times that the bound is computed anew: a flip can carry an output into the next binade."""


@dataclass(frozen=True)
class Decoded:
    """A token's flips: `moved` (H,) is what they add to its output, `undecided` (H,) bounds what others may add."""

    moved: Tensor
    undecided: Tensor


@dataclass(frozen=True)
class Candidates:
    """n elements of a token's intermediate that can flip; (n,) but for `columns`.

    Args:
        below, above: how far they can go, not negative.
        nominal: where they are by the recipe.
        scale: of their group.
        columns: (H, n), what one unit of each adds to the output.
    """

    below: Tensor
    above: Tensor
    nominal: Tensor
    scale: Tensor
    columns: Tensor

    def take(self, index: Tensor) -> Candidates:
        """Those where `index`, a mask, is true."""
        chosen = (self.below[index], self.above[index], self.nominal[index], self.scale[index])
        return Candidates(*chosen, self.columns[:, index])

    def on_host(self) -> Candidates:
        return Candidates(*(getattr(self, field.name).cpu() for field in fields(self)))

    @property
    def reach(self) -> Tensor:
        return torch.maximum(self.below, self.above)


@contextmanager
def one_thread() -> Iterator[None]:
    """For thousands of small operations, which wait for threads longer than they compute: measured, 64 tokens of 1,024
    columns take 0.8 s in one thread and 27 s in sixteen."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def decode_flips(trace: RecipeTrace, allowance: Allowance, token: int, error: Tensor, known: Tensor) -> Decoded:
    """Reads the flips of one judged token: none, or those that leave its elements farthest inside their bounds.

    Args:
        error: (H,) float64, output - trace.smooth.
        known: (H,) bool: elements that the output tells; those that overflowed tell nothing, and get no move.
    """
    kept = known.cpu()

    def spread_out(values: Tensor) -> Tensor:
        everywhere = values.new_zeros(len(kept))
        everywhere[kept] = values
        return everywhere.to(error.device)

    # Thousands of columns, where they are; the few that can be decided go on, small and sequential, on the host.
    candidates = _candidates(trace, allowance, token)
    if not bool(kept.all()):
        candidates = replace(candidates, columns=candidates.columns[known])
    reference, smooth, target = (value[known] for value in (trace.smooth[token], allowance.smooth[token], error))
    fmt = trace.problem.carrier
    hulp = half_spacing(reference.abs() + smooth, fmt)
    precision = 1 / (hulp.square() / 3 + (smooth / SMOOTH_SIGMAS).square())
    decidable = candidates.reach.square() * (precision @ candidates.columns.square()) >= DECIDABLE
    if int(decidable.sum()) > min(MOST_COLUMNS * len(target), LARGEST_FIT):
        return Decoded(torch.zeros_like(error), allowance.flips[token])
    undecided = candidates.columns.abs() @ torch.where(decidable, 0.0, candidates.reach)
    candidates = candidates.take(decidable).on_host()
    reference, smooth, target, undecided, precision = (
        value.cpu() for value in (reference, smooth, target, undecided, precision)
    )
    zero = torch.zeros_like(target)

    def rated(moved: Tensor, slack: Tensor) -> tuple[float, Tensor, Tensor]:
        return float(element_ratio(target - moved, reference + moved, smooth + slack, fmt).max()), moved, slack

    found = [rated(zero, zero), rated(zero, undecided)]
    if len(candidates.reach):
        fit = _fit(trace, candidates, target)
        moves = fit.discrete(precision)
        found.append(rated(fit.columns @ moves, undecided))
        for _ in range(CROSSINGS):
            ratio, moved, _ = min(found, key=lambda one: one[0])
            if ratio <= 1:
                break
            limit = 2 * half_spacing((reference + moved).abs() + smooth + undecided, fmt) + smooth + undecided
            moves = fit.into_tube(moves, limit)
            found.append(rated(fit.columns @ moves, undecided))
    _, moved, slack = min(found, key=lambda one: one[0])
    return Decoded(spread_out(moved), spread_out(slack))


def _fit(trace: RecipeTrace, candidates: Candidates, target: Tensor) -> BoxedFit:
    problem = trace.problem
    quantised = problem.recipe.requantize and problem.quant.a2.dtype is not None
    fmt = problem.fp8 if quantised else problem.carrier

    def admissible(index: Tensor, moves: Tensor) -> Tensor:
        """The nearest moves to an FP8 code at the nominal scale, or to a number of the 16-bit format."""
        nominal, scale = candidates.nominal[index], candidates.scale[index]
        values = round_to((nominal + moves) / scale, fmt) * scale
        return torch.clamp(values - nominal, -candidates.below[index], candidates.above[index])

    return BoxedFit(candidates.columns, target, -candidates.below, candidates.above, admissible)


def _candidates(trace: RecipeTrace, allowance: Allowance, token: int) -> Candidates:
    pairs, spread = trace.pairs, allowance.spread
    mine = (pairs.token == token).nonzero()[:, 0]
    place = (spread.farthest[mine] > 0).nonzero() if spread.flips else mine.new_zeros(0, 2)
    pair, element = mine[place[:, 0]], place[:, 1]
    columns = []
    for one in torch.unique_consecutive(pair).tolist():
        weight = trace.problem.weight_columns("w2", int(pairs.expert[one]), element[pair == one])
        columns.append(weight.mul_(pairs.weight[one]))
    inter = trace.intermediate.shape[1]
    group = element // (spread.group.col if spread.group is not None and spread.group.is_per_group() else inter)
    values = (
        spread.below[pair, element],
        spread.above[pair, element],
        trace.intermediate[pair, element],
        trace.scale[pair, group],
        torch.cat(columns, dim=1) if columns else trace.smooth.new_zeros(trace.smooth.shape[1], 0),
    )
    return Candidates(*values)
