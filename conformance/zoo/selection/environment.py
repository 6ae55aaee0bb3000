"""Mutants that read the environment wrongly: another default, another variable, or at another time."""

from __future__ import annotations

import os
from collections.abc import Callable

from conformance.selection.ask import AITER, AITER_MOE, DEEP_GEMM, FLASHINFER, FLASHINFER_BACKEND, MARLIN, MOE_DEEP_GEMM
from conformance.zoo.selection.plant import Call, Ending, Make, SelectorMutant, answering, reading, seeing
from conformance.zoo.selection.spellings import CHOICES, is_integer, spelt
from fp8moe import Fp8MoeBackend, MalformedVariable

E8M0, BATCH_INVARIANT = "VLLM_USE_DEEP_GEMM_E8M0", "VLLM_BATCH_INVARIANT"


def unset_is(variable: str, text: str) -> Make:
    """Unset reads as if it were set to this text."""
    return reading(lambda env: env.setdefault(variable, text))


def parsed_early(variable: str, where: Callable[[Call], bool]) -> Make:
    """The variable is parsed before the rules begin, and raises for nonsense."""

    def change(call: Call, end: Ending) -> Ending:
        text = call.env.get(variable)
        if text is None or not where(call):
            return end
        good = text in CHOICES if variable == FLASHINFER_BACKEND else is_integer(text)
        return end if good else MalformedVariable(variable, text, "another text")

    return answering(change)


def _unless_set(variable: str, other: str, text: str) -> Callable[[dict[str, str]], None]:
    def change(env: dict[str, str]) -> None:
        if other in env:
            env.setdefault(variable, text)

    return change


def _swapped(env: dict[str, str]) -> None:
    first, second = env.pop(AITER, None), env.pop(AITER_MOE, None)
    env.update({name: text for name, text in ((AITER_MOE, first), (AITER, second)) if text is not None})


def _either_deep_gemm(env: dict[str, str]) -> None:
    if {env.get(DEEP_GEMM), env.get(MOE_DEEP_GEMM)} == {"0", "1"}:
        env[DEEP_GEMM] = env[MOE_DEEP_GEMM] = "1"


def _either_aiter(env: dict[str, str]) -> None:
    if {env.get(AITER), env.get(AITER_MOE)} == {"0", "1"}:
        env[AITER] = env[AITER_MOE] = "1"


def _second_first(env: dict[str, str]) -> None:
    if MOE_DEEP_GEMM in env and not is_integer(env[MOE_DEEP_GEMM]):
        env[DEEP_GEMM] = "1"


def _e8m0_instead(env: dict[str, str]) -> None:
    env.pop(DEEP_GEMM, None)
    if E8M0 in env:
        env[DEEP_GEMM] = env[E8M0]


def _batch_invariant(call: Call, end: Ending) -> Ending:
    if call.env.get(BATCH_INVARIANT) == "1" and not isinstance(end, Exception) and end[0] is not Fp8MoeBackend.NONE:
        return Fp8MoeBackend.TRITON, call.spec("TRITON").experts_cls
    return end


