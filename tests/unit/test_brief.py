"""Reasons in a list: in plain words, each figure once, never cut within a word."""

import pytest

from conformance.bounds.judgement import MEANINGS
from conformance.brief import MOST, brief

WHERE = "token 0, columns 0-127 (column 3): expected 1.5, got 2, error/bound 1.51e+04"


@pytest.mark.parametrize("statistic", MEANINGS)
@pytest.mark.parametrize("before", ["", "with local experts in the order [1, 2, 0]: "])
def test_a_statistic_is_told_by_what_it_means(statistic: str, before: str) -> None:
    told = brief(f"{before}{statistic} = 1.51e+04 > 1: {MEANINGS[statistic]}: {WHERE}")
    assert told == f"{before}{MEANINGS[statistic].partition(',')[0]} (1.51e+04 times the limit)"
    assert " = " not in told


def test_of_several_statistics_the_first_is_told() -> None:
    told = brief(f"TN = 2 > 1: {MEANINGS['TN']}; gain = 3 > 1: {MEANINGS['gain']}: {WHERE}")
    assert told == f"{MEANINGS['TN']} (2 times the limit)"


def test_what_is_not_finite_has_no_ratio() -> None:
    assert brief(f"finite = inf > 1: {MEANINGS['finite']}: {WHERE}") == "not finite where the recipe is"


def test_what_is_long_is_cut_between_words() -> None:
    reason = "with half of the scales doubled and their codes halved: " + "4085 of 4096 elements differ, " * 9
    told = brief(reason)
    assert len(told) <= MOST
    assert told.endswith(" …")
    assert reason.startswith(told.removesuffix(" …") + " ")
    assert len(brief("x" * 1000)) <= MOST
    assert brief("apply raised ValueError: no") == "apply raised ValueError: no"
