"""The selector's rules in their order, from `fp8moe.selector.decide`, and what they come to on questions."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping

import torch

from fp8moe.commands.explain import RULES
from fp8moe.config import RoutingMethodType
from fp8moe.envs import AITER, AITER_MOE, DEEP_GEMM, FLASHINFER_BACKEND, FLASHINFER_FP8, FORCE_MARLIN, MOE_DEEP_GEMM
from fp8moe.refusals import BackendNotSupported
from fp8moe.registry import Reason
from fp8moe.selector import MEASURED, Selection, decide
from parts.asked import BATCHED, Question, outcome
from parts.markdown import code, table, text

RULE = re.compile(r"#\s(?P<name>R\d[a-c]?): (?P<says>.+)$", re.MULTILINE)
AT_WORK = (
    Question(layer={"is_lora_enabled": True}),
    Question(env={FLASHINFER_FP8: "yes"}),
    Question(env={FLASHINFER_FP8: "0"}),
    Question(env={FLASHINFER_FP8: "1", FLASHINFER_BACKEND: "throughput"}),
    Question("b200", env={FLASHINFER_FP8: "1", FLASHINFER_BACKEND: "latency"}),
    Question(env={FLASHINFER_FP8: "1", FLASHINFER_BACKEND: "masked_gemm"}),
    Question("b200", env={FLASHINFER_FP8: "1"}),
    Question("a100", env={FLASHINFER_FP8: "1"}),
    Question(env={DEEP_GEMM: "on"}),
    Question(env={DEEP_GEMM: "0"}),
    Question(env={DEEP_GEMM: "1"}),
    Question(env={MOE_DEEP_GEMM: "1"}, parallel=BATCHED),
    Question(env={FORCE_MARLIN: "1"}),
    Question("mi300x", env={AITER: "0"}),
    Question("mi300x", env={AITER: "1", AITER_MOE: "1"}),
    Question(scheme="tensor_dyn"),
    Question(scheme="tensor_dyn", cutlass=True),
    Question(parallel=BATCHED),
    Question("l40s"),
    Question("t4"),
    Question("h100", scheme="tensor_128"),
    Question("cpu"),
)
"""At least one for every rule that decides."""
FLASHINFER_ALL2ALL = {**BATCHED, "all2all_backend": "flashinfer_all2allv"}
REFUSED = {
    Reason.DEVICE: Question(),
    Reason.GATING: Question(layer={"is_act_and_mul": False}),
    Reason.ACTIVATION: Question(layer={"activation": "relu2_no_mul"}),
    Reason.SCHEME: Question(scheme="tensor_128"),
    Reason.PARALLEL: Question(parallel=FLASHINFER_ALL2ALL),
    Reason.ROUTING: Question("b200", layer={"routing_method": RoutingMethodType.TopK}),
    Reason.FORMAT: Question(parallel=BATCHED),
    Reason.LOGITS_DTYPE: Question("b200", layer={"router_logits_dtype": torch.float32}),
    Reason.DISABLED_BY_ENV: Question(env={DEEP_GEMM: "0"}),
    Reason.NOT_ALLOWED: Question(),
}
"""A question that some backend refuses for this reason."""


def rules() -> str:
    """Every rule, in the order in which `decide` comes to them, and what `fp8moe explain` says where it decides."""
    said = {found["name"]: found["says"] for found in RULE.finditer(inspect.getsource(decide))}
    unknown = set(RULES) - set(said) - {MEASURED}
    if unknown:
        raise LookupError(f"decide has no comment on {', '.join(sorted(unknown))}")
    return table(
        ("rule", "what it does", "what explain says where it decides"),
        ((f"**{name}**", text(says.rstrip(".")), text(RULES.get(name, "-"))) for name, says in said.items()),
    )


def rules_at_work() -> str:
    """
    Raises:
        LookupError: a rule that decides is shown by no question.
    """
    answers = [(question, question.answer()) for question in AT_WORK]
    missing = set(RULES) - {selection.rule for _, selection in answers} - {MEASURED}
    if missing:
        raise LookupError(f"no question comes to {', '.join(sorted(missing))}")
    return table(
        ("question", "rule", "answer", "taken out before"),
        (
            (code(question), selection.rule, text(outcome(selection)), ", ".join(taken_out(selection)) or "-")
            for question, selection in answers
        ),
    )


def taken_out(selection: Selection) -> list[str]:
    """The backends that a variable, or the caller, took out of the list before the scan."""
    out = (Reason.DISABLED_BY_ENV, Reason.NOT_ALLOWED)
    return [verdict.backend.value for verdict in selection.verdicts if verdict.reason in out]


def reasons() -> str:
    """
    Raises:
        LookupError: no backend refuses the question for its reason.
    """
    return table(
        ("reason", "such as", "to the question"),
        ((code(reason.value), text(_refusal(reason)), code(REFUSED[reason])) for reason in Reason),
    )


def _refusal(reason: Reason) -> str:
    for verdict in REFUSED[reason].answer().verdicts:
        if verdict.reason is reason:
            return f"{verdict.backend.value} {verdict.detail}"
    raise LookupError(f"nothing refuses {REFUSED[reason]} for {reason.value}")


def variables_at_work() -> str:
    """What each variable does to the candidates, by asking."""
    return table(
        ("set", "layout", "rule", "taken out", "used or an error"),
        (
            (code(" ".join(f"{name}={value}" for name, value in env.items())), *row)
            for env in ASSIGNMENTS
            for row in _effects(env)
        ),
    )


ASSIGNMENTS: tuple[Mapping[str, str], ...] = (
    {FLASHINFER_FP8: "0"},
    {FLASHINFER_FP8: "1"},
    {FLASHINFER_FP8: "1", FLASHINFER_BACKEND: "throughput"},
    {FLASHINFER_FP8: "1", FLASHINFER_BACKEND: "latency"},
    {FLASHINFER_FP8: "1", FLASHINFER_BACKEND: "masked_gemm"},
    {DEEP_GEMM: "0"},
    {DEEP_GEMM: "1"},
    {MOE_DEEP_GEMM: "0"},
    {MOE_DEEP_GEMM: "1"},
    {FORCE_MARLIN: "1"},
    {AITER: "0"},
    {AITER: "1"},
    {AITER_MOE: "1"},
)


def _effects(env: Mapping[str, str]) -> Iterator[tuple[str, str, str, str]]:
    """One row where both layouts have the same, else one for each."""
    rows = {}
    for layout, parallel in (("standard", {}), ("batched", BATCHED)):
        answer = Question("cpu", env=dict(env), parallel=dict(parallel), cutlass=True).answer()
        rows[layout] = (answer.rule, ", ".join(taken_out(answer)) or "-", _demanded(answer))
    if rows["standard"] == rows["batched"]:
        yield ("any", *rows["standard"])
    else:
        yield from ((layout, *row) for layout, row in rows.items())


def _demanded(selection: Selection) -> str:
    """On a device that no backend takes, what a variable asks for shows in the error."""
    error = selection.error
    if error is None:
        return "-"
    if isinstance(error, BackendNotSupported):
        return str(error.backend.value)
    asked = [verdict.backend.value for verdict in selection.verdicts if verdict.consulted]
    return " or ".join(asked) or text(error)
