"""Mutants of the device predicates of vLLM's CUTLASS, with its CUDA versions, and of whatever needs a library."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from conformance.zoo.selection.checks import as_if, cap, only, with_library, with_toolkit
from conformance.zoo.selection.plant import SelectorMutant, support_of
from fp8moe import Platform
from fp8moe.envs import Env

Device = Callable[[Platform, Env], bool]
CUTLASS = ("VLLM_CUTLASS", "BATCHED_VLLM_CUTLASS")
DEEP_GEMM = ("DEEPGEMM", "BATCHED_DEEPGEMM")
TRITON = ("TRITON", "BATCHED_TRITON")


ADA = Platform("cuda", (8, 9))


TOOLKITS = (
    SelectorMutant(
        "cutlass_up_to_110",
        "VLLM_CUTLASS: below 11.0",
        "the upper bound is closed: 11.0 is in",
        support_of(*CUTLASS, device=as_if(lambda p: replace(p, capability=(10, 9)) if cap(p) == 110 else p)),
        "sel1:device=sm110,scheme=tensor_dyn,allow_vllm_cutlass=yes",
    ),
    SelectorMutant(
        "cutlass_only_hopper_and_100",
        "VLLM_CUTLASS: every capability from 9.0 to 10.9",
        "9.9 and 10.3 are out",
        support_of(*CUTLASS, device=only(lambda p: cap(p) in (90, 100))),
        "sel1:device=sm99,scheme=channel_tok,allow_vllm_cutlass=yes,VLLM_FLASHINFER_MOE_BACKEND=masked_gemm,VLLM_ROCM_USE_AITER=0,VLLM_ROCM_USE_AITER_MOE=0",
    ),
    SelectorMutant(
        "cutlass_from_ada",
        "VLLM_CUTLASS: from 9.0",
        "8.9 is in",
        support_of(*CUTLASS, device=as_if(lambda p: replace(p, capability=(9, 0)) if cap(p) == 89 else p)),
        "sel1:device=sm89,scheme=tensor_dyn,allow_vllm_cutlass=yes,VLLM_USE_FLASHINFER_MOE_FP8=0,VLLM_ROCM_USE_AITER=0",
    ),
    SelectorMutant(
        "cutlass_needs_newer_than_12_8",
        "the CUDA version on SM10x: 12.8 will do",
        "12.8 itself is too old",
        support_of(*CUTLASS, device=only(lambda p: cap(p) < 100 or (p.cuda_version or (0, 0)) > (12, 8))),
        "sel1:device=sm100-cuda12.8,scheme=tensor_dyn,allow_vllm_cutlass=yes,VLLM_USE_DEEP_GEMM=0,VLLM_TEST_FORCE_FP8_MARLIN=0",
    ),
    SelectorMutant(
        "cutlass_content_with_12_7",
        "the CUDA version on SM10x: 12.7 is too old",
        "12.7 will do",
        support_of(*CUTLASS, device=with_toolkit(lambda p: (12, 8) if p.cuda_version == (12, 7) else p.cuda_version)),
        "sel1:device=sm100-cuda12.7,scheme=channel_tok,parallel=dp2-ep-deepep_low_latency,allow_vllm_cutlass=yes,VLLM_USE_DEEP_GEMM=0",
    ),
    SelectorMutant(
        "cutlass_wants_12_8_everywhere",
        "the CUDA version on SM90: 12.3 will do",
        "SM90 is held to the bound of SM10x",
        support_of(*CUTLASS, device=only(lambda p: (p.cuda_version or (0, 0)) >= (12, 8))),
        "sel1:device=sm90-cuda12.3,scheme=tensor_static,parallel=dp2-ep-deepep_low_latency,allow_vllm_cutlass=yes,VLLM_TEST_FORCE_FP8_MARLIN=0,VLLM_ROCM_USE_AITER_MOE=0",
    ),
    SelectorMutant(
        "cutlass_content_with_12_2",
        "the CUDA version on SM90: 12.2 is too old",
        "any 12 will do on SM90",
        support_of(
            *CUTLASS,
            device=with_toolkit(lambda p: (12, 3) if p.cuda_version == (12, 2) else p.cuda_version),
        ),
        "sel1:device=sm90-cuda12.2,scheme=channel_tok,allow_vllm_cutlass=yes,VLLM_ROCM_USE_AITER_MOE=0",
    ),
    SelectorMutant(
        "cutlass_reads_the_minor",
        "the CUDA version is a pair",
        "only the minor part is compared: 13.0 is too old",
        support_of(*CUTLASS, device=only(lambda p: (p.cuda_version or (0, 0))[1] >= (8 if cap(p) >= 100 else 3))),
        "sel1:device=sm100-cuda13.0,VLLM_USE_FLASHINFER_MOE_FP8=1_0",
    ),
    SelectorMutant(
        "cutlass_compares_decimals",
        "12.10 is newer than 12.8",
        "the version is compared as a decimal number",
        support_of(
            *CUTLASS,
            device=only(lambda p: float("{}.{}".format(*(p.cuda_version or (0, 0)))) >= (12.8 if cap(p) >= 100 else 0)),
        ),
        "sel1:device=sm100-cuda12.10,scheme=tensor_static,parallel=dp2-ep-deepep_low_latency,allow_vllm_cutlass=yes,VLLM_USE_FLASHINFER_MOE_FP8=0,VLLM_FLASHINFER_MOE_BACKEND=latency,VLLM_USE_DEEP_GEMM=0,VLLM_ROCM_USE_AITER=0",
    ),
    SelectorMutant(
        "cutlass_trusts_an_unknown_toolkit",
        "an unknown CUDA version counts as too old",
        "an unknown version will do",
        support_of(*CUTLASS, device=with_toolkit(lambda p: p.cuda_version or (99, 0))),
        "sel1:device=sm90-cuda-unknown,scheme=channel_tok,parallel=ep2-pplx,allow_vllm_cutlass=yes",
    ),
    SelectorMutant(
        "cutlass_without_its_operators",
        "VLLM_CUTLASS: the compiled operator",
        "CUTLASS is chosen where vLLM's operators are not there",
        support_of(*CUTLASS, device=with_library("vllm")),
        "sel1:libraries=none,scheme=tensor_static,allow_vllm_cutlass=yes",
    ),
    SelectorMutant(
        "trtllm_needs_its_library",
        "FLASHINFER_TRTLLM: no library test",
        "FLASHINFER_TRTLLM is refused where FlashInfer is not found",
        support_of("FLASHINFER_TRTLLM", device=only(lambda p: p.has("flashinfer"))),
        "sel1:device=sm100,libraries=none",
    ),
    SelectorMutant(
        "flashinfer_cutlass_without_its_library",
        "FLASHINFER_CUTLASS: FlashInfer usable",
        "FLASHINFER_CUTLASS is chosen where FlashInfer is not found",
        support_of("FLASHINFER_CUTLASS", device=with_library("flashinfer")),
        "sel1:libraries=none",
    ),
    SelectorMutant(
        "deep_gemm_without_its_library",
        "DEEPGEMM: deep_gemm importable",
        "DEEPGEMM is chosen where deep_gemm is not found",
        support_of("DEEPGEMM", device=with_library("deep_gemm")),
        "sel1:libraries=none",
    ),
    SelectorMutant(
        "batched_deep_gemm_needs_flashinfer",
        "BATCHED_DEEPGEMM: the same device test as DEEPGEMM",
        "BATCHED_DEEPGEMM asks for FlashInfer too",
        support_of("BATCHED_DEEPGEMM", device=only(lambda p: p.has("flashinfer"))),
        "sel1:libraries=deep_gemm,parallel=dp2-ep-deepep_low_latency",
    ),
    SelectorMutant(
        "marlin_without_its_operators",
        "MARLIN needs vLLM's compiled operators",
        "MARLIN is chosen where vLLM's operators are not there",
        support_of("MARLIN", device=with_library("vllm")),
        "sel1:device=sm75,libraries=none",
    ),
    SelectorMutant(
        "aiter_without_its_library",
        "AITER: aiter importable",
        "AITER is chosen where aiter is not found",
        support_of("AITER", device=with_library("aiter")),
        "sel1:device=gfx942,libraries=none,VLLM_ROCM_USE_AITER=1",
    ),
    SelectorMutant(
        "triton_needs_vllm",
        "TRITON needs no library",
        "TRITON is refused where vLLM's operators are not there",
        support_of("TRITON", device=only(lambda p: p.has("vllm"))),
        "sel1:libraries=none",
    ),
    SelectorMutant(
        "xpu_needs_its_library",
        "XPU: no library test",
        "XPU is refused where its library is not found",
        support_of("XPU", device=only(lambda p: p.has("vllm_xpu_kernels"))),
        "sel1:device=xpu,scheme=tensor_dyn",
    ),
)
