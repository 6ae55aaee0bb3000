"""Mutants of rules R7 to R9, the scan, and of what comes back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from conformance.zoo.selection.order import batched
from conformance.zoo.selection.plant import (
    Call,
    Ending,
    Make,
    SelectorMutant,
    answering,
    considering,
    seeing,
)
from fp8moe import BackendSpec, Fp8MoeBackend, NoBackendFits

NOTHING: Ending = (Fp8MoeBackend.NONE, None)


def leaving(*backends: str) -> Make:
    """These backends are not among the candidates."""
    return considering(lambda given: [spec for spec in given if spec.name not in backends])


def moved(backend: str, *, before: str) -> Make:
    """A candidate is considered before another that stands before it."""

    def change(given: tuple[BackendSpec, ...]) -> tuple[BackendSpec, ...]:
        at = {spec.name: position for position, spec in enumerate(given)}
        if not at.get(before, len(given)) < at.get(backend, -1):
            return given
        earlier, later = at[before], at[backend]
        return (*given[:earlier], given[later], *given[earlier:later], *given[later + 1 :])

    return considering(change)


def becoming(backend: str, instead: str) -> Make:
    """A chosen backend comes back as another."""

    def change(call: Call, end: Ending) -> Ending:
        if isinstance(end, Exception) or end[0].value != backend:
            return end
        spec = call.spec(instead)
        return spec.backend, spec.experts_cls

    return answering(change)


def _nothing_fits(instead: Callable[[Call, Exception], Ending]) -> Make:
    """Rule R9 ends otherwise where it raises."""

    def change(call: Call, end: Ending) -> Ending:
        return instead(call, end) if isinstance(end, NoBackendFits) and end.rule == "R9" else end

    return answering(change)


def _raises_everywhere(call: Call, end: Ending) -> Ending:
    if end == NOTHING:
        return NoBackendFits("R9", "no FP8 MoE backend takes this configuration")
    return end


def _class_of(backend: str, cls: Callable[[Call], Any]) -> Make:
    """A backend comes with another class."""

    def change(call: Call, end: Ending) -> Ending:
        if isinstance(end, Exception) or end[0].value != backend:
            return end
        return end[0], cls(call)

    return answering(change)


def _by_name(call: Call, end: Ending) -> Ending:
    return end if isinstance(end, Exception) else (end[0].value, end[1])


SCAN = (
    SelectorMutant(
        "cutlass_always_allowed",
        "denylist-not-consulted",
        "rule R7 is missing: allow_vllm_cutlass=False allows",
        seeing(lambda call: call._replace(allow_vllm_cutlass=True)),
        "sel1:scheme=tensor_dyn",
    ),
    SelectorMutant(
        "cutlass_never_allowed",
        "rule R7: only without allow_vllm_cutlass",
        "allow_vllm_cutlass=True does not allow",
        seeing(lambda call: call._replace(allow_vllm_cutlass=False)),
        "sel1:scheme=tensor_dyn,allow_vllm_cutlass=yes",
    ),
    SelectorMutant(
        "cutlass_implied_by_the_channel_scheme",
        "no variable and no scheme re-admits CUTLASS",
        "schemes per channel allow CUTLASS, as their caller does",
        seeing(
            lambda call: (
                call._replace(allow_vllm_cutlass=True)
                if call.weight_key is not None and call.weight_key.scale.group_shape.is_per_channel()
                else call
            )
        ),
        "sel1:scheme=channel_tok",
    ),
    SelectorMutant(
        "cutlass_batched_stays",
        "rule R7 removes both CUTLASS backends",
        "BATCHED_VLLM_CUTLASS stays in the list",
        seeing(lambda call: call._replace(allow_vllm_cutlass=True) if batched(call) else call),
        "sel1:scheme=tensor_static,parallel=dp2-ep-deepep_low_latency",
    ),
    SelectorMutant(
        "batched_triton_unreachable",
        "unreachable-backend",
        "BATCHED_TRITON is left out of the list",
        leaving("BATCHED_TRITON"),
        "sel1:device=sm89,parallel=dp2-ep-deepep_low_latency",
    ),
    SelectorMutant(
        "marlin_unreachable",
        "the list has Marlin, last but XPU",
        "MARLIN is not considered",
        leaving("MARLIN"),
        "sel1:device=sm75",
    ),
    SelectorMutant(
        "deep_gemm_before_flashinfer_cutlass",
        "the order: FLASHINFER_CUTLASS, then DEEPGEMM",
        "the two are considered in the other order",
        moved("DEEPGEMM", before="FLASHINFER_CUTLASS"),
        "sel1:",
    ),
    SelectorMutant(
        "cutlass_before_trtllm",
        "the order: FLASHINFER_TRTLLM, then FLASHINFER_CUTLASS",
        "the two are considered in the other order",
        moved("FLASHINFER_CUTLASS", before="FLASHINFER_TRTLLM"),
        "sel1:device=sm100,scheme=tensor_static,routing=Renormalize",
    ),
    SelectorMutant(
        "triton_before_cutlass",
        "the order: VLLM_CUTLASS, then TRITON",
        "the two are considered in the other order",
        moved("TRITON", before="VLLM_CUTLASS"),
        "sel1:scheme=tensor_dyn,allow_vllm_cutlass=yes",
    ),
    SelectorMutant(
        "marlin_before_triton",
        "the order: TRITON, then MARLIN",
        "MARLIN is considered before TRITON",
        moved("MARLIN", before="TRITON"),
        "sel1:libraries=vllm",
    ),
    SelectorMutant(
        "batched_triton_before_batched_cutlass",
        "the order: BATCHED_VLLM_CUTLASS, then BATCHED_TRITON",
        "the two are considered in the other order",
        moved("BATCHED_TRITON", before="BATCHED_VLLM_CUTLASS"),
        "sel1:scheme=tensor_static,parallel=dp2-ep-deepep_low_latency,allow_vllm_cutlass=yes",
    ),
    SelectorMutant(
        "last_supported",
        "rule R8: the first supported",
        "the last that fits is chosen",
        considering(lambda given: given[::-1]),
        "sel1:",
    ),
    SelectorMutant(
        "triton_where_nothing_fits",
        "rule R9 raises on CUDA and ROCm",
        "TRITON is the fallback where nothing fits",
        _nothing_fits(lambda call, _: (Fp8MoeBackend.TRITON, call.spec("TRITON").experts_cls)),
        "sel1:device=sm70",
    ),
    SelectorMutant(
        "none_on_rocm",
        "rule R9: CUDA or ROCm",
        "on ROCm NONE is returned where nothing fits",
        _nothing_fits(lambda call, error: NOTHING if call.platform.is_rocm else error),
        "sel1:device=gfx908",
    ),
    SelectorMutant(
        "raises_off_the_gpu",
        "rule R9: any other platform returns NONE",
        "where nothing fits it raises everywhere",
        answering(_raises_everywhere),
        "sel1:device=xpu",
    ),
    SelectorMutant(
        "trtllm_with_class",
        "the class is None for FLASHINFER_TRTLLM",
        "FLASHINFER_TRTLLM comes with its adapter's class",
        _class_of("FLASHINFER_TRTLLM", lambda call: call.spec("FLASHINFER_TRTLLM").experts_cls),
        "sel1:device=sm100",
    ),
    SelectorMutant(
        "marlin_without_class",
        "the class is None only for FLASHINFER_TRTLLM and NONE",
        "MARLIN comes without a class",
        _class_of("MARLIN", lambda call: None),
        "sel1:device=sm75",
    ),
    SelectorMutant(
        "none_with_class",
        "NONE comes without a class",
        "NONE comes with TRITON's class",
        _class_of("NONE", lambda call: call.spec("TRITON").experts_cls),
        "sel1:device=xpu",
    ),
    SelectorMutant(
        "deep_gemm_with_tritons_class",
        "fallback-half-applied",
        "DEEPGEMM comes with the class of its fallback",
        _class_of("DEEPGEMM", lambda call: call.spec("TRITON").experts_cls),
        "sel1:libraries=deep_gemm",
    ),
    SelectorMutant(
        "batched_triton_becomes_triton",
        "the backend's format is the requested one",
        "BATCHED_TRITON comes back as TRITON",
        becoming("BATCHED_TRITON", "TRITON"),
        "sel1:device=sm89,parallel=dp2-ep-deepep_low_latency",
    ),
    SelectorMutant(
        "backend_by_name",
        "the output is a member of the enum",
        "the backend's name is returned",
        answering(_by_name),
        "sel1:",
    ),
)
