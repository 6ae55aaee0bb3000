"""Mutants of what is raised: another type, a text without its reasons, data that is wrong or missing."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress

from conformance.zoo.selection.plant import Make, SelectorMutant, failing
from fp8moe import BackendNotSupported, Fp8MoeBackend, MalformedVariable, NoBackendFits, Reason


class Unexplained(BackendNotSupported):
    """The honest error's data, and a text that names the backend alone."""

    def __str__(self) -> str:
        return f"{self.backend.value} does not support this configuration"


class Anonymous(BackendNotSupported):
    """The honest error's data, and a text that does not name the backend."""

    def __str__(self) -> str:
        return f"the backend asked for cannot be used: {self.reason.value}"


class Unspoken(MalformedVariable):
    """The variable is named, what it held is not said."""

    def __str__(self) -> str:
        return f"{self.variable}: expected {self.expected}"


def of_must_use(change: Callable[[BackendNotSupported], Exception]) -> Make:
    """A failed must-use raises otherwise."""
    return failing(lambda _, error: change(error) if isinstance(error, BackendNotSupported) else error)


def of_malformed(change: Callable[[MalformedVariable], Exception]) -> Make:
    """A malformed variable raises otherwise."""
    return failing(lambda _, error: change(error) if isinstance(error, MalformedVariable) else error)


def of_rule(rule: str, change: Callable[[str], Exception]) -> Make:
    """Rule R3c or R9 raises otherwise; ``change`` gets the honest text."""
    return failing(
        lambda _, error: change(str(error)) if isinstance(error, NoBackendFits) and error.rule == rule else error
    )


def of_masked_gemm(change: Callable[[Exception], Exception]) -> Make:
    """The ValueError of masked_gemm is another."""
    return failing(lambda _, error: change(error) if type(error) is ValueError else error)


def _raw_integer(error: MalformedVariable) -> Exception:
    with suppress(ValueError):
        int(error.text)
        return error
    return ValueError(f"invalid literal for int() with base 10: {error.text!r}")


