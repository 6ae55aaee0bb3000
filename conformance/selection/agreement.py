"""One call judged: the selector and its explanation against the model."""

from __future__ import annotations

from functools import cache
from typing import Any

from conformance.selection.ask import ELEVEN
from conformance.selection.draw import Call
from conformance.selection.explanations import Explain, verdict_code
from conformance.selection.model import EVERY, RULES, Expectation, expect_call
from conformance.selection.outcomes import Classifier, describe
from conformance.selection.predicates import BACKENDS
from conformance.selection.runner import Select
from fp8moe import explain_fp8_moe_backend, select_fp8_moe_backend

SPECS = {spec.backend: spec for spec in ELEVEN}


@cache
def classifier() -> Classifier:
    """The classifier for the registry's classes."""
    return Classifier(ELEVEN)


def expected(call: Call) -> Expectation:
    """What the specification says of a call."""
    return expect_call(*call[:6], EVERY if call.order is None else call.order)


def arguments(call: Call) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of a call."""
    backends = ELEVEN if call.order is None else [SPECS[BACKENDS[index]] for index in call.order]
    return call[:4], {"platform": call.platform, "env": call.env, "backends": backends}


def outcome(call: Call, select: Select = select_fp8_moe_backend) -> int:
    """The code of the selector's answer."""
    positional, keywords = arguments(call)
    return classifier().call(select, *positional, **keywords)


def select_disagrees(call: Call, select: Select = select_fp8_moe_backend) -> str | None:
    """What the selector does other than the specification says, in words."""
    want, got = int(expected(call).outcome), outcome(call, select)
    return None if want == got else f"expected {describe(want)}, got {describe(got)}"


def explain_disagrees(call: Call, explain: Explain = explain_fp8_moe_backend) -> str | None:
    """What the explanation says other than the specification does, in words."""
    positional, keywords = arguments(call)
    want, selection = expected(call), explain(*positional, **keywords)
    if selection.error is not None:
        got = classifier().error(selection.error)
    else:
        got = classifier().result((selection.backend, selection.experts_cls))
    order = EVERY if call.order is None else call.order
    compared = {
        "rule": (RULES[int(want.rule)], selection.rule),
        "outcome": (describe(int(want.outcome)), describe(got)),
        "order": ([BACKENDS[index] for index in order], [verdict.backend for verdict in selection.verdicts]),
        "reasons": (
            [int(want.reason(index)) for index in order],
            [verdict_code(verdict, call.env) for verdict in selection.verdicts],
        ),
        "consulted": (
            [bool(want.consulted(index)) for index in order],
            [verdict.consulted for verdict in selection.verdicts],
        ),
    }
    for part, (this, that) in compared.items():
        if this != that:
            return f"{part}: expected {this}, got {that}"
    return None
