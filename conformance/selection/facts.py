"""What the selection model knows of a call: real objects read into numbers, one array a fact.

Every fact is read from a raw field (``dp_size``, ``use_ep``, the text of a variable ...), never from a property of the
objects under test, so that the model shares no derivation with the selector it judges.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeAlias

import numpy as np
import torch

from fp8moe import FusedMoEConfig, FusedMoEParallelConfig, Platform, QuantKey
from fp8moe.quant import (
    kFp8Dynamic64Sym,
    kFp8Dynamic128Sym,
    kFp8DynamicTensorSym,
    kFp8DynamicTokenSym,
    kFp8Static128BlockSym,
    kFp8StaticChannelSym,
    kFp8StaticTensorSym,
    kFp8StaticTokenSym,
    kNvfp4Dynamic,
    kNvfp4Static,
)

Array: TypeAlias = Any
"""A numpy array, or the scalar that numpy makes of an array without dimensions; operators between them are untyped."""

KEYS: tuple[QuantKey | None, ...] = (
    None,
    kFp8Static128BlockSym,
    kFp8StaticTensorSym,
    kFp8StaticChannelSym,
    kFp8StaticTokenSym,
    kFp8Dynamic128Sym,
    kFp8Dynamic64Sym,
    kFp8DynamicTensorSym,
    kFp8DynamicTokenSym,
    kNvfp4Static,
    kNvfp4Dynamic,
)
"""Quantisation keys by code; a key equal to none of them has the code ``OTHER``."""

ACTIVATIONS = ("silu", "gelu", "swigluoai", "swiglustep", "silu_no_mul", "gelu_no_mul", "relu2_no_mul")
EXCHANGES = (
    "naive",
    "pplx",
    "deepep_high_throughput",
    "deepep_low_latency",
    "mori",
    "allgather_reducescatter",
    "flashinfer_all2allv",
)
"""Names of all-to-all backends by code."""

OTHER = 99
"""Code of a name or a key that the specification does not know."""
NO_EXCHANGE = -1
"""Code of ``exchange`` where no all-to-all kernels are in use."""

UNSET, FALSE, TRUE, MALFORMED = range(4)
"""States of an integer or boolean variable."""
THROUGHPUT, LATENCY, MASKED_GEMM, BAD_CHOICE = range(1, 5)
"""States of ``VLLM_FLASHINFER_MOE_BACKEND`` beside ``UNSET``."""

FLASHINFER = "VLLM_USE_FLASHINFER_MOE_FP8"
FLASHINFER_BACKEND = "VLLM_FLASHINFER_MOE_BACKEND"
DEEP_GEMM = "VLLM_USE_DEEP_GEMM"
MOE_DEEP_GEMM = "VLLM_MOE_USE_DEEP_GEMM"
MARLIN = "VLLM_TEST_FORCE_FP8_MARLIN"
AITER = "VLLM_ROCM_USE_AITER"
AITER_MOE = "VLLM_ROCM_USE_AITER_MOE"

GFX_WITH_FP8 = ("gfx90a", "gfx942", "gfx950")
CHOICES = {"throughput": THROUGHPUT, "latency": LATENCY, "masked_gemm": MASKED_GEMM}


@dataclass(frozen=True)
class Facts:
    """Arrays that broadcast against each other: one value a cell, or one value along the axes a fact depends on."""

    cuda: Array
    rocm: Array
    xpu: Array
    capability: Array
    """``10 * major + minor``, -1 where unknown."""
    gfx9: Array
    """The GCN name contains one of ``GFX_WITH_FP8``."""
    cuda_build: Array
    """``100 * major + minor`` of the CUDA version kernels are compiled with, 0 where unknown."""
    deep_gemm: Array
    flashinfer: Array
    aiter: Array
    vllm: Array
    weight_key: Array
    activation_key: Array
    exchange: Array
    eplb: Array
    sequence_parallel: Array
    activation: Array
    gated: Array
    routing: Array
    fp32_logits: Array
    lora: Array
    allow_cutlass: Array
    use_flashinfer: Array
    flashinfer_choice: Array
    use_deep_gemm: Array
    moe_use_deep_gemm: Array
    force_marlin: Array
    use_aiter: Array
    use_aiter_moe: Array


FACTS = tuple(field.name for field in fields(Facts))


def facts_from(values: Mapping[str, Any]) -> Facts:
    """Facts from numbers or arrays by name; every fact must be there."""
    return Facts(**{name: np.asarray(values[name]) for name in FACTS})


def scalar_facts(
    config: FusedMoEConfig,
    weight_key: QuantKey | None,
    activation_key: QuantKey | None,
    allow_vllm_cutlass: bool,
    platform: Platform,
    env: Mapping[str, str],
) -> Facts:
    """The facts of one call."""
    return facts_from(
        device_facts(platform)
        | library_facts(platform.libraries)
        | scheme_facts(weight_key, activation_key)
        | parallel_facts(config.moe_parallel_config)
        | config_facts(config)
        | {"allow_cutlass": bool(allow_vllm_cutlass)}
        | environment_facts(env)
    )


def device_facts(platform: Platform) -> dict[str, int | bool]:
    """Facts of the device and its toolkit."""
    gcn = platform.gcn_arch or ""
    build = platform.cuda_version
    return {
        "cuda": platform.kind == "cuda",
        "rocm": platform.kind == "rocm",
        "xpu": platform.kind == "xpu",
        "capability": -1 if platform.capability is None else 10 * platform.capability[0] + platform.capability[1],
        "gfx9": any(arch in gcn for arch in GFX_WITH_FP8),
        "cuda_build": 0 if build is None else 100 * build[0] + build[1],
    }


def library_facts(libraries: Iterable[str]) -> dict[str, int | bool]:
    """Facts of the installed libraries."""
    return {name: name in libraries for name in ("deep_gemm", "flashinfer", "aiter", "vllm")}


def scheme_facts(weight_key: QuantKey | None, activation_key: QuantKey | None) -> dict[str, int | bool]:
    """Codes of the scheme's two keys."""
    return {"weight_key": _code(KEYS, weight_key), "activation_key": _code(KEYS, activation_key)}


