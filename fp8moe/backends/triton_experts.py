"""TRITON: our own Triton kernels."""

from __future__ import annotations

from fp8moe.config import FusedMoEActivationFormat
from fp8moe.envs import Env
from fp8moe.experts import FusedMoEPermuteExpertsUnpermute
from fp8moe.keys import QuantKey
from fp8moe.platforms import Platform
from fp8moe.schemes import BLOCK, CHANNEL_TOKEN, TENSOR_DYNAMIC, TENSOR_STATIC, TENSOR_TOKEN, UNQUANTISED
from fp8moe.backends.common import no_flashinfer_all2all
from fp8moe.support import Support

TRITON_NEEDS = "CUDA or ROCm"
_FP8_SCHEMES = frozenset({BLOCK, CHANNEL_TOKEN, TENSOR_TOKEN, TENSOR_STATIC, TENSOR_DYNAMIC})


def triton_device(platform: Platform, _env: Env) -> bool:
    return platform.is_cuda or platform.is_rocm


def triton_scheme(platform: Platform, weight_key: QuantKey | None, activation_key: QuantKey | None) -> bool:
    scheme = (weight_key, activation_key)
    return scheme == UNQUANTISED or (platform.has_fp8_hardware and scheme in _FP8_SCHEMES)


class TritonExperts(FusedMoEPermuteExpertsUnpermute):
    """Triton kernels."""

    support = Support(
        device=triton_device,
        needs=TRITON_NEEDS,
        scheme=triton_scheme,
        activations=frozenset({"silu", "gelu", "swigluoai", "swiglustep"}),
        activation_format=FusedMoEActivationFormat.Standard,
        parallel=no_flashinfer_all2all,
    )

    @staticmethod
    def activation_format() -> FusedMoEActivationFormat:
        return FusedMoEActivationFormat.Standard

    def apply(self, hidden_states, topk_weights, topk_ids, *, expert_map=None, apply_router_weight_on_input=False, output=None):
        raise NotImplementedError
