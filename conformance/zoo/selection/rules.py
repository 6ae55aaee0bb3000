"""Mutants of rules R1 to R3: LoRA, the format, FlashInfer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from conformance.selection.ask import DEEP_GEMM, FLASHINFER, FLASHINFER_BACKEND, MOE_DEEP_GEMM
from conformance.zoo.selection.order import batched, going_on, on, where, without
from conformance.zoo.selection.plant import (
    Call,
    Ending,
    Make,
    SelectorMutant,
    answering,
    ending,
    explained,
    reading,
    seeing,
)
from fp8moe import BackendNotSupported, Fp8MoeBackend, NoBackendFits, Reason

NOTHING: Ending = (Fp8MoeBackend.NONE, None)


def _exchanged(call: Call, name: str) -> Call:
    parallel = replace(call.config.moe_parallel_config, all2all_backend=name)
    return call._replace(config=replace(call.config, moe_parallel_config=parallel))


def _no_lora(call: Call) -> Call:
    return call._replace(config=replace(call.config, is_lora_enabled=False)) if call.config.is_lora_enabled else call


def _lora_after_flashinfer(call: Call) -> Call:
    return _no_lora(call) if on(dict(call.env), FLASHINFER) else call


def _lora_where_triton_runs(call: Call) -> Call:
    return call if call.platform.kind in ("cuda", "rocm") else _no_lora(call)


def _lora_by_format(call: Call, end: Ending) -> Ending:
    if call.config.is_lora_enabled and batched(call):
        spec = call.spec("BATCHED_TRITON")
        return spec.backend, spec.experts_cls
    return end


def _masked_gemm_runs(env: dict[str, str]) -> None:
    if env.get(FLASHINFER_BACKEND) == "masked_gemm":
        env[FLASHINFER_BACKEND] = "throughput"


def _cutlass_first(call: Call, end: Ending) -> Ending:
    if explained(call).rule == "R3c" and not isinstance(end, Exception):
        other = ending(call._replace(env=dict(call.env) | {FLASHINFER_BACKEND: "throughput"}))
        return end if isinstance(other, Exception) else other
    return end


def _goes_on_with_the_rules(call: Call, end: Ending) -> Ending:
    if isinstance(end, NoBackendFits) and end.rule == "R3c":
        return ending(call._replace(env=dict(call.env) | {FLASHINFER: "0"}))
    return end


def _none_off_the_gpu(call: Call, end: Ending) -> Ending:
    if isinstance(end, NoBackendFits) and end.rule == "R3c" and call.platform.kind not in ("cuda", "rocm"):
        return NOTHING
    return end


def _choice(text: str, instead: str, where: Callable[[Call], bool]) -> Make:
    """A FlashInfer name means another backend."""

    def change(call: Call, end: Ending) -> Ending:
        asked = call.env.get(FLASHINFER_BACKEND) == text and where(call)
        if not asked or explained(call).rule != "R3b":
            return end
        position = call.names().index(instead) if instead in call.names() else -1
        verdict = explained(call).verdicts[position]
        spec = call.spec(instead)
        if position < 0 or verdict.reason is not None:
            reason = Reason.NOT_ALLOWED if position < 0 or verdict.reason is None else verdict.reason
            return BackendNotSupported(spec.backend, reason, verdict.detail)
        return spec.backend, spec.experts_cls if spec.returns_class else None

    return answering(change)


RULES = (
    SelectorMutant(
        "lora_ignored",
        "lora-unaware-selector",
        "rule R1 is missing",
        seeing(_no_lora),
        "sel1:lora=yes",
    ),
    SelectorMutant(
        "lora_after_flashinfer",
        "rule R1: LoRA comes before every must-use",
        "with LoRA a FlashInfer must-use still wins",
        seeing(_lora_after_flashinfer),
        "sel1:lora=yes,VLLM_USE_FLASHINFER_MOE_FP8=1",
    ),
    SelectorMutant(
        "lora_checks_the_platform",
        "rule R1: no platform check",
        "with LoRA TRITON is returned only where it runs",
        seeing(_lora_where_triton_runs),
        "sel1:device=xpu,lora=yes",
    ),
    SelectorMutant(
        "lora_by_format",
        "rule R1: no format check",
        "with LoRA and batched activations BATCHED_TRITON is returned",
        answering(_lora_by_format),
        "sel1:parallel=dp2-ep-deepep_low_latency,lora=yes",
    ),
    SelectorMutant(
        "format_always_standard",
        "rule R2: BatchedExperts where the exchange asks for it",
        "the format is never batched",
        seeing(lambda call: _exchanged(call, "naive") if batched(call) else call),
        "sel1:parallel=dp2-ep-deepep_low_latency",
    ),
    SelectorMutant(
        "format_batched_with_any_exchange",
        "batched activations: only pplx and deepep_low_latency",
        "any all-to-all exchange makes the format batched",
        seeing(lambda call: _exchanged(call, "pplx") if call.config.moe_parallel_config.use_all2all_kernels else call),
        "sel1:parallel=dp2-ep-naive",
    ),
    SelectorMutant(
        "flashinfer_rule_dropped",
        "rule R3: FlashInfer where its variable is set",
        "VLLM_USE_FLASHINFER_MOE_FP8 is not read",
        reading(without(FLASHINFER)),
        "sel1:VLLM_USE_FLASHINFER_MOE_FP8=0",
    ),
    SelectorMutant(
        "flashinfer_off_removes_one",
        "rule R3a removes both FlashInfer backends",
        "only FLASHINFER_TRTLLM is removed",
        answering(
            lambda call, end: (
                ending(call._replace(env={}, backends=(call.spec("FLASHINFER_CUTLASS"),)))
                if call.env.get(FLASHINFER) == "0"
                and explained(call).rule == "R8"
                and "FLASHINFER_CUTLASS" in call.names()
                and not isinstance(
                    ending(call._replace(env={}, backends=(call.spec("FLASHINFER_CUTLASS"),))), Exception
                )
                else end
            )
        ),
        "sel1:VLLM_USE_FLASHINFER_MOE_FP8=0",
    ),
    SelectorMutant(
        "flashinfer_off_ends_deep_gemm_too",
        "rule R3a continues with rule R4",
        "FlashInfer off leaves the DeepGEMM variables unread",
        where(lambda env: FLASHINFER in env and not on(env, FLASHINFER), DEEP_GEMM, MOE_DEEP_GEMM),
        "sel1:VLLM_USE_FLASHINFER_MOE_FP8=0,VLLM_USE_DEEP_GEMM=0",
    ),
    SelectorMutant(
        "flashinfer_by_name_degrades",
        "explicit-request-degrades",
        "a FlashInfer backend asked for by name that does not fit is replaced by the scan's choice",
        going_on("FLASHINFER_TRTLLM", "FLASHINFER_CUTLASS", without_variables=(FLASHINFER, FLASHINFER_BACKEND)),
        "sel1:device=sm100,routing=Default,VLLM_USE_FLASHINFER_MOE_FP8=1,VLLM_FLASHINFER_MOE_BACKEND=latency",
    ),
    SelectorMutant(
        "masked_gemm_runs_cutlass",
        "rule R3b: masked_gemm is a ValueError",
        "masked_gemm means FLASHINFER_CUTLASS",
        reading(_masked_gemm_runs),
        "sel1:VLLM_USE_FLASHINFER_MOE_FP8=1,VLLM_FLASHINFER_MOE_BACKEND=masked_gemm",
    ),
    SelectorMutant(
        "latency_means_cutlass",
        "latency means TRTLLM on SM10x",
        "latency means FLASHINFER_CUTLASS everywhere",
        _choice("latency", "FLASHINFER_CUTLASS", lambda call: call.platform.in_family(100)),
        "sel1:device=sm100,VLLM_USE_FLASHINFER_MOE_FP8=1,VLLM_FLASHINFER_MOE_BACKEND=latency",
    ),
    SelectorMutant(
        "throughput_means_trtllm",
        "throughput means FLASHINFER_CUTLASS",
        "throughput means TRTLLM on SM10x",
        _choice("throughput", "FLASHINFER_TRTLLM", lambda call: call.platform.in_family(100)),
        "sel1:device=sm100,VLLM_USE_FLASHINFER_MOE_FP8=1,VLLM_FLASHINFER_MOE_BACKEND=throughput",
    ),
    SelectorMutant(
        "latency_means_trtllm_everywhere",
        "latency means CUTLASS off SM10x",
        "latency means TRTLLM on every device, and fails there",
        _choice("latency", "FLASHINFER_TRTLLM", lambda call: not call.platform.in_family(100)),
        "sel1:VLLM_USE_FLASHINFER_MOE_FP8=1,VLLM_FLASHINFER_MOE_BACKEND=latency",
    ),
    SelectorMutant(
        "latency_asks_for_cuda",
        "the SM10x test of latency has no is-CUDA test",
        "latency means CUTLASS on a device that is not CUDA, whatever its capability",
        _choice("latency", "FLASHINFER_CUTLASS", lambda call: not call.platform.is_cuda),
        "sel1:device=gfx1030,VLLM_USE_FLASHINFER_MOE_FP8=1,VLLM_FLASHINFER_MOE_BACKEND=latency",
    ),
    SelectorMutant(
        "flashinfer_tries_cutlass_first",
        "rule R3c: TRTLLM, then CUTLASS",
        "the two are tried in the other order",
        answering(_cutlass_first),
        "sel1:device=sm100,scheme=tensor_static,routing=Renormalize,VLLM_USE_FLASHINFER_MOE_FP8=1",
    ),
    SelectorMutant(
        "flashinfer_of_two_degrades",
        "rule R3c never continues",
        "where neither FlashInfer backend fits the rules go on",
        answering(_goes_on_with_the_rules),
        "sel1:device=sm70,VLLM_USE_FLASHINFER_MOE_FP8=1",
    ),
    SelectorMutant(
        "flashinfer_of_two_is_none_off_the_gpu",
        "rule R3c raises on every platform",
        "where neither FlashInfer backend fits, off CUDA and ROCm NONE is returned",
        answering(_none_off_the_gpu),
        "sel1:device=xpu,VLLM_USE_FLASHINFER_MOE_FP8=1",
    ),
)
