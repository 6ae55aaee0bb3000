"""Least squares within a box, on a grid of admissible values, and into a tube of admissible residuals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

ROUNDS = 50
"""Rounds of the active set; each fixes or frees at least one move, and a handful is enough for what is seen."""
SWEEPS = 8
"""Sweeps of coordinate descent over the admissible values; the first two change nearly all."""
STEPS = 1000
"""Steps of the accelerated gradient: its distance from the tube falls as 1 / steps^2 at least."""
INSIDE = 7 / 8
"""Part of the tube that the gradient aims at, so that it arrives inside after finitely many steps."""


@dataclass(frozen=True)
class BoxedFit:
    """target - columns @ moves, made small over `low` <= moves <= `high`; all float64.

    Args:
        columns: (H, n).
        target: (H,).
        low, high: (n,), low <= 0 <= high.
        admissible: from (indices of moves, their values) to the nearest values that are possible.
    """

    columns: Tensor
    target: Tensor
    low: Tensor
    high: Tensor
    admissible: Callable[[Tensor, Tensor], Tensor]

    def within_box(self, precision: Tensor) -> Tensor:
        """The least sum of precision times squared residual in the box, by an active set."""
        gram, slope = self._normal(precision)
        gram = gram + torch.diag(torch.diagonal(gram) * torch.finfo(torch.float64).eps * len(gram))
        moves = torch.zeros_like(self.low)
        free = torch.ones_like(moves, dtype=torch.bool)
        for _ in range(ROUNDS):
            if bool(free.any()):
                fixed = slope - gram[:, ~free] @ moves[~free]
                moves[free] = _solved(gram[free][:, free], fixed[free])
            outside = free & ((moves < self.low) | (moves > self.high))
            moves = torch.clamp(moves, self.low, self.high)
            if bool(outside.any()):
                free = free & ~outside
                continue
            gradient = slope - gram @ moves
            inwards = ((moves == self.low) & (gradient > 0)) | ((moves == self.high) & (gradient < 0))
            freed = ~free & inwards
            if not bool(freed.any()):
                break
            free = free | freed
        return moves

    def discrete(self, precision: Tensor) -> Tensor:
        """Coordinate descent over the admissible values, from the box's minimum and from zero; the lower end."""
        gram, slope = self._normal(precision)
        curvature = torch.diagonal(gram)
        everything = torch.arange(len(gram))
        found = []
        for start in (self.admissible(everything, self.within_box(precision)), torch.zeros_like(self.low)):
            moves, gradient = start.clone(), slope - gram @ start
            for _ in range(SWEEPS):
                step = self.admissible(everything, moves + gradient / curvature) - moves
                better = (step * (gradient - curvature * step / 2) > 0).nonzero()[:, 0]
                if not better.numel():
                    break
                for index in better:
                    wanted = self.admissible(index, moves[index] + gradient[index] / curvature[index])
                    change = wanted - moves[index]
                    if change * (gradient[index] - curvature[index] * change / 2) > 0:
                        moves[index] = wanted
                        gradient = gradient - gram[index] * change
            found.append((float(moves @ (gram @ moves) / 2 - slope @ moves), moves))
        return min(found, key=lambda pair: pair[0])[1]

    def into_tube(self, start: Tensor, limit: Tensor) -> Tensor:
        """Moves anywhere in the box for which every |residual| <= limit, where there are any.

        The squared distances from a narrower tube are a convex function, whose minimum the accelerated projected
        gradient (Beck and Teboulle 2009) finds from any start; so if this fails, no flips explain the target.
        """
        columns = self.columns / limit[:, None]
        norm = columns.norm(dim=0)
        columns, target = columns / norm, self.target / limit
        scaled: Tensor = start * norm
        low, high = self.low * norm, self.high * norm
        rate = 1 / torch.linalg.matrix_norm(columns, 2).square()
        moves = ahead = scaled
        momentum = 1.0
        for _ in range(STEPS):
            residual = target - columns @ ahead
            beyond = residual - residual.clamp(-INSIDE, INSIDE)
            if float(beyond.abs().max()) <= (1 - INSIDE) / 2:
                break
            after = torch.clamp(ahead + rate * (columns.t() @ beyond), low, high)
            following = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
            ahead = torch.clamp(after + (momentum - 1) / following * (after - moves), low, high)
            moves, momentum = after, following
        result: Tensor = ahead / norm
        return result

    def _normal(self, precision: Tensor) -> tuple[Tensor, Tensor]:
        weighted = self.columns * precision[:, None]
        return weighted.t() @ self.columns, weighted.t() @ self.target


def _solved(gram: Tensor, slope: Tensor) -> Tensor:
    """The moves of least squares; the shortest ones where columns depend on each other, as those of an expert do that
    is named twice for a token."""
    moves: Tensor
    moves, singular = torch.linalg.solve_ex(gram, slope)
    if bool(singular):
        moves = torch.linalg.pinv(gram, hermitian=True) @ slope
    return moves
