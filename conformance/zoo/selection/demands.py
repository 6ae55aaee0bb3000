"""Mutants of rules R4 to R6: DeepGEMM, Marlin and AITER on demand."""

from __future__ import annotations

from collections.abc import Callable

from conformance.selection.ask import AITER, AITER_MOE, DEEP_GEMM, FLASHINFER, FLASHINFER_BACKEND, MARLIN, MOE_DEEP_GEMM
from conformance.zoo.selection.order import aiter_demanded, deep_gemm_demanded, going_on, on, where, without
from conformance.zoo.selection.plant import (
    Call,
    Ending,
    SelectorMutant,
    answering,
    ending,
    explained,
    reading,
    seeing,
)
from fp8moe import BackendNotSupported, Fp8MoeBackend, Reason

NOTHING: Ending = (Fp8MoeBackend.NONE, None)


def _unchecked(variable: str, backend: str) -> Callable[[Call, Ending], Ending]:
    def change(call: Call, end: Ending) -> Ending:
        if isinstance(end, BackendNotSupported) and end.backend.value == backend and variable in call.env:
            spec = call.spec(backend)
            return spec.backend, spec.experts_cls
        return end

    return change


def _asks_the_other_format(call: Call, end: Ending) -> Ending:
    if isinstance(end, BackendNotSupported) and end.backend is Fp8MoeBackend.BATCHED_DEEPGEMM:
        return BackendNotSupported(Fp8MoeBackend.DEEPGEMM, Reason.FORMAT, "takes the 'standard' activation format")
    return end


def _scan_overwrites(call: Call, end: Ending) -> Ending:
    if isinstance(end, Exception) or explained(call).rule not in ("R4b", "R5", "R6b"):
        return end
    return ending(call._replace(env={}))


DEMANDS = (
    SelectorMutant(
        "deep_gemm_rule_dropped",
        "rule R4: DeepGEMM where one of its variables is set",
        "the DeepGEMM variables are not read",
        reading(without(DEEP_GEMM, MOE_DEEP_GEMM)),
        "sel1:VLLM_USE_DEEP_GEMM=1",
    ),
    SelectorMutant(
        "deep_gemm_before_flashinfer",
        "FlashInfer=1 outranks DeepGEMM",
        "rule R4 comes before rule R3",
        where(deep_gemm_demanded, FLASHINFER, FLASHINFER_BACKEND),
        "sel1:VLLM_USE_FLASHINFER_MOE_FP8=1,VLLM_USE_DEEP_GEMM=1",
    ),
    SelectorMutant(
        "deep_gemm_ignores_the_format",
        "rule R4b: BATCHED_DEEPGEMM where the format is batched",
        "DEEPGEMM is demanded in both formats",
        answering(_asks_the_other_format),
        "sel1:device=sm75,parallel=dp2-ep-deepep_low_latency,VLLM_USE_DEEP_GEMM=1",
    ),
    SelectorMutant(
        "deep_gemm_degrades",
        "rule R4b returns or raises",
        "DeepGEMM that does not fit is replaced by what the later rules give",
        going_on("DEEPGEMM", "BATCHED_DEEPGEMM", without_variables=(DEEP_GEMM, MOE_DEEP_GEMM)),
        "sel1:device=sm70,VLLM_USE_DEEP_GEMM=1",
    ),
    SelectorMutant(
        "deep_gemm_unchecked",
        "a must-use backend is checked",
        "DEEPGEMM is returned where it is demanded, whether it fits or not",
        answering(_unchecked(DEEP_GEMM, "DEEPGEMM")),
        "sel1:device=sm70,VLLM_USE_DEEP_GEMM=1",
    ),
    SelectorMutant(
        "marlin_rule_dropped",
        "rule R5: Marlin by force",
        "VLLM_TEST_FORCE_FP8_MARLIN is not read",
        reading(without(MARLIN)),
        "sel1:VLLM_TEST_FORCE_FP8_MARLIN=1",
    ),
    SelectorMutant(
        "marlin_before_deep_gemm",
        "forced Marlin loses to a DeepGEMM must-use",
        "rule R5 comes before rule R4",
        where(lambda env: on(env, MARLIN) and not on(env, FLASHINFER), DEEP_GEMM, MOE_DEEP_GEMM),
        "sel1:VLLM_USE_DEEP_GEMM=1,VLLM_TEST_FORCE_FP8_MARLIN=1",
    ),
    SelectorMutant(
        "marlin_before_flashinfer",
        "forced Marlin loses to FlashInfer=1",
        "rule R5 comes before rule R3",
        where(lambda env: on(env, MARLIN), FLASHINFER, FLASHINFER_BACKEND),
        "sel1:VLLM_USE_FLASHINFER_MOE_FP8=0,VLLM_TEST_FORCE_FP8_MARLIN=2",
    ),
    SelectorMutant(
        "marlin_after_aiter",
        "forced Marlin beats AITER",
        "rule R5 comes after rule R6",
        where(aiter_demanded, MARLIN),
        "sel1:VLLM_TEST_FORCE_FP8_MARLIN=1,VLLM_ROCM_USE_AITER=1",
    ),
    SelectorMutant(
        "marlin_degrades",
        "rule R5 returns or raises",
        "Marlin that does not fit is replaced by what the later rules give",
        going_on("MARLIN", without_variables=(MARLIN,)),
        "sel1:device=sm70,VLLM_TEST_FORCE_FP8_MARLIN=1",
    ),
    SelectorMutant(
        "aiter_rule_dropped",
        "rule R6: AITER where one of its variables is set",
        "the AITER variables are read by the device predicate alone",
        answering(
            lambda call, end: (
                ending(call._replace(env=dict(call.env) | {AITER: "0"}))
                if isinstance(end, BackendNotSupported) and end.backend is Fp8MoeBackend.AITER
                else end
            )
        ),
        "sel1:VLLM_ROCM_USE_AITER=1",
    ),
    SelectorMutant(
        "aiter_only_on_rocm",
        "rule R6b: on every platform, NVIDIA and CPU too",
        "off ROCm the AITER variables are not read",
        seeing(
            lambda call: (
                call
                if call.platform.is_rocm
                else call._replace(env={k: v for k, v in call.env.items() if k not in (AITER, AITER_MOE)})
            )
        ),
        "sel1:VLLM_ROCM_USE_AITER=1",
    ),
    SelectorMutant(
        "aiter_off_removes_nothing",
        "rule R6a: VLLM_ROCM_USE_AITER_MOE=1 alone removes AITER",
        "AITER stays in the list, where its device check refuses it",
        reading(lambda env: None if aiter_demanded(env) else without(AITER, AITER_MOE)(env)),
        "sel1:VLLM_ROCM_USE_AITER=true",
    ),
    SelectorMutant(
        "scan_overwrites_the_demand",
        "missing-return-fallthrough",
        "a demanded backend is found, and then overwritten by the scan's",
        answering(_scan_overwrites),
        "sel1:VLLM_USE_DEEP_GEMM=1",
    ),
)
