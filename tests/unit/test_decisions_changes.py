"""What changed between two decisions: exact lines, few of them for a change of one predicate."""

import numpy as np
import pytest

from conformance.decisions.changes import LINES, Difference, difference
from conformance.decisions.decided import Decided, decide_grid
from conformance.decisions.declared import once_each
from conformance.selection.facts import FALSE, TRUE
from conformance.selection.grid import GRID, Product
from conformance.zoo.selection.mutants import MUTANTS
from tests.unit.decision_grids import (
    SMALL,
    Planted,
    activations,
    as_specified,
    candidates,
    cells_of,
    default,
    fits,
    predicate,
    specified,
)


def held_to(found: Difference, kept: Decided, now: Decided, products: tuple[Product, ...]) -> None:
    """Every cell, one after the other: the first line that fits says what it is now; where none does, as before."""
    once = once_each(products)
    cells = [0] * len(found.lines)
    for index, number, names in cells_of(products):
        was, is_now = int(kept.labels[index][number]), int(now.labels[index][number])
        lines = (n for n, line in enumerate(found.lines) if was in line.kept and fits(line.when, names))
        first = next(lines, None)
        if first is None:
            assert was == is_now, names
        else:
            assert list(found.lines[first].now) == [is_now], names
            assert was != is_now, names
            cells[first] += int(once[index][number])
    assert cells == [line.cells for line in found.lines]
    assert sum(cells) == found.cells


# -- one predicate changed, on the whole grid --

ONE_PREDICATE: dict[str, tuple[Planted, int, str]] = {
    "an activation dropped": (
        activations("TRITON", drop="silu"),
        2,
        "activation = silu: TRITON [R8] -> NotImplementedError: nothing fits [R9] (77,960 cells)",
    ),
    "a capability threshold": (
        predicate("_devices", "MARLIN", lambda facts, was: was & (facts.capability >= 80)),
        2,
        "device = sm75: MARLIN [R8] -> NotImplementedError: nothing fits [R9] (29,674 cells)",
    ),
    "two candidates in another order": (
        candidates("AITER", "FLASHINFER_TRTLLM", "FLASHINFER_CUTLASS", "TRITON"),
        1,
        "anywhere: DEEPGEMM or VLLM_CUTLASS [R8] -> TRITON [R8] (17,780 cells)",
    ),
    "a variable's default off": (
        default("use_deep_gemm", FALSE),
        3,
        "VLLM_USE_DEEP_GEMM unset, VLLM_TEST_FORCE_FP8_MARLIN on: 7 outcomes [R4, R4b], most often ",
    ),
}


@pytest.mark.parametrize("name", ONE_PREDICATE)
def test_change_of_one_predicate_takes_few_lines(name: str) -> None:
    planted, lines, text = ONE_PREDICATE[name]
    with planted():
        now = specified()
    found = difference(as_specified(), now)
    told = str(found)
    assert text in told, told
    assert len(found.texts) <= lines <= LINES, told
    assert found.untold == 0
    assert found.summarised is (name == "a variable's default off")
    changed = zip(as_specified().differs(now), once_each(GRID), strict=True)
    assert sum(line.cells for line in found.lines) == found.cells == sum(int(once[n].sum()) for n, once in changed)


# -- exactness, cell by cell --


@pytest.mark.parametrize(
    "planted",
    [
        activations("TRITON", drop="silu"),
        activations("DEEPGEMM", add="gelu"),
        predicate("_schemes", "MARLIN", lambda facts, was: was & (facts.weight_key != 1)),
        predicate("_devices", "FLASHINFER_CUTLASS", lambda facts, was: was & (facts.capability != 90)),
        candidates("MARLIN", "TRITON", "DEEPGEMM"),
        default("use_flashinfer", TRUE),
    ],
)
def test_lines_say_what_changed_in_every_cell_and_no_more(planted: Planted) -> None:
    kept = specified(SMALL)
    with planted():
        now = specified(SMALL)
    found = difference(kept, now, SMALL, lines=200)
    assert found
    assert not found.summarised
    held_to(found, kept, now, SMALL)


@pytest.mark.parametrize("name", ["lora_ignored", "format_always_standard"])
def test_real_selectors_are_told_apart_exactly(name: str) -> None:
    kept = decide_grid(products=SMALL, processes=0)
    now = decide_grid(MUTANTS[name].make()[0], products=SMALL, processes=0)
    found = difference(kept, now, SMALL, lines=200)
    assert found
    held_to(found, kept, now, SMALL)


def test_nothing_changed() -> None:
    found = difference(as_specified(), as_specified())
    assert not found
    assert (str(found), found.cells) == ("", 0)


# -- more than a few lines --


def test_many_new_decisions_are_summed_up_by_rule() -> None:
    kept = specified(SMALL)
    with default("use_flashinfer", TRUE)():
        now = specified(SMALL)
    found = difference(kept, now, SMALL, lines=3)
    assert found.summarised
    assert found.untold == 0
    assert sum(line.cells for line in found.lines) == found.cells


def test_irregular_change_says_how_much_it_leaves_untold() -> None:
    kept = specified(SMALL)
    now = Decided(tuple(np.where(np.arange(len(labels)) * 7919 % 97 < 40, 7, labels) for labels in kept.labels[1:]))
    found = difference(Decided(kept.labels[1:]), now, SMALL[1:], lines=4)
    assert len(found.texts) == 4
    assert found.untold + sum(line.cells for line in found.lines) == found.cells
    assert found.texts[-1] == f"and {found.untold:,} cells more, in no pattern of a few lines"
