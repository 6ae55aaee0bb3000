"""TRITON: our own Triton kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from fp8moe.backends.common import no_flashinfer_all2all
from fp8moe.backends.triton_arithmetic import arithmetic_by_tile, tile_height
from fp8moe.config import FusedMoEActivationFormat, FusedMoEConfig
from fp8moe.envs import Env
from fp8moe.experts import FusedMoEPermuteExpertsUnpermute, MoEWeights
from fp8moe.keys import QuantKey
from fp8moe.platforms import Platform, detected_platform
from fp8moe.quant import FusedMoEQuantConfig
from fp8moe.recipe import Arithmetic, Contract, Recipe
from fp8moe.registry import BackendUnavailable
from fp8moe.schemes import (
    BLOCK,
    CHANNEL_TOKEN,
    TENSOR_DYNAMIC,
    TENSOR_STATIC,
    TENSOR_TOKEN,
    UNQUANTISED,
    scheme_name,
)
from fp8moe.support import Support
from fp8moe.validation import InvalidMoEInput, check_call

TRITON_NEEDS = "CUDA or ROCm"
_FP8_SCHEMES = frozenset({BLOCK, CHANNEL_TOKEN, TENSOR_TOKEN, TENSOR_STATIC, TENSOR_DYNAMIC})


def triton_device(platform: Platform, _env: Env) -> bool:
    return platform.is_cuda or platform.is_rocm


def triton_scheme(platform: Platform, weight_key: QuantKey | None, activation_key: QuantKey | None) -> bool:
    scheme = (weight_key, activation_key)
    return scheme == UNQUANTISED or (platform.has_fp8_hardware and scheme in _FP8_SCHEMES)


class TritonExperts(FusedMoEPermuteExpertsUnpermute):
    """Triton kernels: block scheme, silu, bf16 or fp16; other schemes and activations are not written yet.

    Takes the canonical layout as it is, contiguous or not. In Triton's interpreter (TRITON_INTERPRET=1, set before
    triton is imported) it runs on the CPU.

    Raises:
        InvalidMoEInput: as the base class.
        BackendUnavailable: a configuration that is not written yet, or a device that Triton cannot run on here.
    """

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

    @staticmethod
    def implemented(scheme: str, activation: str) -> bool:
        """Whether the kernels for a scheme (by its name) and an activation are written."""
        return scheme == "block" and activation == "silu"

    def __init__(self, config: FusedMoEConfig, quant: FusedMoEQuantConfig, weights: MoEWeights) -> None:
        super().__init__(config, quant, weights)
        missing = _not_written(config, quant, weights)
        if missing:
            raise BackendUnavailable(f"TritonExperts: {missing}; nothing was run")
        try:
            from fp8moe.backends.triton_moe import INTERPRETED
        except ImportError as error:
            raise BackendUnavailable(f"TritonExperts: {error}; install triton") from error
        platform = _platform_of(weights.w13.device, INTERPRETED)
        self.contract = contract_on(platform, INTERPRETED, config.num_local_experts)

    def apply(
        self,
        hidden_states: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        *,
        expert_map: Tensor | None = None,
        apply_router_weight_on_input: bool = False,
        output: Tensor | None = None,
    ) -> Tensor:
        from fp8moe.backends.triton_moe import block_scaled_moe, device_guard

        device = self.weights.w13.device
        check_call(
            self.config,
            device,
            hidden_states,
            topk_weights,
            topk_ids,
            expert_map=expert_map,
            apply_router_weight_on_input=apply_router_weight_on_input,
            output=output,
        )
        pairs = topk_ids.numel()
        if pairs >= 2**31:
            raise InvalidMoEInput("topk_ids", f"of {pairs} token-expert pairs", "fewer than 2^31 in one call")
        if output is None:
            output = torch.empty_like(hidden_states, memory_format=torch.contiguous_format)
        if pairs == 0:
            return output.zero_()
        with device_guard(device):
            block_scaled_moe(
                hidden_states,
                topk_weights,
                topk_ids,
                self.weights,
                output,
                tile_rows=tile_height(pairs, self.config.num_local_experts),
                expert_map=expert_map,
                apply_router_weight_on_input=apply_router_weight_on_input,
                amax_floor=self.contract.recipe.amax_floor,
            )
        return output


def _not_written(config: FusedMoEConfig, quant: FusedMoEQuantConfig, weights: MoEWeights) -> str | None:
    """What of this configuration has no kernel yet, in words; None where everything has."""
    if (quant.weight_key, quant.activation_key) != BLOCK:
        scheme = scheme_name(quant.weight_key, quant.activation_key)
        return f"the scheme {scheme} has no kernel yet, only block has"
    if weights.w13.dtype != torch.float8_e4m3fn:
        return f"weights of dtype {weights.w13.dtype} have no kernel yet, only torch.float8_e4m3fn has"
    if not config.is_act_and_mul:
        return "an MLP without a gate has no kernel yet"
    if config.activation != "silu":
        return f"the activation {config.activation} has no kernel yet, only silu has"
    if config.in_dtype not in (torch.bfloat16, torch.float16):
        return f"hidden states of dtype {config.in_dtype} have no kernel, only bfloat16 and float16 have"
    return None


def _platform_of(device: torch.device, interpreted: bool) -> Platform:
    """The platform that the kernels run on.

    Raises:
        BackendUnavailable: Triton cannot run them on `device`.
    """
    if interpreted:
        return Platform("cpu")
    if device.type != "cuda":
        remedy = (
            "set TRITON_INTERPRET=1 before triton is imported, to run in its interpreter"
            if (device.type == "cpu")
            else f"put them on a device that is {TRITON_NEEDS}"
        )
        raise BackendUnavailable(f"TritonExperts: the weights are on {device}, where Triton cannot run; {remedy}")
    platform = detected_platform()
    if not platform.has_fp8_hardware:
        raise BackendUnavailable(
            f"TritonExperts: Triton has no e4m3 on {platform.architecture}; use a device of SM89 or newer, or of CDNA"
        )
    return platform


def contract_on(platform: Platform, interpreted: bool, experts: int) -> Contract:
    """The arithmetic by tile height; a token's bits depend on its batch where the heights differ.

    The interpreter's GEMM is BLAS, whose order is its own affair: there batch invariance is unknown.
    """
    by_tile = arithmetic_by_tile(platform, interpreted)

    def arithmetic(pairs: int) -> Arithmetic:
        assert by_tile is not None
        return by_tile[tile_height(pairs, experts)]

    known = by_tile is not None
    invariant = len(set(by_tile.values())) == 1 if by_tile is not None and not interpreted else None
    return Contract(
        recipe=Recipe(),
        arithmetic=arithmetic if known else None,
        deterministic=True,
        batch_invariant=invariant,
    )
