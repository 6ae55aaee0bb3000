"""Selectors broken on purpose: each answers otherwise somewhere, and the checks of selection convict it by name."""

from __future__ import annotations

import os
from collections.abc import Iterator
from copy import deepcopy
from datetime import date
from functools import cache
from typing import Any
from unittest.mock import patch

import pytest

from conformance.selection import single
from conformance.selection.__main__ import main as show
from conformance.selection.cells import Cell
from conformance.selection.judge import NAMES
from conformance.selection.outcomes import Classifier
from conformance.selection.smoke import Smoke, smoke
from conformance.zoo.selection.__main__ import main
from conformance.zoo.selection.mutants import ALL, MUTANTS
from conformance.zoo.selection.plant import SelectorMutant, considering, support_of
from conformance.zoo.selection.score import Conviction, Survival, kill, score
from conformance.zoo.selection.witness import observe
from fp8moe import MalformedVariable, NoBackendFits, explain_fp8_moe_backend, select_fp8_moe_backend
from fp8moe.refusals import BackendNotSupported
from fp8moe.registry import seed_backends

HONEST = (select_fp8_moe_backend, explain_fp8_moe_backend)
SHARES = 8
"""An eighth of the mutants is killed each day; `python -m conformance.zoo.selection` kills them all."""
TODAY = ALL[date.today().toordinal() % SHARES :: SHARES]

CATALOGUE = {
    "arch-exact-match",
    "arch-closed-upper",
    "denylist-not-consulted",
    "unreachable-backend",
    "missing-return-fallthrough",
    "disable-removes-absent",
    "support-underclaim",
    "activation-overclaim",
    "explicit-request-degrades",
    "fallback-half-applied",
    "lora-unaware-selector",
    "error-swallowed-to-default",
    "reasons-discarded",
}
"""Of the catalogue of real defects: those of selection logic that this selector could have."""

PLANTED = {
    "runtime_error_where_nothing_fits": {RuntimeError},
    "malformed_is_a_key_error": {KeyError},
    "value_error_where_nothing_fits": {ValueError},
    "value_error_without_flashinfer": {ValueError},
    "not_implemented_must_use": {NotImplementedError},
    "masked_gemm_is_not_implemented": {NotImplementedError},
    "must_use_without_data": {ValueError},
    "malformed_not_named": {ValueError},
    "masked_gemm_not_said": {ValueError},
}
"""Mutants whose defect is an exception of a plain type."""


@cache
def honest(cell: str) -> list[str]:
    return observe(HONEST, Cell.parse(cell))


def test_there_are_many_of_distinct_names_and_sources() -> None:
    assert len(MUTANTS) == len(ALL) >= 50
    assert len({mutant.catalogue for mutant in ALL}) == len(ALL)
    assert {mutant.catalogue for mutant in ALL} >= CATALOGUE


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_answers_otherwise_at_its_witness(name: str) -> None:
    mutant = MUTANTS[name]
    assert observe(mutant.make(), Cell.parse(mutant.witness)) != honest(mutant.witness)


def test_the_honest_selector_answers_the_same_twice() -> None:
    cell = MUTANTS["lora_ignored"].witness
    assert observe(HONEST, Cell.parse(cell)) == honest(cell)


def raised_by(select: Any, cells: list[Cell]) -> Iterator[Exception]:
    for cell in cells:
        config, *rest, platform, env = cell.arguments
        try:
            with patch.dict(os.environ):
                select(deepcopy(config), *rest, platform=platform, env=env, backends=seed_backends())
        except Exception as error:
            yield error


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_raises_only_what_is_planted(name: str) -> None:
    """So that no conviction is due to a mistake in the mutant."""
    own = (BackendNotSupported, MalformedVariable, NoBackendFits)
    select, _ = MUTANTS[name].make()
    for error in raised_by(select, smoke().telling[::3]):
        masked_gemm = type(error) is ValueError and "MaskedGEMM" in str(error)
        assert isinstance(error, own) or masked_gemm or type(error) in PLANTED.get(name, set()), repr(error)


def test_the_honest_selector_passes() -> None:
    assert list(smoke().violations(*HONEST)) == []


@pytest.mark.parametrize("mutant", TODAY, ids=lambda mutant: mutant.name)
def test_a_mutant_is_convicted(mutant: SelectorMutant) -> None:
    conviction = kill(mutant)
    assert conviction is not None, f"{mutant.name} survives: {mutant.does}"
    assert conviction.killed_by in NAMES
    assert conviction.seconds < 60


def test_a_mutant_that_changes_nothing_survives() -> None:
    same = SelectorMutant("same", "", "nothing", support_of("MARLIN", non_gated=lambda takes: takes), "sel1:")
    (found,) = score([same])
    assert isinstance(found, Survival)
    assert found.why == ""


def test_an_exception_of_the_suite_convicts_nobody() -> None:
    class Broken(Smoke):
        def __init__(self) -> None:
            pass

        def first_violation(self, select: Any, explain: Any) -> Any:
            raise IndexError("in the suite")

    (found,) = score([ALL[0]], Broken())
    assert isinstance(found, Survival)
    assert "IndexError" in found.why


def test_the_registry_is_as_it_was_after_a_mutant() -> None:
    before = [(spec.name, spec.experts_cls, spec.experts_cls.support) for spec in seed_backends()]
    assert kill(MUTANTS["trtllm_takes_gelu"]) is not None
    assert [(spec.name, spec.experts_cls, spec.experts_cls.support) for spec in seed_backends()] == before
    assert smoke().first_violation(*HONEST) is None


def test_the_command_tells_who_is_convicted_by_what(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lora_ignored"]) == 0
    out = capsys.readouterr().out
    assert "the honest selector: passes" in out
    assert "lora_means_triton" in out
    assert "1 of 1 convicted" in out
    with pytest.raises(SystemExit):
        main(["no_such_mutant"])
    assert "no mutant no_such_mutant" in capsys.readouterr().err


SINGLE = {
    "errors_say_why": "reasons_discarded",
    "arguments_are_left_alone": "shortens_the_list",
    "equal_arguments_give_equal_answers": "keys_by_identity",
    "sizes_and_ranks_do_not_matter": "experts_in_fours",
    "the_order_given_is_kept": "registry_order",
    "a_newcomer_counts_only_where_it_fits": "newcomers_left_out",
}


@pytest.mark.parametrize("check", single.CHECKS)
def test_each_check_of_single_calls_convicts_its_mutant(check: str) -> None:
    """These mutants give the specification's outcome on every cell of the grid."""
    mutant = MUTANTS[SINGLE[check]]
    specs = seed_backends()
    subject = single.Subject(*mutant.make(), Classifier(specs), specs)
    found = single.violation(check, subject, smoke().telling)
    assert found is not None
    assert found.invariant == check
    assert found.reproduction.endswith(f"'{found.cell}' --check {check}")
    assert show([found.cell, "--check", check]) == 0, "the honest selector holds there"


def test_convictions_name_a_cell_that_shows_the_defect() -> None:
    """The simplest of the first product that shows it: here the plainest of all cells."""
    conviction = kill(SelectorMutant("backwards", "", "", considering(lambda given: given[::-1]), "sel1:"))
    assert isinstance(conviction, Conviction)
    assert conviction.killed_by == "first_supported_in_order"
    assert Cell.parse(conviction.cell)
