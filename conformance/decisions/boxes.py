"""Boxes that hold all cells of one kind and none of another: each grows from one cell until nothing more fits in.

A box allows a set of classes on each axis. Only whole numbers are compared and nothing is drawn at random, so that the
same cells give the same boxes on every machine.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeAlias

import numpy as np

from conformance.selection.facts import Array

Box: TypeAlias = list[Array]
"""For each axis a boolean array over its classes: those that the box allows."""

SEEDS, SAMPLE, COUNTEREXAMPLES = 3, 4000, 300
"""Cells that a box is tried to be grown from; cells looked at while it grows; cells added that it must not hold."""


def holds(box: Box, columns: Array) -> Array:
    """Which of the cells (axes, cells) lie in a box."""
    found = np.ones(columns.shape[1], dtype=bool)
    for column, allowed in zip(columns, box, strict=True):
        if not allowed.all():
            found &= allowed[column]
    return found


def cover(wanted: Array, unwanted: Array, sizes: Sequence[int]) -> Iterator[tuple[Box, Array]]:
    """Boxes until every wanted cell lies in one; no unwanted cell does. The largest found come first.

    Args:
        wanted, unwanted: cells as (axes, cells) of classes.
        sizes: how many classes each axis has.

    Yields:
        A box that no axis can widen, and which of the wanted cells it is the first to hold.
    """
    left = np.ones(wanted.shape[1], dtype=bool)
    watched = _spread(unwanted.shape[1], SAMPLE)
    while left.any():
        numbers = np.flatnonzero(left)
        sample = wanted[:, numbers[_spread(len(numbers), SAMPLE)]]
        best: tuple[tuple[int, int], Box, Array] | None = None
        for seed in numbers[_spread(len(numbers), SEEDS)]:
            for backwards in (False, True):
                while True:
                    box = _grown(wanted[:, seed], sample, unwanted[:, watched], sizes, backwards)
                    wrong = np.flatnonzero(holds(box, unwanted))
                    if not len(wrong):
                        break
                    watched = np.union1d(watched, wrong[_spread(len(wrong), COUNTEREXAMPLES)])
                held = holds(box, wanted) & left
                worth = int(np.count_nonzero(held)), -sum(not allowed.all() for allowed in box)
                if best is None or worth > best[0]:
                    best = worth, box, held
        if best is None:
            raise AssertionError("cells are left and none was tried")
        _, box, held = best
        left &= ~held
        yield box, held


def _grown(seed: Array, wanted: Array, unwanted: Array, sizes: Sequence[int], backwards: bool) -> Box:
    """The box around one cell, one axis after the other made as wide as the unwanted cells let it be.

    First the axes that can be freed altogether; among those, and then among the others, the one that lets most wanted
    cells in. ``backwards`` turns the order of axes that let in as many.
    """
    box = [np.arange(size) == value for size, value in zip(sizes, seed, strict=True)]
    # On how many axes a cell lies outside. One that lies outside on a single axis is what that axis lets in.
    outside = np.count_nonzero(unwanted != seed[:, None], axis=0)
    missing = np.count_nonzero(wanted != seed[:, None], axis=0)
    todo = [axis for axis, size in enumerate(sizes) if size > 1]
    if backwards:
        todo.reverse()
    while todo:
        near, next_in = unwanted[:, outside == 1], wanted[:, missing == 1]
        best: tuple[tuple[bool, int], int, Array] | None = None
        for axis in todo:
            free = ~box[axis]
            free[near[axis]] = False
            worth = bool((free | box[axis]).all()), int(np.count_nonzero(free[next_in[axis]]))
            if best is None or worth > best[0]:
                best = worth, axis, free
        if best is None:
            raise AssertionError("axes are left and none was tried")
        _, axis, free = best
        todo.remove(axis)
        if free.any():
            box[axis] |= free
            outside -= free[unwanted[axis]]
            missing -= free[wanted[axis]]
    return box


def met(held: Array, sizes: Sequence[int]) -> Box:
    """The smallest box around some cells (axes, cells)."""
    return [np.bincount(column, minlength=size) > 0 for column, size in zip(held, sizes, strict=True)]


def _spread(count: int, at_most: int) -> Array:
    """Numbers below ``count``, evenly, at most so many."""
    few = min(count, at_most)
    return np.arange(few) * count // max(1, few)