ERRORS = (
    SelectorMutant(
        "reasons_discarded",
        "reasons-discarded",
        "where nothing fits the text has no reasons",
        of_rule("R9", lambda _: NoBackendFits("R9", "no FP8 MoE backend takes this configuration")),
        "sel1:device=sm70",
    ),
    SelectorMutant(
        "reasons_of_some",
        "rule R9: a line for each backend, the removed ones too",
        "the text leaves out what a rule had removed",
        of_rule("R9", lambda text: NoBackendFits("R9", re.sub(r"\n.*(DISABLED_BY_ENV|NOT_ALLOWED).*", "", text))),
        "sel1:device=sm70",
    ),
    SelectorMutant(
        "reasons_of_the_first",
        "rule R9: each backend's own reason",
        "every backend is reported with the first one's reason",
        of_rule("R9", lambda text: NoBackendFits("R9", re.sub(r": [A-Z_]+: ", ": DEVICE: ", text))),
        "sel1:device=sm70",
    ),
    SelectorMutant(
        "flashinfer_reasons_discarded",
        "rule R3c: the two backends' reasons",
        "the text of rule R3c has no reasons",
        of_rule("R3c", lambda text: NoBackendFits("R3c", text.splitlines()[0])),
        "sel1:activation=gelu_no_mul,VLLM_USE_FLASHINFER_MOE_FP8=1_0",
    ),
    SelectorMutant(
        "flashinfer_variable_not_named",
        "rule R3c: names the variable and =1",
        "the text of rule R3c does not name the variable",
        of_rule("R3c", lambda text: NoBackendFits("R3c", text.replace("VLLM_USE_FLASHINFER_MOE_FP8=1 asks", "Asks"))),
        "sel1:device=sm70,VLLM_USE_FLASHINFER_MOE_FP8=1",
    ),
    SelectorMutant(
        "value_error_where_nothing_fits",
        "rule R9: NotImplementedError",
        "where nothing fits a ValueError is raised",
        of_rule("R9", ValueError),
        "sel1:device=sm70",
    ),
    SelectorMutant(
        "value_error_without_flashinfer",
        "rule R3c: NotImplementedError",
        "where no FlashInfer backend fits a ValueError is raised",
        of_rule("R3c", ValueError),
        "sel1:device=sm70,VLLM_USE_FLASHINFER_MOE_FP8=1",
    ),
    SelectorMutant(
        "runtime_error_where_nothing_fits",
        "the exceptions are ValueError and NotImplementedError",
        "where nothing fits a RuntimeError is raised",
        of_rule("R9", RuntimeError),
        "sel1:device=sm70",
    ),
    SelectorMutant(
        "not_implemented_must_use",
        "a failed must-use: ValueError",
        "a failed must-use raises NotImplementedError",
        of_must_use(lambda error: NotImplementedError(str(error))),
        "sel1:device=sm70,VLLM_USE_DEEP_GEMM=1",
    ),
    SelectorMutant(
        "must_use_unexplained",
        "a failed must-use: the text has the reason",
        "the text of a failed must-use names the backend alone",
        of_must_use(lambda error: Unexplained(error.backend, error.reason, error.detail)),
        "sel1:VLLM_ROCM_USE_AITER=1",
    ),
    SelectorMutant(
        "must_use_anonymous",
        "a failed must-use: the text has the backend's value",
        "the text of a failed must-use does not name the backend",
        of_must_use(lambda error: Anonymous(error.backend, error.reason, error.detail)),
        "sel1:device=sm70,VLLM_USE_DEEP_GEMM=1",
    ),
    SelectorMutant(
        "must_use_without_data",
        "a failed must-use carries backend and reason as data",
        "a failed must-use is a bare ValueError",
        of_must_use(lambda error: ValueError(str(error))),
        "sel1:device=sm70,VLLM_USE_DEEP_GEMM=1",
    ),
    SelectorMutant(
        "must_use_with_another_reason",
        "a failed must-use: the first check that fails",
        "the reason is always DEVICE",
        of_must_use(lambda error: BackendNotSupported(error.backend, Reason.DEVICE, error.detail)),
        "sel1:scheme=tensor_static,VLLM_USE_DEEP_GEMM=1",
    ),
    SelectorMutant(
        "must_use_names_the_standard_one",
        "a failed must-use names the backend that was demanded",
        "a failed BATCHED_DEEPGEMM is reported as DEEPGEMM",
        of_must_use(
            lambda error: (
                BackendNotSupported(Fp8MoeBackend.DEEPGEMM, error.reason, error.detail)
                if error.backend is Fp8MoeBackend.BATCHED_DEEPGEMM
                else error
            )
        ),
        "sel1:device=sm75,parallel=dp2-ep-deepep_low_latency,VLLM_USE_DEEP_GEMM=1",
    ),
    SelectorMutant(
        "malformed_not_named",
        "a malformed variable is named",
        "a malformed integer raises Python's own text",
        of_malformed(_raw_integer),
        "sel1:VLLM_USE_FLASHINFER_MOE_FP8=true",
    ),
    SelectorMutant(
        "malformed_text_not_said",
        "a malformed variable: the text it held",
        "the error does not say what the variable held",
        of_malformed(lambda error: Unspoken(error.variable, error.text, error.expected)),
        "sel1:VLLM_MOE_USE_DEEP_GEMM=0x1",
    ),
    SelectorMutant(
        "malformed_is_a_key_error",
        "a malformed variable: ValueError",
        "a bad choice raises a KeyError",
        of_malformed(lambda error: KeyError(error.text) if "BACKEND" in error.variable else error),
        "sel1:VLLM_USE_FLASHINFER_MOE_FP8=1,VLLM_FLASHINFER_MOE_BACKEND=Latency",
    ),
    SelectorMutant(
        "masked_gemm_not_said",
        "masked_gemm: the text says that FlashInfer's masked GEMM has no FP8",
        "the text does not say what is missing",
        of_masked_gemm(lambda _: ValueError("this FlashInfer backend is not supported")),
        "sel1:VLLM_USE_FLASHINFER_MOE_FP8=1,VLLM_FLASHINFER_MOE_BACKEND=masked_gemm",
    ),
    SelectorMutant(
        "masked_gemm_is_not_implemented",
        "masked_gemm: ValueError",
        "masked_gemm raises NotImplementedError",
        of_masked_gemm(lambda error: NotImplementedError(str(error))),
        "sel1:VLLM_USE_FLASHINFER_MOE_FP8=1,VLLM_FLASHINFER_MOE_BACKEND=masked_gemm",
    ),
)
