"""Answers of both selectors in the same words: a backend and whose class, or an error's kind."""

from __future__ import annotations

import re

from conformance.selection.draw import Call
from fp8moe import explain_fp8_moe_backend, select_fp8_moe_backend
from fp8moe.envs import FLASHINFER_BACKEND, FLASHINFER_FP8, MalformedVariable
from fp8moe.refusals import BackendNotSupported, NoBackendFits
from fp8moe.registry import Reason, seed_backends
from fp8moe.selector import Selection

MASKED_GEMM = "ValueError: the masked GEMM has no FP8"
NO_FLASHINFER = f"NotImplementedError of {FLASHINFER_FP8}=1"
NOTHING_FITS = "NotImplementedError: nothing fits"

TOKENS = (
    (r"no act_and_mul MLP layer", Reason.GATING),
    (r"current device.*", Reason.DEVICE),
    (r"quantization scheme.*", Reason.SCHEME),
    (r"parallel config.*", Reason.PARALLEL),
    (r"routing method.*", Reason.ROUTING),
    (r"float32 router_logits.*|router logits dtype.*", Reason.LOGITS_DTYPE),
    (r".*activation format", Reason.FORMAT),
    (r".* activation", Reason.ACTIVATION),
)
"""What vLLM's texts say (specification section 2.0; later versions add what it was), and our reasons."""


def refused(backend: str, reason: str) -> str:
    return f"ValueError of {backend} with {reason}"


def malformed(text: str) -> str:
    """vLLM's text does not name the variable, so that it cannot be compared."""
    return f"ValueError: {text} is no integer"


def malformed_choice(variable: str, text: str) -> str:
    return f"ValueError: {variable} is not {text!r}"


def kind(answer: str) -> str:
    """The answer without the text that a variable held."""
    answer = re.sub(r"^ValueError: .* is no integer$", "ValueError: no integer", answer, flags=re.DOTALL)
    return re.sub(r"^ValueError: (VLLM_\w+) is not .*$", r"ValueError: \1 is no choice", answer, flags=re.DOTALL)


def other(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def ours(call: Call) -> str:
    """`select_fp8_moe_backend`'s."""
    try:
        backend, cls = select_fp8_moe_backend(*call[:4], platform=call.platform, env=call.env, backends=seed_backends())
    except Exception as error:
        return _answer_of_ours(error)
    own = {spec.name: spec.experts_cls for spec in seed_backends()}
    whose = "no class" if cls is None else "its class" if cls is own.get(backend.value) else "another class"
    return f"{backend.value} with {whose}"


def explained(call: Call) -> Selection:
    """How ours came to it."""
    return explain_fp8_moe_backend(*call[:4], platform=call.platform, env=call.env, backends=seed_backends())


def _answer_of_ours(error: Exception) -> str:
    if isinstance(error, BackendNotSupported):
        return refused(error.backend.value, error.reason.name)
    if isinstance(error, MalformedVariable):
        if error.variable == FLASHINFER_BACKEND:
            return malformed_choice(error.variable, error.text)
        return malformed(repr(error.text))
    if isinstance(error, NoBackendFits):
        return NO_FLASHINFER if error.rule == "R3c" else NOTHING_FITS
    if isinstance(error, ValueError) and FLASHINFER_BACKEND in str(error):
        return MASKED_GEMM
    return other(error)


def answer_of_vllm(error: Exception) -> str:
    """Of what vLLM's selector raises, by its text."""
    text = str(error)
    if type(error) is NotImplementedError:
        if f"{FLASHINFER_FP8}=1" in text:
            return NO_FLASHINFER
        if "No FP8 MoE backend supports" in text:
            return NOTHING_FITS
    if type(error) is ValueError:
        if found := re.fullmatch(r"invalid literal for int\(\) with base 10: (.*)", text, re.DOTALL):
            return malformed(found[1])
        if found := re.match(r"Invalid value '(.*)' for (VLLM_\w+)\. Valid options: ", text, re.DOTALL):
            return malformed_choice(found[2], found[1])
        if re.search(r"Masked ?GEMM", text, re.IGNORECASE) and "FP8" in text:
            return MASKED_GEMM
        if found := re.fullmatch(r"FP8 MoE backend (\w+) does not support .* since (.*)\.", text, re.DOTALL):
            return refused(found[1], _reason(found[2]))
    return other(error)


def _reason(text: str) -> str:
    subject = text.removeprefix("kernel does not support ")
    for pattern, reason in TOKENS:
        if re.fullmatch(pattern, subject, re.DOTALL):
            return reason.name
    return text
