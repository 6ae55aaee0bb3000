"""The decision table: an ordered list of rules, of which the first that fits a cell says what is decided there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from conformance.decisions import boxes
from conformance.decisions.decided import Decided, DecisionsError
from conformance.decisions.labels import reading_order
from conformance.decisions.merging import merge
from conformance.decisions.words import condition
from conformance.selection.axes import AXES, AXIS
from conformance.selection.facts import Array
from conformance.selection.grid import GRID, Product

RULES_AT_MOST = 2000
"""More are no description; a selector that follows the specification takes some ninety."""

When = Mapping[str, tuple[str, ...]]
"""Conditions: an axis and the values that it may have; an axis that is left out may have any."""


@dataclass(frozen=True)
class Rule:
    """What is decided in the cells that meet every condition and fit no rule before."""

    when: When
    label: int


@dataclass(frozen=True)
class Table:
    """Rules in their order, as far as they speak of the cells of the grid; of other cells they say nothing."""

    rules: tuple[Rule, ...]

    @classmethod
    def of(cls, decided: Decided, products: Sequence[Product] = GRID) -> Table:
        """The rules of a grid's decisions, exact in every cell; the same decisions give the same rules anywhere.

        Raises:
            DecisionsError: more than ``RULES_AT_MOST`` rules, or one cell of two products is decided in two ways.
        """
        merged = merge(products, decided.labels)
        rules = []
        left = np.ones(len(merged.labels), dtype=bool)
        for label in sorted(set(merged.labels.tolist()), key=reading_order):
            here = merged.labels == label
            wanted, unwanted = merged.columns[:, here], merged.columns[:, left & ~here]
            for box, held in boxes.cover(wanted, unwanted, merged.sizes):
                smallest = boxes.met(wanted[:, held], merged.sizes)
                rules.append(Rule(conditions((merged.values(smallest), merged.values(box))), label))
                if len(rules) > RULES_AT_MOST:
                    raise DecisionsError(
                        f"the decisions take more than {RULES_AT_MOST:,} rules, so they follow no pattern that a table "
                        "could tell; look at `python -m conformance.selection` first"
                    )
            left &= ~here
        table = cls(tuple(rules))
        if any(len(numbers) for numbers in table.expand(products).differs(decided)):
            raise AssertionError("the rules do not give back the decisions that they were made of")
        return table

    def adapted(self) -> Table:
        """The rules of a grid whose axes were others, as far as they speak of axes and values that there are now."""
        found = []
        for rule in self.rules:
            names = {axis: AXES[AXIS[axis]].names if axis in AXIS else () for axis in rule.when}
            when = {axis: tuple(v for v in values if v in names[axis]) for axis, values in rule.when.items()}
            if all(when.values()):
                found.append(Rule(when, rule.label))
        return Table(tuple(found))

    def expand(self, products: Sequence[Product] = GRID) -> Decided:
        """What the rules say of every cell of a grid.

        Raises:
            ValueError: a condition names an axis or a value that does not exist, or no rule fits a cell.
        """
        return Decided(tuple(self._labels(product) for product in products))

    def _labels(self, product: Product) -> Array:
        known: dict[tuple[int, int], Array] = {}

        def fill(axis: int, alive: int) -> Array:
            # Behind a rule that the axes to come cannot turn down, no rule comes to be asked.
            sure = alive & self._free[axis]
            alive &= (sure & -sure) * 2 - 1
            found = known.get((axis, alive))
            if found is None:
                found = known[axis, alive] = made(axis, alive)
            return found

        def made(axis: int, alive: int) -> Array:
            if alive == alive & -alive:
                if not alive:
                    raise ValueError(f"no rule fits some cells of the product {product.name!r}")
                if self._free[axis] & alive:
                    return np.broadcast_to(np.uint16(self.rules[alive.bit_length() - 1].label), shape[axis:])
            masks = self._masks[axis]
            parts = [fill(axis + 1, alive & masks[value]) for value in product.choices[axis]]
            return parts[0][None] if len(parts) == 1 else np.stack(parts)

        shape = [len(chosen) for chosen in product.choices]
        return fill(0, (1 << len(self.rules)) - 1).reshape(-1)

    @cached_property
    def _masks(self) -> list[list[int]]:
        """For each axis and value the rules that allow it, as bits."""
        masks = [[0] * len(axis) for axis in AXES]
        for number, rule in enumerate(self.rules):
            wanted = indices(rule.when)
            for axis, values in enumerate(masks):
                for value in wanted.get(axis, range(len(values))):
                    values[value] |= 1 << number
        return masks

    @cached_property
    def _free(self) -> list[int]:
        """For each axis the rules with no condition on it or on a later one, as bits; and behind the last axis, all."""
        last = [max(indices(rule.when), default=-1) for rule in self.rules]
        return [sum(1 << n for n, axis in enumerate(last) if axis < depth) for depth in range(len(AXES) + 1)]


def indices(when: When) -> dict[int, list[int]]:
    """Conditions as indices into ``AXES`` and their values.

    Raises:
        ValueError: an axis or a value that does not exist, or a condition that nothing meets.
    """
    found = {}
    for name, values in when.items():
        if name not in AXIS:
            raise ValueError(f"no axis {name!r}; there are {', '.join(AXIS)}")
        names = AXES[AXIS[name]].names
        unknown = [value for value in values if value not in names]
        if unknown or not values:
            raise ValueError(f"axis {name!r} has no value {unknown[0]!r}" if unknown else f"axis {name!r}: no value")
        found[AXIS[name]] = [names.index(value) for value in values]
    return found


def conditions(boxes_of_values: Sequence[boxes.Box]) -> When:
    """Conditions that all these boxes over the axes' values meet: of each axis the one that is said in fewest letters.

    The last box is the largest. What it frees has no condition; of equally short ones the first is taken.
    """
    found = {}
    for axis, *allowed in zip(AXES, *boxes_of_values, strict=True):
        if not allowed[-1].all():
            sets = [tuple(name for name, here in zip(axis.names, values, strict=True) if here) for values in allowed]
            found[axis.name] = min(sets, key=lambda values: len(condition(axis.name, values)))
    return found
