"""Mutants of the predicates on a layer's MLP and weights: gating, activations, schemes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from conformance.zoo.selection.plant import SelectorMutant, support_of
from fp8moe import FusedMoEActivationFormat, FusedMoEParallelConfig, Platform, QuantKey
from fp8moe.schemes import (
    BLOCK,
    CHANNEL_TOKEN,
    NVFP4,
    SCHEMES,
    TENSOR_128,
    TENSOR_DYNAMIC,
    TENSOR_NONE,
    TENSOR_TOKEN,
    UNQUANTISED,
    Scheme,
)

SchemeCheck = Callable[[Platform, QuantKey | None, QuantKey | None], bool]
Parallel = Callable[[FusedMoEParallelConfig], bool]
BATCHED, STANDARD = FusedMoEActivationFormat.BatchedExperts, FusedMoEActivationFormat.Standard


def refusing(*schemes: Scheme) -> Callable[[SchemeCheck], SchemeCheck]:
    """Not these schemes."""
    return lambda check: lambda platform, w, a: (w, a) not in schemes and check(platform, w, a)


def taking(*schemes: Scheme) -> Callable[[SchemeCheck], SchemeCheck]:
    """These schemes too, wherever the block scheme, or any other, is not the question."""
    return lambda check: lambda platform, w, a: (w, a) in schemes or check(platform, w, a)


def more(*names: str) -> Callable[[Iterable[str]], frozenset[str]]:
    """These activations too."""
    return lambda activations: frozenset(activations) | frozenset(names)


def less(*names: str) -> Callable[[Iterable[str]], frozenset[str]]:
    """Not these activations."""
    return lambda activations: frozenset(activations) - frozenset(names)


def is_now(value: Any) -> Callable[[Any], Any]:
    """Another value, whatever it was."""
    return lambda _: value


SCHEMES_AND_ACTIVATIONS = (
    SelectorMutant(
        "triton_takes_non_gated",
        "TRITON: gated MLPs only",
        "TRITON takes an MLP that is not gated",
        support_of("TRITON", non_gated=is_now(True)),
        "sel1:device=sm89,gating=non-gated",
    ),
    SelectorMutant(
        "marlin_refuses_non_gated",
        "MARLIN takes non-gated MLPs",
        "MARLIN refuses them, as an earlier version did",
        support_of("MARLIN", non_gated=is_now(False)),
        "sel1:device=sm75,gating=non-gated",
    ),
    SelectorMutant(
        "flashinfer_cutlass_refuses_non_gated",
        "FLASHINFER_CUTLASS takes non-gated MLPs",
        "FLASHINFER_CUTLASS refuses them",
        support_of("FLASHINFER_CUTLASS", non_gated=is_now(False)),
        "sel1:gating=non-gated",
    ),
    SelectorMutant(
        "trtllm_takes_gelu",
        "activation-overclaim",
        "FLASHINFER_TRTLLM, whose kernel has silu built in, takes gelu",
        support_of("FLASHINFER_TRTLLM", activations=more("gelu")),
        "sel1:device=sm100,activation=gelu",
    ),
    SelectorMutant(
        "deep_gemm_without_its_fallback",
        "a composite supports what both of its parts do",
        "DEEPGEMM declares activations of its own that its fallback lacks",
        support_of("DEEPGEMM", activations=more("silu_no_mul", "relu2_no_mul")),
        "sel1:activation=silu_no_mul",
    ),
    SelectorMutant(
        "deep_gemm_lacks_swiglustep",
        "DEEPGEMM: silu and swiglustep",
        "DEEPGEMM lacks swiglustep",
        support_of("DEEPGEMM", activations=less("swiglustep")),
        "sel1:activation=swiglustep",
    ),
    SelectorMutant(
        "triton_takes_any_activation",
        "an activation outside the set is refused",
        "TRITON takes relu",
        support_of("TRITON", activations=more("relu")),
        "sel1:activation=relu",
    ),
    SelectorMutant(
        "marlin_lacks_swigluoai",
        "MARLIN: six activations",
        "MARLIN lacks swigluoai",
        support_of("MARLIN", activations=less("swigluoai")),
        "sel1:device=sm75,activation=swigluoai",
    ),
    SelectorMutant(
        "batched_triton_lacks_no_mul",
        "BATCHED_TRITON lists activations without a multiplication",
        "BATCHED_TRITON lacks silu_no_mul",
        support_of("BATCHED_TRITON", activations=less("silu_no_mul")),
        "sel1:parallel=dp2-ep-deepep_low_latency,activation=silu_no_mul",
    ),
    SelectorMutant(
        "aiter_lacks_dynamic_tensor",
        "AITER: five schemes",
        "AITER refuses dynamic scales per tensor",
        support_of("AITER", scheme=refusing(TENSOR_DYNAMIC)),
        "sel1:device=gfx942,scheme=tensor_dyn,VLLM_ROCM_USE_AITER=1",
    ),
    SelectorMutant(
        "aiter_takes_tensor_token",
        "AITER: no weights per tensor with scales per token",
        "AITER takes weights per tensor with scales per token",
        support_of("AITER", scheme=taking(TENSOR_TOKEN)),
        "sel1:device=gfx942,scheme=tensor_tok,VLLM_ROCM_USE_AITER=1",
    ),
    SelectorMutant(
        "trtllm_takes_dynamic_tensor",
        "FLASHINFER_TRTLLM: the block scheme and static per tensor",
        "FLASHINFER_TRTLLM takes dynamic scales per tensor",
        support_of("FLASHINFER_TRTLLM", scheme=taking(TENSOR_DYNAMIC)),
        "sel1:device=sm100,scheme=tensor_dyn,routing=Renormalize",
    ),
    SelectorMutant(
        "flashinfer_cutlass_blocks_everywhere",
        "FLASHINFER_CUTLASS: the block scheme on 9.0 alone",
        "FLASHINFER_CUTLASS takes the block scheme on every device",
        support_of("FLASHINFER_CUTLASS", scheme=taking(BLOCK)),
        "sel1:device=sm110",
    ),
    SelectorMutant(
        "flashinfer_cutlass_nvfp4_on_hopper",
        "FLASHINFER_CUTLASS: NVFP4 from 10.0",
        "FLASHINFER_CUTLASS takes NVFP4 on SM90",
        support_of("FLASHINFER_CUTLASS", scheme=taking(NVFP4)),
        "sel1:scheme=nvfp4",
    ),
    SelectorMutant(
        "flashinfer_cutlass_wants_a_scheme",
        "FLASHINFER_CUTLASS takes unquantised layers",
        "FLASHINFER_CUTLASS refuses unquantised layers",
        support_of("FLASHINFER_CUTLASS", scheme=refusing(UNQUANTISED)),
        "sel1:scheme=none",
    ),
    SelectorMutant(
        "deep_gemm_reads_the_weights_only",
        "DEEPGEMM: activations in groups of 128",
        "DEEPGEMM does not look at the activations' scales",
        support_of(
            "DEEPGEMM",
            "BATCHED_DEEPGEMM",
            scheme=lambda check: lambda platform, w, _: check(platform, w, BLOCK[1]),
        ),
        "sel1:scheme=block_nvfp4",
    ),
    SelectorMutant(
        "cutlass_takes_blocks",
        "VLLM_CUTLASS: no block scheme",
        "VLLM_CUTLASS takes the block scheme",
        support_of("VLLM_CUTLASS", "BATCHED_VLLM_CUTLASS", scheme=taking(BLOCK)),
        "sel1:device=sm99,allow_vllm_cutlass=yes",
    ),
    SelectorMutant(
        "cutlass_lacks_channels",
        "VLLM_CUTLASS: weights per channel with scales per token",
        "VLLM_CUTLASS refuses weights per channel",
        support_of("VLLM_CUTLASS", "BATCHED_VLLM_CUTLASS", scheme=refusing(CHANNEL_TOKEN)),
        "sel1:scheme=channel_tok,allow_vllm_cutlass=yes",
    ),
    SelectorMutant(
        "triton_lacks_tensor_token",
        "TRITON: weights per tensor with scales per token",
        "TRITON refuses weights per tensor with scales per token",
        support_of("TRITON", "BATCHED_TRITON", scheme=refusing(TENSOR_TOKEN)),
        "sel1:scheme=tensor_tok",
    ),
    SelectorMutant(
        "triton_takes_tensor_128",
        "dynamic groups of 128 with weights per tensor: MARLIN alone",
        "TRITON takes weights per tensor with scales in groups of 128",
        support_of("TRITON", scheme=taking(TENSOR_128)),
        "sel1:scheme=tensor_128",
    ),
    SelectorMutant(
        "batched_triton_wants_a_scheme",
        "BATCHED_TRITON takes unquantised layers on every device",
        "BATCHED_TRITON refuses unquantised layers",
        support_of("BATCHED_TRITON", scheme=refusing(UNQUANTISED)),
        "sel1:scheme=none,parallel=dp2-ep-deepep_low_latency",
    ),
    SelectorMutant(
        "marlin_reads_the_activations",
        "MARLIN ignores the activation key",
        "MARLIN wants activations that are not quantised",
        support_of("MARLIN", scheme=lambda check: lambda platform, w, a: a is None and check(platform, w, a)),
        "sel1:device=sm75",
    ),
    SelectorMutant(
        "marlin_takes_unquantised",
        "MARLIN: four kinds of weights",
        "MARLIN takes weights that are not quantised",
        support_of("MARLIN", scheme=lambda check: lambda platform, w, a: w is None or check(platform, w, a)),
        "sel1:scheme=none_128",
    ),
    SelectorMutant(
        "marlin_lacks_nvfp4",
        "MARLIN takes NVFP4 weights",
        "MARLIN refuses NVFP4",
        support_of("MARLIN", scheme=lambda check: lambda platform, w, a: w != NVFP4[0] and check(platform, w, a)),
        "sel1:scheme=nvfp4",
    ),
    SelectorMutant(
        "xpu_lacks_weight_only",
        "XPU takes weights per tensor alone",
        "XPU refuses activations that are not quantised",
        support_of("XPU", scheme=refusing(TENSOR_NONE)),
        "sel1:device=xpu,scheme=tensor_none",
    ),
    SelectorMutant(
        "xpu_takes_every_scheme",
        "XPU: three schemes",
        "XPU takes every named scheme",
        support_of("XPU", scheme=taking(*SCHEMES.values())),
        "sel1:device=xpu",
    ),
)
