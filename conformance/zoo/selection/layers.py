"""Mutants of the predicates on what surrounds a layer: parallel configuration, format, routing, logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from conformance.zoo.selection.plant import Call, Make, SelectorMutant, seeing, support_of, supporting
from fp8moe import FusedMoEActivationFormat, FusedMoEParallelConfig, Platform, QuantKey, RoutingMethodType, Support
from fp8moe.backends.flashinfer_trtllm import FlashInferTrtllmExperts
from fp8moe.schemes import (
    BLOCK,
    TENSOR_STATIC,
)

SchemeCheck = Callable[[Platform, QuantKey | None, QuantKey | None], bool]
Parallel = Callable[[FusedMoEParallelConfig], bool]
BATCHED, STANDARD = FusedMoEActivationFormat.BatchedExperts, FusedMoEActivationFormat.Standard


def is_now(value: Any) -> Callable[[Any], Any]:
    """Another value, whatever it was."""
    return lambda _: value


def only_where(condition: Parallel) -> Callable[[Parallel], Parallel]:
    """One more condition on the parallel configuration."""
    return lambda check: lambda parallel: check(parallel) and condition(parallel)


def everywhere(*_: Any) -> bool:
    return True


def in_parallel(change: Callable[[FusedMoEParallelConfig], FusedMoEParallelConfig]) -> Make:
    """Both functions see another parallel configuration."""
    return seeing(
        lambda call: call._replace(
            config=replace(call.config, moe_parallel_config=change(call.config.moe_parallel_config))
        )
    )


def _without_ep(parallel: FusedMoEParallelConfig) -> FusedMoEParallelConfig:
    """Data parallelism alone counts as an exchange."""
    if parallel.dp_size > 1 and not parallel.use_ep:
        return replace(parallel, use_ep=True, tp_size=1, tp_rank=0, ep_size=parallel.tp_size)
    return parallel


def _context_parallel(parallel: FusedMoEParallelConfig) -> FusedMoEParallelConfig:
    return replace(parallel, dp_size=2) if parallel.pcp_size > 1 and parallel.use_ep else parallel


def _single_rank_exchange(parallel: FusedMoEParallelConfig) -> FusedMoEParallelConfig:
    return replace(parallel, dp_size=2) if parallel.use_ep else parallel


def _unset_logits(call: Call) -> Call:
    if call.config.router_logits_dtype == torch.float32 and call.config.in_dtype == torch.float32:
        return call._replace(config=replace(call.config, router_logits_dtype=torch.bfloat16))
    return call


def _routing(*methods: str) -> Callable[[Any], Callable[..., bool]]:
    accepted = [RoutingMethodType[name] for name in methods]
    return is_now(lambda method, *_: method in accepted)


def _routing_lists_swapped(routing: Callable[..., bool]) -> Callable[..., bool]:
    return lambda method, w, a: routing(method, *(TENSOR_STATIC if (w, a) == BLOCK else BLOCK))


def _routing_of_trtllm(name: str, support: Support) -> Support:
    trtllm = FlashInferTrtllmExperts.support
    if name != "FLASHINFER_CUTLASS" or trtllm is None:
        return support
    return replace(support, routing=trtllm.routing)


LAYERS = (
    SelectorMutant(
        "triton_with_flashinfers_exchange",
        "TRITON: not with flashinfer_all2allv",
        "TRITON takes every exchange",
        support_of("TRITON", parallel=is_now(everywhere)),
        "sel1:device=sm89,parallel=dp2-ep-flashinfer_all2allv",
    ),
    SelectorMutant(
        "marlin_without_any_exchange",
        "MARLIN refuses flashinfer_all2allv alone",
        "MARLIN refuses every exchange",
        support_of("MARLIN", parallel=only_where(lambda parallel: not parallel.use_all2all_kernels)),
        "sel1:device=sm75,parallel=dp2-ep-naive",
    ),
    SelectorMutant(
        "batched_triton_without_flashinfers_exchange",
        "the batched backends take every parallel configuration",
        "BATCHED_TRITON refuses expert load balancing",
        support_of("BATCHED_TRITON", parallel=only_where(lambda parallel: not parallel.enable_eplb)),
        "sel1:device=sm89,parallel=dp2-ep-deepep_low_latency-eplb",
    ),
    SelectorMutant(
        "trtllm_with_load_balancing",
        "FLASHINFER_TRTLLM: not with expert load balancing",
        "FLASHINFER_TRTLLM takes expert load balancing",
        support_of("FLASHINFER_TRTLLM", parallel=is_now(everywhere)),
        "sel1:device=sm100,parallel=single-eplb",
    ),
    SelectorMutant(
        "flashinfer_cutlass_with_sequence_parallelism",
        "FLASHINFER_CUTLASS: not with sequence parallelism",
        "FLASHINFER_CUTLASS takes sequence parallelism",
        support_of("FLASHINFER_CUTLASS", parallel=is_now(everywhere)),
        "sel1:parallel=single-sp",
    ),
    SelectorMutant(
        "flashinfer_cutlass_as_before",
        "FLASHINFER_CUTLASS with data parallelism and without expert parallelism",
        "FLASHINFER_CUTLASS wants dp = 1 or dp = ep, as an earlier version did",
        support_of("FLASHINFER_CUTLASS", parallel=only_where(lambda p: p.dp_size in (1, p.ep_size))),
        "sel1:parallel=tp4-dp2-deepep_low_latency",
    ),
    SelectorMutant(
        "cutlass_with_high_throughput",
        "VLLM_CUTLASS: not with deepep_high_throughput",
        "VLLM_CUTLASS takes deepep_high_throughput",
        support_of("VLLM_CUTLASS", parallel=is_now(lambda parallel: not parallel.use_fi_all2allv_kernels)),
        "sel1:scheme=tensor_static,parallel=dp2-ep4-deepep_high_throughput-sp,allow_vllm_cutlass=yes",
    ),
    SelectorMutant(
        "cutlass_without_any_exchange",
        "VLLM_CUTLASS takes the other exchanges",
        "VLLM_CUTLASS refuses every exchange, as an earlier version did",
        support_of("VLLM_CUTLASS", parallel=only_where(lambda parallel: not parallel.use_all2all_kernels)),
        "sel1:scheme=tensor_static,parallel=dp2-ep4-naive-sp-eplb,allow_vllm_cutlass=yes",
    ),
    SelectorMutant(
        "exchange_without_expert_parallelism",
        "an all-to-all exchange: dp > 1 and expert parallelism",
        "data parallelism alone counts as an exchange",
        in_parallel(_without_ep),
        "sel1:parallel=tp4-dp2-deepep_low_latency",
    ),
    SelectorMutant(
        "exchange_with_context_parallelism",
        "prefill context parallelism alone is no exchange",
        "pcp > 1 counts as dp > 1",
        in_parallel(_context_parallel),
        "sel1:parallel=pcp2-ep-deepep_low_latency",
    ),
    SelectorMutant(
        "exchange_with_one_data_rank",
        "expert parallelism alone is no exchange",
        "expert parallelism counts as an exchange, whatever dp is",
        in_parallel(_single_rank_exchange),
        "sel1:parallel=ep2-pplx",
    ),
    SelectorMutant(
        "pplx_is_standard",
        "pplx makes the format batched",
        "only deepep_low_latency makes the format batched",
        in_parallel(lambda p: replace(p, all2all_backend="naive") if p.all2all_backend == "pplx" else p),
        "sel1:parallel=dp2-ep-pplx",
    ),
    SelectorMutant(
        "triton_takes_batches",
        "the requested format is the class's",
        "TRITON is declared for the batched format",
        support_of("TRITON", activation_format=is_now(BATCHED)),
        "sel1:libraries=none",
    ),
    SelectorMutant(
        "batched_deep_gemm_takes_tokens",
        "BATCHED_DEEPGEMM: batched",
        "BATCHED_DEEPGEMM is declared for the standard format",
        support_of("BATCHED_DEEPGEMM", activation_format=is_now(STANDARD)),
        "sel1:parallel=dp2-ep-deepep_low_latency",
    ),
    SelectorMutant(
        "trtllm_routes_by_any_method",
        "FLASHINFER_TRTLLM: three routing methods a scheme",
        "FLASHINFER_TRTLLM takes every routing method",
        support_of("FLASHINFER_TRTLLM", routing=is_now(everywhere)),
        "sel1:device=sm100,scheme=tensor_static",
    ),
    SelectorMutant(
        "trtllm_lacks_renormalize_naive",
        "FLASHINFER_TRTLLM takes RenormalizeNaive",
        "RenormalizeNaive is missing",
        support_of("FLASHINFER_TRTLLM", routing=_routing("DeepSeekV3", "Renormalize", "Llama4")),
        "sel1:device=sm100,scheme=tensor_static",
    ),
    SelectorMutant(
        "trtllm_routing_lists_swapped",
        "DeepSeekV3 for the block scheme, Llama4 for static per tensor",
        "each scheme has the other's routing methods",
        support_of("FLASHINFER_TRTLLM", routing=_routing_lists_swapped),
        "sel1:device=sm100",
    ),
    SelectorMutant(
        "flashinfer_cutlass_asks_for_trtllms_routing",
        "support-underclaim",
        "the routing methods of FLASHINFER_TRTLLM restrict FLASHINFER_CUTLASS, which does not route",
        supporting(_routing_of_trtllm),
        "sel1:scheme=tensor_static",
    ),
    SelectorMutant(
        "trtllm_takes_fp32_logits",
        "float32 logits only with DeepSeekV3",
        "FLASHINFER_TRTLLM takes float32 logits",
        support_of("FLASHINFER_TRTLLM", logits_dtype=is_now(everywhere)),
        "sel1:device=sm100,routing=Renormalize,logits=fp32",
    ),
    SelectorMutant(
        "trtllm_refuses_fp32_logits",
        "float32 logits with DeepSeekV3",
        "FLASHINFER_TRTLLM refuses float32 logits altogether",
        support_of("FLASHINFER_TRTLLM", logits_dtype=is_now(lambda _, dtype: dtype is not torch.float32)),
        "sel1:device=sm100,logits=fp32",
    ),
    SelectorMutant(
        "trtllm_wants_bf16_logits",
        "logits other than float32 pass",
        "FLASHINFER_TRTLLM takes bfloat16 logits only, but for DeepSeekV3",
        support_of(
            "FLASHINFER_TRTLLM",
            logits_dtype=is_now(
                lambda method, dtype: dtype is torch.bfloat16 or method == RoutingMethodType.DeepSeekV3
            ),
        ),
        "sel1:device=sm100,routing=Renormalize,logits=fp16",
    ),
    SelectorMutant(
        "unset_logits_are_bf16",
        "an unset logits dtype is the input's",
        "an unset logits dtype is bfloat16",
        seeing(_unset_logits),
        "sel1:device=sm100,routing=Renormalize,logits=unset-fp32",
    ),
)
