"""Mutants of the device predicates: an architecture that counts, or does not, wrongly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from conformance.zoo.selection.checks import also, as_if, cap, only
from conformance.zoo.selection.plant import Make, SelectorMutant, support_of, supporting
from fp8moe import Platform, Support
from fp8moe.envs import Env

Device = Callable[[Platform, Env], bool]
CUTLASS = ("VLLM_CUTLASS", "BATCHED_VLLM_CUTLASS")
DEEP_GEMM = ("DEEPGEMM", "BATCHED_DEEPGEMM")
TRITON = ("TRITON", "BATCHED_TRITON")


def on_fp8_hardware(counts: Callable[[Platform], bool]) -> Make:
    """Another idea of which device has FP8, in both Triton backends and in the composites that fall back on them."""
    names = (*TRITON, "DEEPGEMM", "VLLM_CUTLASS")

    def change(name: str, support: Support) -> Support:
        if name not in names:
            return support

        def scheme(platform: Platform, weight_key: Any, activation_key: Any) -> bool:
            if (weight_key, activation_key) == (None, None):
                return support.scheme(platform, weight_key, activation_key)
            # On SM89 every FP8 scheme of these backends is taken: there only the scheme counts.
            return counts(platform) and support.scheme(ADA, weight_key, activation_key)

        return replace(support, scheme=scheme)

    return supporting(change)


ADA = Platform("cuda", (8, 9))


DEVICES = (
    SelectorMutant(
        "flashinfer_cutlass_exact_architectures",
        "arch-exact-match",
        "FLASHINFER_CUTLASS knows 12.0 and not 12.1",
        support_of("FLASHINFER_CUTLASS", device=only(lambda p: cap(p) in (90, 100, 103, 110, 120))),
        "sel1:device=sm109,scheme=tensor_static",
    ),
    SelectorMutant(
        "flashinfer_cutlass_closed_above",
        "arch-closed-upper",
        "FLASHINFER_CUTLASS ends at 12.1",
        support_of("FLASHINFER_CUTLASS", device=only(lambda p: cap(p) <= 121)),
        "sel1:device=sm123,scheme=tensor_static",
    ),
    SelectorMutant(
        "flashinfer_cutlass_open_above",
        "FLASHINFER_CUTLASS: SM90, families 100, 110 and 120",
        "FLASHINFER_CUTLASS takes every capability from 9.0",
        support_of("FLASHINFER_CUTLASS", device=also(lambda p: p.is_cuda and cap(p) >= 90 and p.has("flashinfer"))),
        "sel1:device=sm99,scheme=tensor_static",
    ),
    SelectorMutant(
        "flashinfer_cutlass_without_sm11x",
        "FLASHINFER_CUTLASS has the family 110",
        "FLASHINFER_CUTLASS lacks SM11x",
        support_of("FLASHINFER_CUTLASS", device=only(lambda p: not p.in_family(110))),
        "sel1:device=sm110,scheme=tensor_static",
    ),
    SelectorMutant(
        "trtllm_only_known_minors",
        "FLASHINFER_TRTLLM: the whole family 100",
        "FLASHINFER_TRTLLM knows 10.0 and 10.3 only",
        support_of("FLASHINFER_TRTLLM", device=only(lambda p: cap(p) in (100, 103))),
        "sel1:device=sm109",
    ),
    SelectorMutant(
        "trtllm_off_cuda",
        "FLASHINFER_TRTLLM: CUDA",
        "FLASHINFER_TRTLLM has no test of the device's kind",
        support_of("FLASHINFER_TRTLLM", device=also(lambda p: p.in_family(100))),
        "sel1:device=gfx1030",
    ),
    SelectorMutant(
        "deep_gemm_on_the_family_90",
        "DEEPGEMM: exactly 9.0",
        "DeepGEMM takes SM90 to SM99",
        support_of(*DEEP_GEMM, device=as_if(lambda p: replace(p, capability=(9, 0)) if p.in_family(90) else p)),
        "sel1:device=sm99",
    ),
    SelectorMutant(
        "deep_gemm_on_sm12x",
        "DEEPGEMM: SM90 or the family 100",
        "DeepGEMM takes SM12x, as later versions do",
        support_of(*DEEP_GEMM, device=as_if(lambda p: replace(p, capability=(10, 0)) if p.in_family(120) else p)),
        "sel1:device=sm120",
    ),
    SelectorMutant(
        "deep_gemm_off_cuda",
        "DEEPGEMM: CUDA",
        "a ROCm device of capability 9.0 counts as SM90",
        support_of(*DEEP_GEMM, device=as_if(lambda p: replace(p, kind="cuda"))),
        "sel1:device=gfx90a",
    ),
    SelectorMutant(
        "triton_on_xpu",
        "TRITON: CUDA or ROCm",
        "an XPU is treated as CUDA",
        support_of(*TRITON, device=also(lambda p: p.kind == "xpu")),
        "sel1:device=xpu,scheme=none",
    ),
    SelectorMutant(
        "triton_only_on_cuda",
        "BATCHED_TRITON: CUDA or ROCm",
        "ROCm is left out of the batched variant",
        support_of("BATCHED_TRITON", device=only(lambda p: p.is_cuda)),
        "sel1:device=gfx942,parallel=dp2-ep-deepep_low_latency",
    ),
    SelectorMutant(
        "marlin_from_ampere",
        "MARLIN: from 7.5",
        "Turing is out",
        support_of("MARLIN", device=only(lambda p: cap(p) >= 80)),
        "sel1:device=sm75",
    ),
    SelectorMutant(
        "marlin_from_volta",
        "MARLIN: 7.4 is too old",
        "the major number decides",
        support_of("MARLIN", device=as_if(lambda p: replace(p, capability=(7, 5)) if cap(p) // 10 == 7 else p)),
        "sel1:device=sm70",
    ),
    SelectorMutant(
        "marlin_only_without_fp8",
        "MARLIN has no upper bound",
        "MARLIN is refused where the device has FP8",
        support_of("MARLIN", device=only(lambda p: not p.has_fp8_hardware)),
        "sel1:scheme=tensor_128",
    ),
    SelectorMutant(
        "an_unknown_capability_is_new",
        "capability known and at least 7.5",
        "MARLIN takes a CUDA device of unknown capability",
        support_of("MARLIN", device=also(lambda p: p.is_cuda and p.cap is None and p.has("vllm"))),
        "sel1:device=cuda-unknown",
    ),
    SelectorMutant(
        "aiter_without_gfx950",
        "AITER: gfx90a, gfx942 and gfx950",
        "gfx950 is missing from the list",
        support_of("AITER", device=only(lambda p: "gfx950" not in (p.gcn_arch or ""))),
        "sel1:device=gfx950,VLLM_ROCM_USE_AITER=1",
    ),
    SelectorMutant(
        "aiter_on_every_gfx9",
        "gfx908 is in no list",
        "AITER takes every name that begins with gfx9",
        support_of(
            "AITER",
            device=as_if(lambda p: replace(p, gcn_arch="gfx942") if (p.gcn_arch or "").startswith("gfx9") else p),
        ),
        "sel1:device=gfx908,VLLM_ROCM_USE_AITER=1",
    ),
    SelectorMutant(
        "aiter_by_exact_name",
        "the architecture is a part of the GCN name",
        "gfx942:sramecc+:xnack- is not gfx942",
        support_of("AITER", device=only(lambda p: p.gcn_arch in ("gfx90a", "gfx942", "gfx950"))),
        "sel1:device=gfx942-features,VLLM_ROCM_USE_AITER=1",
    ),
    SelectorMutant(
        "gfx94_by_prefix",
        "gfx940 is in no list",
        "every gfx94 counts as gfx942",
        support_of("AITER", device=as_if(lambda p: replace(p, gcn_arch="gfx942") if p.gcn_arch == "gfx940" else p)),
        "sel1:device=gfx940,VLLM_ROCM_USE_AITER=1",
    ),
    SelectorMutant(
        "gfx90a_has_no_fp8",
        "gfx90a counts as FP8-capable",
        "gfx90a is taken for a device without FP8",
        on_fp8_hardware(lambda p: p.has_fp8_hardware and p.gcn_arch != "gfx90a"),
        "sel1:device=gfx90a",
    ),
    SelectorMutant(
        "ada_has_no_fp8",
        "FP8 on CUDA from 8.9",
        "FP8 begins with Hopper",
        on_fp8_hardware(lambda p: p.has_fp8_hardware and cap(p) != 89),
        "sel1:device=sm89",
    ),
    SelectorMutant(
        "sm88_has_fp8",
        "FP8 on CUDA: 8.8 is too old",
        "FP8 begins below 8.9",
        on_fp8_hardware(lambda p: p.has_fp8_hardware or (p.is_cuda and cap(p) >= 87)),
        "sel1:device=sm88",
    ),
    SelectorMutant(
        "rdna_has_fp8",
        "FP8 on ROCm: the three of gfx9",
        "every ROCm device has FP8",
        on_fp8_hardware(lambda p: p.has_fp8_hardware or p.is_rocm),
        "sel1:device=gfx908",
    ),
)
