"""Random questions, by the suite's own generators: any call that Hypothesis makes, and cells of the declared grid."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import count

import hypothesis

from conformance.selection.draw import Call, calls
from conformance.selection.grid import GRID
from fp8moe_vllm.question import Parts, can_be_put, parts_of, told

AT_A_TIME = 1000
"""Calls that Hypothesis makes in one go: it remembers all of a go, and slows down."""


def drawn(cases: int, seed: int) -> Iterator[Parts]:
    """So many different questions, half of them calls and half cells in turn.

    Calls are odd, and most end early; cells are plain, and reach every rule. The same number and seed give the same
    questions in one installation: Hypothesis takes texts from modules that are not installed ones.
    """
    seen = set[str]()
    sources = _calls(seed, min(cases, AT_A_TIME)), _cells(seed)
    for number in count():
        if len(seen) == cases:
            return
        parts = parts_of(next(sources[number % len(sources)]))
        if told(parts) not in seen:
            seen.add(told(parts))
            yield parts


def _calls(seed: int, at_a_time: int) -> Iterator[Call]:
    for number in count():
        yield from _go(f"{seed} {number}", at_a_time)


def _go(seed: str, at_a_time: int) -> list[Call]:
    found: list[Call] = []

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=at_a_time,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(calls(own_candidates=False).filter(lambda call: can_be_put(call.env)))
    def draw(call: Call) -> None:
        found.append(call)

    draw()
    return found


def _cells(seed: int) -> Iterator[Call]:
    """By turns of any product as likely as any other, and of a product as likely as it is large."""
    chance = random.Random(seed)
    sizes = [product.size for product in GRID]
    for number in count():
        (product,) = chance.choices(GRID, weights=sizes if number % 2 else None)
        yield Call(*product.cell(chance.randrange(product.size)).arguments, None)