def parallel_facts(parallel: FusedMoEParallelConfig) -> dict[str, int | bool]:
    """Facts of the parallel configuration: the exchange in use, expert load balancing, sequence parallelism."""
    exchanges = parallel.dp_size > 1 and parallel.use_ep
    return {
        "exchange": _code(EXCHANGES, parallel.all2all_backend) if exchanges else NO_EXCHANGE,
        "eplb": parallel.enable_eplb,
        "sequence_parallel": parallel.is_sequence_parallel,
    }


def config_facts(config: FusedMoEConfig) -> dict[str, int | bool]:
    """Facts of the layer beside its parallel configuration."""
    return {
        "activation": _code(ACTIVATIONS, config.activation),
        "gated": config.is_act_and_mul,
        "routing": int(config.routing_method),
        "fp32_logits": config.router_logits_dtype == torch.float32,
        "lora": bool(config.is_lora_enabled),
    }


def environment_facts(env: Mapping[str, str]) -> dict[str, int | bool]:
    """States of the seven variables that the selector reads."""
    return {
        "use_flashinfer": integer_state(env.get(FLASHINFER)),
        "flashinfer_choice": choice_state(env.get(FLASHINFER_BACKEND)),
        "use_deep_gemm": integer_state(env.get(DEEP_GEMM)),
        "moe_use_deep_gemm": integer_state(env.get(MOE_DEEP_GEMM)),
        "force_marlin": stripped_state(env.get(MARLIN)),
        "use_aiter": unstripped_state(env.get(AITER)),
        "use_aiter_moe": unstripped_state(env.get(AITER_MOE)),
    }


def integer_state(text: str | None) -> int:
    """State of a variable read as Python's ``int(text)`` and its truth."""
    if text is None:
        return UNSET
    try:
        return TRUE if int(text) != 0 else FALSE
    except ValueError:
        return MALFORMED


def stripped_state(text: str | None) -> int:
    """State of a boolean variable whose text is stripped and lowered."""
    return unstripped_state(None if text is None else text.strip())


def unstripped_state(text: str | None) -> int:
    """State of a boolean variable whose text is lowered only; nothing is malformed."""
    if text is None:
        return UNSET
    return TRUE if text.lower() in ("1", "true") else FALSE


def choice_state(text: str | None) -> int:
    """State of the FlashInfer backend's name: exact and case-sensitive."""
    return UNSET if text is None else CHOICES.get(text, BAD_CHOICE)


def _code(known: tuple[Any, ...], value: Any) -> int:
    return known.index(value) if value in known else OTHER
