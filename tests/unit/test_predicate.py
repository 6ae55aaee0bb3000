"""What a backend's class says of itself is judged before anything is computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from conformance.plan import Subject, load_subject
from conformance.predicate import predicate_results
from conformance.results import Status
from fp8moe.backends.torch_experts import TorchExperts
from fp8moe.registry import SEED_ORDER, Reason


def results_of(predicate: Callable[..., Any]) -> list[tuple[Status, str]]:
    cls = type("Planted", (TorchExperts,), {"is_supported_config": staticmethod(predicate)})
    return [(result.status, result.reason) for result in predicate_results(Subject("Planted", cls, "x:Planted"))]


def test_all_that_are_there_keep_to_the_form() -> None:
    for name in [*(name for name, _, _ in SEED_ORDER), "TorchExperts", "BatchedTorchExperts"]:
        for result in predicate_results(load_subject(name)):
            assert result.status is Status.PASSED, result


def test_one_that_takes_everything_in_its_format_passes() -> None:
    def predicate(cls: Any, config: Any, weights: Any, activations: Any, layout: Any, **_: Any) -> Any:
        fits = layout is TorchExperts.activation_format()
        return fits, None if fits else Reason.FORMAT

    assert [status for status, _ in results_of(predicate)] == [Status.PASSED] * 2


@pytest.mark.parametrize(
    ("predicate", "words"),
    [
        (lambda *_, **__: True, "it answered True: expected (bool, Reason or None)"),
        (lambda *_, **__: (True, None), "it takes another format than its own activation_format()"),
        (lambda *_, **__: (True, Reason.DEVICE), "a supported configuration has no reason"),
        (lambda *_, **__: (False, "no"), "a refusal has a fp8moe.registry.Reason"),
        (lambda *_, **__: {}["x"], "it raised KeyError: 'x'; expected an answer to every question"),
    ],
)
def test_answers_that_are_none(predicate: Callable[..., Any], words: str) -> None:
    assert [words in reason for _, reason in results_of(predicate)] == [False, True]


def test_an_answer_that_depends_on_what_was_asked_before() -> None:
    asked: list[int] = []

    def predicate(*_: Any, **__: Any) -> Any:
        asked.append(0)
        return False, Reason.DEVICE if len(asked) % 7 else Reason.SCHEME

    (_, _), (status, reason) = results_of(predicate)
    assert status is Status.FAILED
    assert "and asked again in another order" in reason
