"""Editions as data: what is out stays as it is."""

from __future__ import annotations

from dataclasses import replace

import pytest

from conformance.checks import CHECKS
from conformance.editions import UnknownEdition, edition, names, target_of


@pytest.mark.parametrize("name", names())
def test_this_suite_goes_through_what_an_edition_froze(name: str) -> None:
    """Where it fails, cases or checks have changed: they belong into a new edition, beside this one."""
    assert edition(name).stale == ""


def test_an_edition_that_has_gone_stale_says_so() -> None:
    current = edition(names()[-1])
    assert "checks" in replace(current, checks=current.checks[1:]).stale
    assert "cases on cpu" in replace(current, seed=1, manifests={"cpu": current.manifests["cpu"]}).stale
    assert sorted(CHECKS) == current.checks


def test_unknown_names() -> None:
    with pytest.raises(UnknownEdition, match=r"'1999': expected 2026\.1"):
        edition("1999")
    with pytest.raises(ValueError, match="interpreter"):
        target_of("interpreter")
