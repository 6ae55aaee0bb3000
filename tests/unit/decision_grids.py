"""Decisions for the tests of the decision table: of the specification's model over the whole grid, and small grids."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cache
from typing import Any
from unittest.mock import patch

import numpy as np

from conformance.decisions.decided import Decided
from conformance.selection import model, predicates
from conformance.selection.axes import AXES
from conformance.selection.facts import UNSET
from conformance.selection.grid import GRID, Product

Planted = Callable[[], AbstractContextManager[Any]]

SMALL = (
    Product.over(
        "variables",
        device=("sm75", "sm90", "sm100", "gfx942", "cpu"),
        libraries=("all", "none"),
        scheme=("block", "tensor_static", "none"),
        parallel=("single", "dp2-ep-deepep_low_latency"),
        VLLM_USE_DEEP_GEMM=("unset", "0", "1", "1.0"),
        VLLM_USE_FLASHINFER_MOE_FP8=("unset", "0", "1"),
    ),
    Product.over(
        "layers",
        device=("sm90", "sm100", "xpu"),
        scheme=("block", "tensor_static"),
        activation="*",
        gating="*",
        lora="*",
    ),
    Product.over("spellings", device=("sm90", "gfx942"), VLLM_USE_DEEP_GEMM="*"),
)
"""Some 900 cells, a few of them in two products."""


def specified(products: tuple[Product, ...] = GRID) -> Decided:
    """What the specification's model decides, in arrays: the whole grid in half a second."""
    outcomes, rules = [], []
    for product in products:
        expected = model.expect(product.facts())
        outcomes.append(np.broadcast_to(expected.outcome, product.shape))
        rules.append(np.broadcast_to(expected.rule, product.shape))
    return Decided.of(outcomes, rules)


@cache
def as_specified() -> Decided:
    """The same over the whole grid, once."""
    return specified()


def cells_of(products: tuple[Product, ...]) -> Iterator[tuple[int, int, dict[str, str]]]:
    """For each cell its product, its number and the names of its values."""
    for index, product in enumerate(products):
        for number in range(product.size):
            indices = product.cell(number).indices
            yield index, number, {axis.name: axis.names[at] for axis, at in zip(AXES, indices, strict=True)}


def fits(when: Any, names: dict[str, str]) -> bool:
    """Whether a cell meets conditions, asked one after the other."""
    return all(names[axis] in values for axis, values in when.items())


# -- one predicate of the specification changed --


def activations(backend: str, *, drop: str = "", add: str = "") -> Planted:
    """A backend takes an activation less, or one more."""
    accepted = [name for name in predicates.ACCEPTED_ACTIVATIONS[backend] if name != drop]
    return lambda: patch.dict(predicates.ACCEPTED_ACTIVATIONS, {backend: (*accepted, *filter(None, [add]))})


def predicate(table: str, backend: str, change: Callable[[Any, Any], Any]) -> Planted:
    """A backend's device, scheme or parallel check is another: ``change`` gets the facts and what it was."""
    honest = getattr(predicates, table)

    def changed(facts: Any) -> dict[str, Any]:
        checks = honest(facts)
        return {**checks, backend: change(facts, checks[backend])}

    return lambda: patch.object(predicates, table, changed)


def default(variable: str, state: int) -> Planted:
    """A variable that is unset counts as set."""
    honest = model.expect

    def changed(facts: Any, *order: Any) -> Any:
        texts = getattr(facts, variable)
        return honest(replace(facts, **{variable: np.where(texts == UNSET, state, texts)}), *order)

    return lambda: patch.object(model, "expect", changed)


def candidates(*order: str) -> Planted:
    """The candidates stand in another order: these first, in this order, then the others."""
    honest = model.expect
    first = [predicates.INDEX[name] for name in order]
    rest = [index for index in range(len(predicates.BACKENDS)) if index not in first]
    return lambda: patch.object(model, "expect", lambda facts: honest(facts, [*first, *rest]))
