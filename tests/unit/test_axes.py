"""The configuration space: what is excluded is what a case refuses, and covering arrays cover what is left."""

from __future__ import annotations

import random
from itertools import combinations, product

import pytest

from conformance.axes import AXES, EXCLUSIONS, Space
from conformance.cases import Case, InvalidCase
from conformance.covering import Tally, covering_rows
from fp8moe.config import ACTIVATIONS

WHOLE = Space(dict.fromkeys(AXES["scheme"], ACTIVATIONS), fnuz=True)  # type: ignore[arg-type]
NARROW = Space({"block": ("silu", "gelu"), "tensor_dyn": ("silu",)}, fnuz=False)


def is_a_case(**fields: object) -> bool:
    try:
        Case(**fields)  # type: ignore[arg-type]
    except InvalidCase:
        return False
    return True


def test_there_are_fourteen_axes_and_every_value_is_a_cases() -> None:
    assert len(AXES) >= 14
    defaults = Case()
    for name, values in AXES.items():
        assert values[0] == getattr(defaults, name)
        assert len(set(values)) == len(values)


def test_what_is_excluded_is_what_a_case_refuses() -> None:
    """Over every combination of the values that exclusions speak of."""
    names = sorted({name for exclusion in EXCLUSIONS for name in exclusion.axes}, key=list(AXES).index)
    for values in product(*(AXES[name] for name in names)):
        given = dict(zip(names, values, strict=True))
        excluded = any(e.excludes(*(given[name] for name in e.axes)) for e in EXCLUSIONS)
        assert excluded is not is_a_case(**given), given


def test_the_other_axes_go_with_everything() -> None:
    draw = random.Random(0)
    possible = list(covering_rows(WHOLE, 2, 1))
    assert possible
    for row in draw.sample(possible, 50):
        WHOLE.case(row, 0)  # raises where it is none


def test_every_excluded_pair_has_a_reason_and_no_case() -> None:
    pairs = WHOLE.excluded_pairs()
    assert ("law", "repeated", "weight_on_input", True) in [pair[:4] for pair in pairs]
    for one, value, other, value_of_other, reason in pairs:
        assert reason
        draw = random.Random(f"{one}{value}{other}")
        for _ in range(60):
            rest = {name: draw.choice(values) for name, values in AXES.items()}
            assert not is_a_case(**(rest | {one: value, other: value_of_other}))


def test_a_backend_that_refuses_a_pair_has_it_excluded() -> None:
    pairs = [pair[:4] for pair in NARROW.excluded_pairs()]
    assert ("scheme", "tensor_dyn", "activation", "gelu") in pairs
    assert ("scheme", "block", "activation", "gelu") not in pairs
    assert NARROW.values[NARROW.names.index("fnuz")] == (False,)


@pytest.mark.parametrize("space", [WHOLE, NARROW], ids=["whole", "narrow"])
def test_pairs_are_all_covered_by_few_cases(space: Space) -> None:
    rows = list(covering_rows(space, 2, 0))
    met = {
        (first, space.values[first][row[first]], second, space.values[second][row[second]])
        for row in rows
        for first, second in combinations(range(len(row)), 2)
    }
    possible = {
        (first, space.values[first][a], second, space.values[second][b])
        for first, second in combinations(range(len(space.names)), 2)
        for a, b in product(range(len(space.values[first])), range(len(space.values[second])))
        if space.together((first, second))[a, b]
    }
    assert met == possible
    largest = sorted(space.sizes)[-2:]
    assert len(rows) <= 2 * largest[0] * largest[1]


def test_triples_are_covered_as_far_as_asked() -> None:
    rows = list(covering_rows(NARROW, 3, 0, share=0.99))
    tally = Tally(NARROW, 3)
    tally.add_all(rows)
    assert 0.99 <= tally.coverage.share < 1
    tally.add_all(list(covering_rows(NARROW, 3, 1)))
    assert tally.coverage.share == 1
    assert str(tally.coverage).startswith("all of ")


def test_a_row_and_its_case_are_one() -> None:
    for number, row in enumerate(covering_rows(NARROW, 2, 3)):
        assert NARROW.row(NARROW.case(row, number)) == row
    assert NARROW.row(Case(hidden=7168)) is None
    assert NARROW.row(Case(scheme="none")) is None


def test_the_same_seed_gives_the_same_rows() -> None:
    assert list(covering_rows(NARROW, 2, 5)) == list(covering_rows(NARROW, 2, 5))
    assert list(covering_rows(NARROW, 2, 5)) != list(covering_rows(NARROW, 2, 6))
