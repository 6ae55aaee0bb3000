"""Selects, for one backend: what its class says of itself is well-formed, total, and a function of its arguments.

Whether it keeps its word is another question: what it claims of the layers of `plan.PROBED_SIZES` is computed, and
before each case it is asked about that case's own layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

from conformance.plan import Subject, probe_config
from conformance.results import CheckResult, Status
from conformance.vocabulary import SCHEME_NAMES
from fp8moe.config import ACTIVATIONS, FusedMoEActivationFormat
from fp8moe.envs import Env
from fp8moe.experts import contract_violations
from fp8moe.platforms import PLATFORMS
from fp8moe.registry import Reason
from fp8moe.schemes import SCHEMES
from fp8moe.texts import said

CONTRACT, PREDICATE = "selects.contract", "selects.predicate"
ENVIRONMENTS: tuple[dict[str, str], ...] = ({}, {"VLLM_ROCM_USE_AITER": "1"})


def predicate_results(subject: Subject) -> list[CheckResult]:
    """Two results: that the class keeps the form of a backend, and that its predicate can be relied on."""
    cls, asked = subject.experts_cls, list(_questions())
    form, word = "; ".join(contract_violations(cls)), _broken(subject, asked)
    formed = CheckResult("selects", CONTRACT, Status.FAILED if form else Status.PASSED, subject.name, reason=form)
    scope = f"{len(asked):,} questions, each asked twice"
    status = Status.FAILED if word else Status.PASSED
    return [formed, CheckResult("selects", PREDICATE, status, subject.name, reason=word, scope=scope)]


def _questions() -> Iterator[tuple[Any, ...]]:
    """Every scheme and activation, on every device of the catalogue, in both formats."""
    formats = (FusedMoEActivationFormat.Standard, FusedMoEActivationFormat.BatchedExperts)
    for layout, scheme, activation, platform in product(formats, SCHEME_NAMES, ACTIVATIONS, PLATFORMS.values()):
        batched = layout is FusedMoEActivationFormat.BatchedExperts
        for env in ENVIRONMENTS if platform.is_rocm else ENVIRONMENTS[:1]:
            yield probe_config(activation, batched=batched), *SCHEMES[scheme], layout, platform, Env.of(env)


def _broken(subject: Subject, questions: Sequence[tuple[Any, ...]]) -> str:
    """What is wrong with the answers; "" where nothing is."""
    answers = [_ask(subject, question) for question in questions]
    again = [_ask(subject, question) for question in reversed(questions)][::-1]
    for question, answer, second in zip(questions, answers, again, strict=True):
        told = _ill_formed(answer)
        if not told and answer != second:
            told = f"it answered {answer!r}, and asked again in another order {second!r}"
        if not told and answer[0] and question[3] is not subject.experts_cls.activation_format():
            told = "it takes another format than its own activation_format()"
        if told:
            config, weight_key, activation_key, layout, platform, _ = question
            return (
                f"is_supported_config: {told} (activation {config.activation}, weights {weight_key or 'unquantised'}, "
                f"activations {activation_key or 'unquantised'}, {layout.name}, {platform})"
            )
    return ""


def _ask(subject: Subject, question: tuple[Any, ...]) -> Any:
    config, weight_key, activation_key, layout, platform, env = question
    cls = subject.experts_cls
    try:
        return cls.is_supported_config(cls, config, weight_key, activation_key, layout, platform=platform, env=env)
    except Exception as error:
        return error


def _ill_formed(answer: Any) -> str:
    if isinstance(answer, Exception):
        return f"it raised {said(answer)}; expected an answer to every question"
    if not (isinstance(answer, tuple) and len(answer) == 2 and isinstance(answer[0], bool)):
        return f"it answered {answer!r}: expected (bool, Reason or None)"
    supported, reason = answer
    if supported and reason is not None:
        return f"it answered {answer!r}: a supported configuration has no reason"
    if not supported and not isinstance(reason, Reason):
        return f"it answered {answer!r}: a refusal has a fp8moe.registry.Reason"
    return ""
