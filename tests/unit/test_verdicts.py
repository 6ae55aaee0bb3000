"""What a backend may not get away with, or take the suite down with: each was once an acquittal or a crash."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from conformance.cases import Case
from conformance.checks import check_case
from conformance.matrix import EQUIVALENCE, PARTS, cell_status
from conformance.plan import Cell, Subject, Target
from conformance.results import CheckResult, Status
from conformance.untouched import fingerprint
from fp8moe.backends.torch_experts import TorchExperts
from fp8moe.platforms import PLATFORMS
from fp8moe.recipe import Contract

HERE = Target("cpu", PLATFORMS["cpu"], "cpu")
CASE = Case(tokens=5, experts=2, top_k=2, hidden=128, inter=128, scheme="tensor_tok")
Apply = Callable[..., Tensor]


def planted(apply: Callable[[Any, Apply, tuple[Any, ...], dict[str, Any]], Tensor]) -> type[TorchExperts]:
    def overriding(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        return apply(self, lambda *a, **k: TorchExperts.apply(self, *a, **k), args, kwargs)

    return type("Planted", (TorchExperts,), {"apply": overriding})


def verdict(cls: type[TorchExperts], case: Case = CASE) -> CheckResult:
    return check_case(case, Subject(cls.__name__, cls, cls.__name__), HERE)


def test_the_honest_one_passes() -> None:
    assert verdict(planted(lambda self, apply, args, kwargs: apply(*args, **kwargs))).status is Status.PASSED


def test_a_contract_taken_back_during_the_call_counts() -> None:
    def apply(self: Any, honest: Apply, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        self.contract = replace(self.contract, deterministic=None)
        self.calls = getattr(self, "calls", 0) + 1
        result = honest(*args, **kwargs)
        return result if self.calls == 1 else result.mul_(1 + 2.0**-7)

    result = verdict(planted(apply))
    assert (result.status, result.reason[:37]) == (Status.FAILED, "it declares that it is deterministic,")


@pytest.mark.parametrize(
    ("contract", "words"),
    [
        ("hopper", "its contract raised TypeError: it is a str: expected a fp8moe.recipe.Contract"),
        (Contract(arithmetic=lambda pairs: {}[pairs]), "its contract raised KeyError"),
        (
            Contract(arithmetic=lambda pairs: "wgmma"),
            "arithmetic: a function that gives a str: expected a fp8moe.recipe.Arithmetic",
        ),  # type: ignore[arg-type, return-value]
        (Contract(steps=lambda pairs: "fused"), "steps: a function that gives a str: expected a fp8moe.recipe.Steps"),  # type: ignore[arg-type, return-value]
    ],
    ids=["no contract", "raises", "no arithmetic", "no steps"],
)
def test_a_contract_that_is_none_is_the_backends_failure(contract: Any, words: str) -> None:
    def init(self: Any, *args: Any) -> None:
        TorchExperts.__init__(self, *args)
        self.contract = contract

    result = verdict(type("Planted", (TorchExperts,), {"__init__": init}))
    assert result.status is Status.FAILED
    assert words in result.reason


@pytest.mark.parametrize(
    ("shown", "words"),
    [
        (("gemm1",), "observe: stage='gemm1': expected one of first_gemm, "),
        (("activation", "activation"), "observe: stage='activation' is shown twice in a call"),
    ],
)
def test_a_stage_that_is_none_is_named(shown: tuple[str, ...], words: str) -> None:
    def apply(self: Any, honest: Apply, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        if self.observe is not None:
            for stage in shown:
                self.observe(stage, torch.zeros(10, 128))
        return honest(*args, **kwargs)

    result = verdict(planted(apply))
    assert result.status is Status.FAILED
    assert words in result.reason


def test_an_output_that_is_right_only_when_given_or_only_when_not() -> None:
    for given in (True, False):

        def apply(
            self: Any, honest: Apply, args: tuple[Any, ...], kwargs: dict[str, Any], given: bool = given
        ) -> Tensor:
            result = honest(*args, **kwargs)
            return result.zero_() if (kwargs["output"] is not None) is given else result

        assert verdict(planted(apply)).status is Status.FAILED


def test_weights_that_change_places_are_noticed() -> None:
    large = torch.arange(6 << 20, dtype=torch.int32).view(torch.uint8)
    before = fingerprint(large)
    assert torch.equal(before, fingerprint(large.clone()))
    for one, other in ((0, 64), (16, 5 << 20)):
        moved = large.clone()
        moved[one : one + 16], moved[other : other + 16] = large[other : other + 16], large[one : one + 16]
        assert not torch.equal(before, fingerprint(moved))
    last = torch.cat([large, torch.zeros(3, dtype=torch.uint8)])
    changed = last.clone()
    changed[-1] = 1
    assert not torch.equal(fingerprint(last), fingerprint(changed))


def test_a_cell_says_how_many_cases_were_beyond_the_declared_limits() -> None:
    cell = Cell(Subject("A", TorchExperts, "A"), "block", None, "", None, ("silu",))
    parts = [CheckResult("computes", part, Status.PASSED, "A", "block") for part in PARTS]
    passed = [CheckResult("computes", EQUIVALENCE, Status.PASSED, "A", "block", f"v1:M={n}") for n in range(2)]
    beyond = [
        CheckResult("computes", EQUIVALENCE, Status.NOT_APPLICABLE, "A", "block", f"v1:M={n}") for n in range(3, 9)
    ]
    assert cell_status(cell, [*parts, *passed, *beyond]) == (Status.PASSED, "ok 2 n/a 6")
