"""The grid that a decision table speaks of: what identifies it, and its cells counted once each."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import numpy as np

from conformance.selection.axes import AXES
from conformance.selection.facts import Array
from conformance.selection.grid import GRID, Product

_STRIDES = [int(stride) for stride in np.cumprod([1, *(len(axis) for axis in reversed(AXES))])[-2::-1]]


def grid_digest(products: Sequence[Product] = GRID) -> str:
    """The identity of a grid: of the axes their names, their values' names and what is read from them; the products.

    Two grids of one digest have the same axes, values of the same meaning and the same cells.
    """
    axes = [
        [
            axis.name,
            [[name, sorted(axis.read(value).items()), value if isinstance(value, str) else None]
             for name, value in axis.values.items()],
        ]
        for axis in AXES
    ]  # fmt: skip
    told = json.dumps([axes, [[product.name, product.choices] for product in products]], default=int)
    return hashlib.sha256(told.encode()).hexdigest()


def distinct_cells(products: Sequence[Product] = GRID) -> int:
    """How many cells a grid has when a cell of two products counts once."""
    cells = np.concatenate([cell_numbers(product) for product in products])
    cells.sort()
    return 1 + int(np.count_nonzero(cells[1:] != cells[:-1]))


def cell_numbers(product: Product, numbers: Array | None = None) -> Array:
    """A number of each cell that is the same in every product; of all cells, or of those that a product so numbers."""
    if numbers is not None:
        indices = product.indices(numbers)
        return sum((index * stride for index, stride in zip(indices, _STRIDES, strict=True)), np.zeros(1, np.int64))
    found = np.zeros(1, dtype=np.int64)
    for chosen, stride in zip(product.choices, _STRIDES, strict=True):
        found = (found[:, None] + np.asarray(chosen, dtype=np.int64) * stride).reshape(-1)
    return found


def axis_values(cells: Array) -> Array:
    """(axes, cells) uint8: the index of each axis's value, of cells by such numbers."""
    return np.stack(
        [(cells // stride % len(axis)).astype(np.uint8) for axis, stride in zip(AXES, _STRIDES, strict=True)]
    )


def once_each(products: Sequence[Product]) -> tuple[Array, ...]:
    """For each product which of its cells stand in no product before it."""
    cells = np.concatenate([cell_numbers(product) for product in products])
    order = np.argsort(cells, kind="stable")
    first = np.zeros(len(cells), dtype=bool)
    first[order[np.r_[True, cells[order][1:] != cells[order][:-1]]]] = True
    return tuple(np.split(first, np.cumsum([product.size for product in products])[:-1]))
