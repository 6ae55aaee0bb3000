"""The numerics gate: a change that every check lets pass is seen; unchanged and noisy backends are not accused."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from conformance.cases import Case
from conformance.checks import check_case
from conformance.contain import Worker
from conformance.gate.gather import FAILED, SKIPPED, NotGathered, gather, told_figures
from conformance.gate.numerics import ALPHA, CaseFigures, Change, compare_numerics
from conformance.plan import Subject, Target
from conformance.planned import reference_to
from conformance.results import Status
from conformance.zoo.ordered import Ordered
from fp8moe.backends.torch_experts import TorchExperts
from fp8moe.platforms import PLATFORMS
from fp8moe.registry import Reason

HERE = Target("cpu", PLATFORMS["cpu"], "cpu")


def run_of(errors: list[float], digest: str = "a") -> dict[str, dict[str, CaseFigures]]:
    return {"X block": {f"case {n}": CaseFigures(f"{digest}{n}", error, 0.5) for n, error in enumerate(errors)}}


def changed(before: list[float], after: list[float]) -> Change:
    (found,) = compare_numerics(run_of(before), run_of(after, "b" if before != after else "a"))
    return found.change


def test_what_has_the_same_bits_is_the_same() -> None:
    (found,) = compare_numerics(run_of([1.0, 2.0]), run_of([1.0, 2.0]))
    assert found.change is Change.SAME_BITS
    assert str(found) == "X block: same bits in 2 cases"


def test_errors_that_grow_nearly_everywhere_are_worse() -> None:
    before = [1.0 + n / 100 for n in range(20)]
    after = [error * 1.001 for error in before]
    assert changed(before, after) is Change.WORSE
    assert changed(after, before) is Change.BETTER
    after[3] = before[3] / 2
    assert changed(before, after) is Change.WORSE


def test_few_cases_do_not_accuse() -> None:
    assert changed([1.0] * 5, [1.1] * 5) is Change.CHANGED  # a chance of 1 in 32


def test_a_noisy_backend_is_accused_as_seldom_as_the_level_says() -> None:
    """Of runs of ten cells whose errors are drawn anew: the exact test's size is at most its level."""
    source, accused, runs = random.Random(1), 0, 400
    for _ in range(runs):
        before, after = (
            {f"X {cell}": {str(n): CaseFigures(draw, source.random(), 0.5) for n in range(30)} for cell in range(10)}
            for draw in "ab"
        )
        accused += any(found.change is Change.WORSE for found in compare_numerics(before, after))
    # At most 2 expected; 9 or more have a chance below 1e-3.
    assert accused < 9
    assert ALPHA * runs == 2


def test_what_a_change_says() -> None:
    (found,) = compare_numerics(run_of([1.0] * 20), run_of([1.5] * 20, "b"))
    assert str(found) == (
        "X block: worse: 20 of 20 cases have other bits, the error is larger in 20 and smaller in 0 (chance 9.5e-07); "
        "median error 1 became 1.5, error/bound 0.5 became 0.5; most in case 0, times 1.5"
    )


def test_a_case_that_the_baseline_lacks_is_named() -> None:
    with pytest.raises(ValueError, match="X block: 1 case not in the baseline, such as case 1: write it anew"):
        compare_numerics(run_of([1.0]), run_of([1.0, 2.0]))


def test_what_is_not_run_any_more_is_told() -> None:
    gone, left = compare_numerics(run_of([1.0, 2.0]), {"X block": {"case 0": CaseFigures("a0", 1.0, 0.5)}})
    assert (gone.change, gone.cases, left.change) == (Change.GONE, 1, Change.SAME_BITS)
    assert str(gone) == "X block: 1 case of the baseline not run any more, such as case 1"
    (gone,) = compare_numerics(run_of([1.0]), {})
    assert gone.change is Change.GONE


# -- on backends --


class Undeclared(Ordered):
    """Sums as torch makes them, and a contract that leaves them open."""

    contract = replace(TorchExperts.contract, arithmetic=None)


class RoundsOnceMore(Undeclared):
    """Each sum is rounded to 15 bits, which is well within what an undeclared unit may do."""

    def product(self, a: Tensor, weight: Tensor) -> Tensor:
        bits = super().product(a, weight).view(torch.int32)
        return ((bits + 256) & -512).view(torch.float32)


CASES = [Case(tokens=5, experts=2, hidden=128, inter=128, seed=seed) for seed in range(16)]


def figures_of(cls: type[TorchExperts]) -> dict[str, dict[str, CaseFigures]]:
    told = {str(case): told_figures(reference_to(cls), "cpu", str(case)) for case in CASES}
    return {"X block": {case: CaseFigures(**one) for case, one in told.items()}}


def test_one_more_rounding_is_seen_though_every_check_passes() -> None:
    for case in CASES:
        result = check_case(case, Subject("RoundsOnceMore", RoundsOnceMore, "x:RoundsOnceMore"), HERE)
        assert result.status is Status.PASSED, result.reason
    before = figures_of(Undeclared)
    (again,) = compare_numerics(before, figures_of(Undeclared))
    assert again.change is Change.SAME_BITS
    (found,) = compare_numerics(before, figures_of(RoundsOnceMore))
    assert found.change is Change.WORSE, str(found)


class Raises(TorchExperts):
    def apply(self, *args: Any, **kwargs: Any) -> Tensor:
        raise RuntimeError("no kernel image")


class Limited(TorchExperts):
    contract = replace(TorchExperts.contract, max_top_k=1)


class Nonsense(TorchExperts):
    def apply(self, *args: Any, **kwargs: Any) -> Tensor:
        return super().apply(*args, **kwargs) * torch.nan


class Picky(TorchExperts):
    @staticmethod
    def is_supported_config(cls: Any, *given: Any, **named: Any) -> tuple[bool, Reason | None]:
        return False, Reason.SCHEME


def test_a_wrong_output_gives_no_figures() -> None:
    assert "not finite" in told_figures(reference_to(Nonsense), "cpu", str(Case(tokens=3)))[FAILED]


def test_what_overflows_as_it_may_has_a_finite_error() -> None:
    text = "v1:E=4,k=2,H=128,I=128,M=5,dtype=fp16,values=overflow,seed=1"
    told = told_figures(reference_to(TorchExperts), "cpu", text)
    assert math.isfinite(told["error"])
    assert math.isfinite(told["error_over_bound"])


def test_a_backend_that_runs_nothing_here_gives_no_baseline() -> None:
    with Worker("cpu") as worker, pytest.raises(NotGathered, match=r"gives no output here: .*SCHEME"):
        gather([worker], [reference_to(Picky)])


def test_why_there_are_no_figures() -> None:
    assert told_figures(reference_to(Raises), "cpu", str(Case(tokens=3)))[FAILED].startswith("apply raised Runtime")
    assert "max_top_k=1" in told_figures(reference_to(Limited), "cpu", str(Case(tokens=3)))[SKIPPED]


def test_a_backend_that_fails_gives_no_baseline() -> None:
    with (
        Worker("cpu") as worker,
        pytest.raises(NotGathered, match=r"Raises on .*apply raised RuntimeError: no kernel image.*run `fp8moe check"),
    ):
        gather([worker], [reference_to(Raises)])
