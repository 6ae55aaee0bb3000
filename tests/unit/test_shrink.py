"""How small a failing case becomes."""

from __future__ import annotations

from conformance.cases import Case
from conformance.shrink import non_default_fields, shrink

LARGE = Case(top_k=4, hidden=512, inter=320, tokens=130, law="skewed")


def test_a_fault_that_shows_for_a_lesser_reason_is_shown_by_its_own() -> None:
    """Here by a law, and in one large case as well, from which no step leads to the law."""
    small = shrink(LARGE, lambda case: case.law == "unnormalised" or case.tokens * case.hidden > 40_000)
    assert non_default_fields(small) == ["law"]
    assert small.law == "unnormalised"


def test_what_only_large_cases_show_stays_large() -> None:
    small = shrink(LARGE, lambda case: case.tokens > 40 and case.top_k == 4)
    assert (non_default_fields(small), small.tokens) == (["top_k", "tokens"], 41)


def test_fields_that_are_kept_stay() -> None:
    case = Case(scheme="channel_tok", tokens=65, bias=True, layout="strided")
    small = shrink(case, lambda case: case.scheme == "channel_tok", keep=("scheme",))
    assert non_default_fields(small) == ["scheme"]


def test_a_case_beyond_the_time_is_given_back() -> None:
    assert shrink(LARGE, lambda case: True, seconds=0.0) == LARGE