ENVIRONMENT = (
    SelectorMutant(
        "flashinfer_on_by_default",
        "VLLM_USE_FLASHINFER_MOE_FP8: default false",
        "FlashInfer is demanded where nobody asked",
        unset_is(FLASHINFER, "1"),
        "sel1:libraries=none",
    ),
    SelectorMutant(
        "flashinfer_off_by_default",
        "VLLM_USE_FLASHINFER_MOE_FP8 unset is not 0: auto, not removed",
        "unset reads as the default's text, which removes",
        unset_is(FLASHINFER, "0"),
        "sel1:",
    ),
    SelectorMutant(
        "flashinfer_zero_is_unset",
        "VLLM_USE_FLASHINFER_MOE_FP8=0 removes",
        "0 reads as unset",
        spelt(FLASHINFER, lambda text: None if is_integer(text) and int(text) == 0 else text),
        "sel1:VLLM_USE_FLASHINFER_MOE_FP8=0",
    ),
    SelectorMutant(
        "deep_gemm_off_by_default",
        "VLLM_USE_DEEP_GEMM: default true",
        "DeepGEMM has to be asked for",
        unset_is(DEEP_GEMM, "0"),
        "sel1:libraries=deep_gemm",
    ),
    SelectorMutant(
        "deep_gemm_default_demands",
        "writing a variable's default changes behaviour: VLLM_USE_DEEP_GEMM=1 demands, unset does not",
        "no test whether the variable is set: its default demands DeepGEMM",
        unset_is(DEEP_GEMM, "1"),
        "sel1:",
    ),
    SelectorMutant(
        "moe_deep_gemm_off_by_default",
        "VLLM_MOE_USE_DEEP_GEMM: default true",
        "VLLM_USE_DEEP_GEMM=1 alone removes",
        reading(_unless_set(MOE_DEEP_GEMM, DEEP_GEMM, "0")),
        "sel1:VLLM_USE_DEEP_GEMM=1",
    ),
    SelectorMutant(
        "deep_gemm_off_where_moe_is_set",
        "VLLM_MOE_USE_DEEP_GEMM=1 alone demands",
        "beside VLLM_MOE_USE_DEEP_GEMM the first variable defaults to 0",
        reading(_unless_set(DEEP_GEMM, MOE_DEEP_GEMM, "0")),
        "sel1:VLLM_MOE_USE_DEEP_GEMM=1",
    ),
    SelectorMutant(
        "marlin_on_by_default",
        "VLLM_TEST_FORCE_FP8_MARLIN: default false",
        "Marlin is forced where nobody asked",
        unset_is(MARLIN, "1"),
        "sel1:",
    ),
    SelectorMutant(
        "aiter_on_by_default",
        "VLLM_ROCM_USE_AITER: default false",
        "VLLM_ROCM_USE_AITER_MOE=1 alone demands AITER",
        reading(_unless_set(AITER, AITER_MOE, "1")),
        "sel1:device=gfx942,VLLM_ROCM_USE_AITER_MOE=1",
    ),
    SelectorMutant(
        "aiter_moe_off_by_default",
        "VLLM_ROCM_USE_AITER_MOE: default true",
        "VLLM_ROCM_USE_AITER=1 alone removes",
        reading(_unless_set(AITER_MOE, AITER, "0")),
        "sel1:VLLM_ROCM_USE_AITER=1",
    ),
    SelectorMutant(
        "choice_defaults_to_latency",
        "the default of VLLM_FLASHINFER_MOE_BACKEND is never used",
        "FlashInfer without a name means latency, and fails alone",
        unset_is(FLASHINFER_BACKEND, "latency"),
        "sel1:device=sm70,VLLM_USE_FLASHINFER_MOE_FP8=1",
    ),
    SelectorMutant(
        "deep_gemm_reads_e8m0",
        "VLLM_USE_DEEP_GEMM_E8M0 is another variable",
        "VLLM_USE_DEEP_GEMM_E8M0 is read in the place of VLLM_USE_DEEP_GEMM",
        reading(_e8m0_instead),
        "sel1:VLLM_USE_DEEP_GEMM=1",
    ),
    SelectorMutant(
        "batch_invariance_means_triton",
        "VLLM_BATCH_INVARIANT: the selector ignores it",
        "a backend becomes TRITON where the variable is 1",
        answering(_batch_invariant),
        "sel1:unread=batch-invariant-on",
    ),
    SelectorMutant(
        "aiter_variables_swapped",
        "each of the two AITER variables has its own default",
        "each is read as the other",
        reading(_swapped),
        "sel1:VLLM_ROCM_USE_AITER=1",
    ),
    SelectorMutant(
        "moe_deep_gemm_not_read",
        "VLLM_USE_DEEP_GEMM=1 with VLLM_MOE_USE_DEEP_GEMM=0 removes",
        "only the first variable is read",
        reading(lambda env: env.pop(MOE_DEEP_GEMM, None)),
        "sel1:VLLM_MOE_USE_DEEP_GEMM=1",
    ),
    SelectorMutant(
        "aiter_moe_not_read",
        "VLLM_ROCM_USE_AITER=1 with VLLM_ROCM_USE_AITER_MOE=0 removes",
        "only the first variable is read",
        reading(lambda env: env.pop(AITER_MOE, None)),
        "sel1:VLLM_ROCM_USE_AITER=1,VLLM_ROCM_USE_AITER_MOE=0",
    ),
    SelectorMutant(
        "either_deep_gemm_will_do",
        "rule R4 is a conjunction",
        "one of the two at 1 demands DeepGEMM",
        reading(_either_deep_gemm),
        "sel1:VLLM_USE_DEEP_GEMM=0,VLLM_MOE_USE_DEEP_GEMM=1",
    ),
    SelectorMutant(
        "either_aiter_will_do",
        "rule R6 is a conjunction",
        "one of the two at 1 demands AITER",
        reading(_either_aiter),
        "sel1:VLLM_ROCM_USE_AITER=0,VLLM_ROCM_USE_AITER_MOE=1",
    ),
    SelectorMutant(
        "given_environment_ignored",
        "the environment is the one given",
        "the process environment is read instead",
        seeing(lambda call: call._replace(env=os.environ)),
        "sel1:VLLM_USE_FLASHINFER_MOE_FP8=0",
    ),
    SelectorMutant(
        "choice_parsed_early",
        "a bad VLLM_FLASHINFER_MOE_BACKEND is unnoticed where it is not reached",
        "it is parsed wherever it is set",
        parsed_early(FLASHINFER_BACKEND, lambda call: not call.config.is_lora_enabled),
        "sel1:VLLM_FLASHINFER_MOE_BACKEND=Latency",
    ),
    SelectorMutant(
        "moe_deep_gemm_parsed_early",
        "a bad VLLM_MOE_USE_DEEP_GEMM is unnoticed where VLLM_USE_DEEP_GEMM=0",
        "both are parsed before they are combined",
        parsed_early(MOE_DEEP_GEMM, lambda call: call.env.get(DEEP_GEMM) == "0" and FLASHINFER not in call.env),
        "sel1:VLLM_USE_DEEP_GEMM=0,VLLM_MOE_USE_DEEP_GEMM=0x1",
    ),
    SelectorMutant(
        "deep_gemm_parsed_before_flashinfer",
        "a bad VLLM_USE_DEEP_GEMM is unnoticed where a FlashInfer must-use ended earlier",
        "it is parsed before rule R3",
        parsed_early(DEEP_GEMM, lambda call: not call.config.is_lora_enabled),
        "sel1:VLLM_USE_FLASHINFER_MOE_FP8=1,VLLM_USE_DEEP_GEMM=1.0",
    ),
    SelectorMutant(
        "parsed_before_lora",
        "with LoRA no variable is read",
        "VLLM_USE_FLASHINFER_MOE_FP8 is parsed before rule R1",
        parsed_early(FLASHINFER, lambda call: True),
        "sel1:lora=yes,VLLM_USE_FLASHINFER_MOE_FP8=true",
    ),
    SelectorMutant(
        "moe_deep_gemm_parsed_first",
        "VLLM_USE_DEEP_GEMM is parsed first",
        "where both are malformed the second is named, and it is parsed where the first is 0",
        reading(_second_first),
        "sel1:VLLM_USE_DEEP_GEMM=0,VLLM_MOE_USE_DEEP_GEMM=0x1",
    ),
    SelectorMutant(
        "malformed_flashinfer_is_unset",
        "error-swallowed-to-default",
        "a malformed VLLM_USE_FLASHINFER_MOE_FP8 reads as unset",
        spelt(FLASHINFER, lambda text: text if is_integer(text) else None),
        "sel1:VLLM_USE_FLASHINFER_MOE_FP8=true",
    ),
    SelectorMutant(
        "malformed_deep_gemm_is_off",
        "bad text raises where its rule is reached",
        "a malformed VLLM_USE_DEEP_GEMM reads as 0",
        spelt(DEEP_GEMM, lambda text: text if is_integer(text) else "0"),
        "sel1:VLLM_USE_DEEP_GEMM=1.0",
    ),
)
