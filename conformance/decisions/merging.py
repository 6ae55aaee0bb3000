"""Values of an axis between which no decision tells are merged, so that a grid of millions becomes a small one.

Nothing is assumed about what a value means: two values are one where, in every product that has both, exchanging them
changes no label. Two values that never stand in one product beside the same others may still differ, which shows as two
labels of one merged cell; then they are parted again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from conformance.decisions.decided import DecisionsError
from conformance.selection.axes import AXES
from conformance.selection.cells import Cell
from conformance.selection.facts import Array
from conformance.selection.grid import Product


@dataclass(frozen=True)
class Merged:
    """The merged cells, each once."""

    classes: tuple[Array, ...]
    """For each axis, the class of each of its values."""
    columns: Array
    """(axes, cells) uint8: the class that a cell has on each axis."""
    labels: Array
    """(cells,): what was to be told apart."""

    @property
    def sizes(self) -> tuple[int, ...]:
        """How many classes each axis has."""
        return tuple(int(classes.max()) + 1 for classes in self.classes)

    def values(self, allowed: Sequence[Array]) -> list[Array]:
        """For each axis which values a box over the classes allows."""
        return [box[classes] for box, classes in zip(allowed, self.classes, strict=True)]


def merge(products: Sequence[Product], labels: Sequence[Array]) -> Merged:
    """The smallest grid found in which the same labels stand; ``labels`` has one flat array a product.

    Raises:
        DecisionsError: one cell that stands in two products has two labels.
    """
    told = [np.zeros((len(axis), len(axis)), dtype=bool) for axis in AXES]
    for product, found in zip(products, labels, strict=True):
        _tell_apart(told, product, found)
    while True:
        classes = tuple(map(_grouped, told))
        parts = [_representatives(product, found, classes) for product, found in zip(products, labels, strict=True)]
        values = np.concatenate([part for part, _ in parts], axis=1)
        codes = np.concatenate([found for _, found in parts])
        columns = np.stack([classes[axis][values[axis]] for axis in range(len(AXES))])
        keys = np.ravel_multi_index(tuple(columns), [int(c.max()) + 1 for c in classes])
        order = np.argsort(keys, kind="stable")
        starts = np.flatnonzero(np.r_[True, keys[order][1:] != keys[order][:-1]])
        first = np.repeat(order[starts], np.diff(np.r_[starts, len(order)]))
        other = np.flatnonzero(codes[order] != codes[first])
        if not len(other):
            return Merged(classes, columns[:, order[starts]], codes[order[starts]])
        _part(told, values[:, first[other]], values[:, order[other]])


def _tell_apart(told: list[Array], product: Product, labels: Array) -> None:
    """Marks the pairs of values that differ somewhere in a product."""
    cells = labels.reshape([len(chosen) for chosen in product.choices])
    for axis in sorted(range(len(AXES)), key=lambda axis: -len(product.choices[axis])):
        if cells.shape[axis] == 1:
            continue
        rows = np.ascontiguousarray(np.moveaxis(cells, axis, 0)).reshape(cells.shape[axis], -1)
        kinds: dict[bytes, int] = {}
        kind = np.asarray([kinds.setdefault(row.tobytes(), len(kinds)) for row in rows])
        chosen = np.asarray(product.choices[axis])
        told[axis][np.ix_(chosen, chosen)] |= kind[:, None] != kind[None, :]
        # One value of each kind says all that the axes to come can show.
        cells = np.take(cells, np.unique(kind, return_index=True)[1], axis=axis)


def _grouped(told: Array) -> Array:
    """Each value joins the first class with none of whose members it differs."""
    members: list[list[int]] = []
    classes = np.zeros(len(told), dtype=np.uint8)
    for value in range(len(told)):
        fitting = (number for number, group in enumerate(members) if not told[value, group].any())
        number = next(fitting, len(members))
        if number == len(members):
            members.append([])
        members[number].append(value)
        classes[value] = number
    return classes


def _representatives(product: Product, labels: Array, classes: Sequence[Array]) -> tuple[Array, Array]:
    """Values (axes, cells) and labels of a product with one value of each class."""
    chosen = [np.asarray(values, dtype=np.uint8) for values in product.choices]
    first = [np.unique(classes[axis][values], return_index=True)[1] for axis, values in enumerate(chosen)]
    cells = labels.reshape([len(values) for values in chosen])[np.ix_(*first)]
    grid = np.ix_(*(values[positions] for values, positions in zip(chosen, first, strict=True)))
    return np.stack([np.broadcast_to(values, cells.shape).reshape(-1) for values in grid]), cells.reshape(-1)


def _part(told: list[Array], one: Array, other: Array) -> None:
    """Parts the values in which pairs of cells differ that are one merged cell and have two labels."""
    same = np.flatnonzero((one == other).all(axis=0))
    if len(same):
        cell = Cell(tuple(int(index) for index in one[:, same[0]]))
        raise DecisionsError(f"{cell} is decided in two ways when it is asked twice; make the selector deterministic")
    for axis in range(len(AXES)):
        a, b = one[axis], other[axis]
        apart = a != b
        told[axis][a[apart], b[apart]] = told[axis][b[apart], a[apart]] = True
