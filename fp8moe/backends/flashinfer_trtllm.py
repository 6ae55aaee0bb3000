"""FLASHINFER_TRTLLM: FlashInfer's TensorRT-LLM kernels on SM10x, which route as well."""

from __future__ import annotations

from typing import Any

import torch

from fp8moe.backends.common import AdapterNotWritten, one_of
from fp8moe.config import FusedMoEActivationFormat, RoutingMethodType
from fp8moe.envs import Env
from fp8moe.keys import QuantKey
from fp8moe.platforms import Platform
from fp8moe.schemes import BLOCK, TENSOR_STATIC
from fp8moe.support import Support

_BLOCK_ROUTING = (RoutingMethodType.DeepSeekV3, RoutingMethodType.Renormalize, RoutingMethodType.RenormalizeNaive)
_TENSOR_ROUTING = (RoutingMethodType.Llama4, RoutingMethodType.Renormalize, RoutingMethodType.RenormalizeNaive)


def _device(platform: Platform, _env: Env) -> bool:
    """No library test, as upstream: SM10x without FlashInfer is selected all the same (quirk Q12)."""
    return platform.is_cuda_family(100)


def _routing(method: RoutingMethodType, weight_key: QuantKey | None, activation_key: QuantKey | None) -> bool:
    return method in (_BLOCK_ROUTING if (weight_key, activation_key) == BLOCK else _TENSOR_ROUTING)


def _logits_dtype(method: RoutingMethodType, dtype: Any) -> bool:
    return dtype is not torch.float32 or method == RoutingMethodType.DeepSeekV3


class FlashInferTrtllmExperts(AdapterNotWritten):
    """FlashInfer's TRTLLM fused MoE; `select` returns no class for it, as upstream."""

    package = "flashinfer"
    support = Support(
        device=_device,
        needs="CUDA SM10x",
        scheme=one_of(BLOCK, TENSOR_STATIC),
        activations=frozenset({"silu"}),
        activation_format=FusedMoEActivationFormat.Standard,
        parallel=lambda parallel: not parallel.enable_eplb,
        routing=_routing,
        logits_dtype=_logits_dtype,
    )

    @staticmethod
    def activation_format() -> FusedMoEActivationFormat:
        return FusedMoEActivationFormat.Standard
