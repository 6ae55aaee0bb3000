"""vLLM's expert classes as backends: one adapter for all, and a class that names each."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from fp8moe.backends.common import no_flashinfer_all2all, one_of
from fp8moe.backends.libraries import LibraryCall
from fp8moe.config import FusedMoEActivationFormat, FusedMoEConfig
from fp8moe.envs import Env
from fp8moe.experts import FusedMoEPermuteExpertsUnpermute, MoEWeights
from fp8moe.keys import QuantKey
from fp8moe.platforms import Platform, detected_platform
from fp8moe.quant import FusedMoEQuantConfig
from fp8moe.recipe import Contract
from fp8moe.registry import BackendUnavailable, LayerNotSupported
from fp8moe.schemes import BLOCK, CHANNEL_TOKEN, TENSOR_DYNAMIC, TENSOR_STATIC, Scheme, scheme_name
from fp8moe.support import Support
from fp8moe_vllm import contracts
from fp8moe_vllm.library import RELEASE, Layer, Of

EXPERTS = "vllm.model_executor.layers.fused_moe.experts"
WEIGHTS_OF = {scheme[0] for scheme in (BLOCK, CHANNEL_TOKEN, TENSOR_STATIC)}
SILU, WITH_GELU = frozenset({"silu"}), frozenset({"silu", "gelu"})
GATHERED = 1024
"""DeepGEMM's class adds up so many columns at a time."""


def _support(
    needs: str,
    device: Callable[[int], bool],
    scheme: Callable[[Platform, QuantKey | None, QuantKey | None], bool],
    activations: frozenset[str],
) -> Support:
    def takes(platform: Platform, _env: Env) -> bool:
        return platform.is_cuda and platform.cap is not None and device(platform.cap) and platform.has("vllm")

    return Support(
        device=takes,
        needs=f"{needs} and vLLM {RELEASE}",
        scheme=scheme,
        activations=activations,
        activation_format=FusedMoEActivationFormat.Standard,
        parallel=no_flashinfer_all2all,
    )


def _weights_alone(_platform: Platform, weight_key: QuantKey | None, _activation_key: QuantKey | None) -> bool:
    return weight_key in WEIGHTS_OF


class VllmExperts(FusedMoEPermuteExpertsUnpermute):
    """A class of vLLM behind this project's contract: it quantises, permutes, multiplies and reduces as in vLLM.

    Routing weights on the input are vLLM's own doing as well.
    """

    which: ClassVar[Of]
    multiple: ClassVar[int] = 16
    multiples: ClassVar[dict[QuantKey | None, int]] = {BLOCK[0]: contracts.MULTIPLE}
    """Of both sizes: by the weights' key, and otherwise. vLLM makes no layer whose gate ends within a block."""

    def __init__(self, config: FusedMoEConfig, quant: FusedMoEQuantConfig, weights: MoEWeights) -> None:
        super().__init__(config, quant, weights)
        refusal = self.refusal(config, quant, weights)
        if refusal:
            raise LayerNotSupported(f"{self.name}: {refusal}")
        self.layer = self.made()
        self.contract = self.declared(config, (quant.weight_key, quant.activation_key))

    @property
    def name(self) -> str:
        return type(self).__name__

    def made(self) -> Layer:
        """
        Raises:
            BackendUnavailable: no vLLM, or no CUDA device.
        """
        if self.weights.w13.device.type != "cuda":
            from fp8moe_vllm.library import load

            load(self.name, self.which)  # that vLLM is missing comes first, since it can be helped
            raise BackendUnavailable(f"{self.name}: vLLM's kernels are for CUDA, not {self.weights.w13.device.type}")
        return Layer(self.name, self.which, self.config, self.quant, self.weights)

    @staticmethod
    def promises(scheme: Scheme, activation: str) -> Contract:
        """What is declared of a scheme and an activation."""
        raise NotImplementedError

    def declared(self, config: FusedMoEConfig, scheme: Scheme) -> Contract:
        return self.promises(scheme, config.activation)

    @classmethod
    def refusal(cls, config: FusedMoEConfig, quant: FusedMoEQuantConfig, weights: MoEWeights) -> str:
        """What the class cannot take of a layer; "" where it takes it."""
        scheme = (quant.weight_key, quant.activation_key)
        assert cls.support is not None
        if not cls.support.scheme(Platform("cuda"), *scheme):
            return f"it does not take {scheme_name(*scheme)}"
        if weights.w13.dtype != torch.float8_e4m3fn:
            return f"weights of dtype {weights.w13.dtype}: expected torch.float8_e4m3fn"
        if config.activation not in cls.support.activations:
            return f"activation={config.activation}: expected {', '.join(sorted(cls.support.activations))}"
        if not config.is_act_and_mul:
            return "an MLP that is not gated, which this bridge does not carry over"
        if weights.w13_bias is not None or weights.w2_bias is not None:
            return "biases, which this bridge does not carry over"
        hidden, inter = config.hidden_dim, config.intermediate_size_per_partition
        multiple = cls.multiples.get(quant.weight_key, cls.multiple)
        if hidden % multiple or inter % multiple:
            return f"sizes {hidden} and {inter}: expected multiples of {multiple}"
        return ""

    @staticmethod
    def activation_format() -> FusedMoEActivationFormat:
        return FusedMoEActivationFormat.Standard

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
        self.check_call(
            hidden_states,
            topk_weights,
            topk_ids,
            expert_map=expert_map,
            apply_router_weight_on_input=apply_router_weight_on_input,
            output=output,
        )
        if topk_ids.numel() == 0:
            return torch.zeros_like(hidden_states) if output is None else output.zero_()
        experts = self.config.num_local_experts
        if (self.quant.weight_key, self.quant.activation_key) == TENSOR_DYNAMIC:
            expert_map = with_one_elsewhere(expert_map, experts, hidden_states.device)
        call = LibraryCall.of(hidden_states, topk_weights, topk_ids, expert_map, experts)
        found = self.layer(call.hidden_states, call.weights, call.ids, call.expert_map, apply_router_weight_on_input)
        found.masked_fill_(call.without, 0.0)
        return found if output is None else output.copy_(found)


def with_one_elsewhere(expert_map: Tensor | None, experts: int, device: torch.device) -> Tensor:
    """(num_experts + 1,) int32: the map, by default that of a rank with all experts, and an expert of another rank. To
    that one go tokens without any, which otherwise would bring values of their own into a scale that all pairs share.
    """
    placed = torch.arange(experts, device=device) if expert_map is None else expert_map
    return torch.cat((placed.to(torch.int32), placed.new_full((1,), -1, dtype=torch.int32)))


class VllmTritonExperts(VllmExperts):
    """vLLM's Triton kernels, with the tuned tiles that the wheel has for this device."""

    which = Of("TRITON", f"{EXPERTS}.triton_moe", "TritonExperts")
    support = _support(
        "CUDA SM89 or newer",
        lambda cap: cap >= 89,
        one_of(BLOCK, CHANNEL_TOKEN, TENSOR_DYNAMIC, TENSOR_STATIC),
        WITH_GELU,
    )
    contract = contracts.triton(BLOCK, "silu")

    def declared(self, config: FusedMoEConfig, scheme: Scheme) -> Contract:
        return contracts.triton(scheme, config.activation, detected_platform().cap)


class VllmDeepGemmExperts(VllmExperts):
    """vLLM's DeepGEMM class for every number of tokens, with fp32 scales."""

    which = Of("DEEPGEMM", f"{EXPERTS}.deep_gemm_moe", "DeepGemmExperts")
    support = _support("CUDA SM90", lambda cap: cap == 90, one_of(BLOCK), SILU)
    promises = staticmethod(contracts.deepgemm)
    contract = contracts.deepgemm(BLOCK, "silu")

    @classmethod
    def refusal(cls, config: FusedMoEConfig, quant: FusedMoEQuantConfig, weights: MoEWeights) -> str:
        hidden, told = config.hidden_dim, super().refusal(config, quant, weights)
        if told:
            return told
        if config.in_dtype != torch.bfloat16:
            return f"hidden states of dtype {config.in_dtype}: expected torch.bfloat16, DeepGEMM's results"
        if hidden % GATHERED and (hidden > GATHERED or hidden & (hidden - 1)):
            return f"hidden_dim={hidden}: expected a multiple of {GATHERED}, or a smaller power of two"
        return ""


class VllmTritonOrDeepGemmExperts(VllmDeepGemmExperts):
    """What vLLM runs where DEEPGEMM is selected: Triton for few tokens and narrow layers."""

    which = Of("DEEPGEMM", f"{EXPERTS}.triton_deep_gemm_moe", "TritonOrDeepGemmExperts")

    def declared(self, config: FusedMoEConfig, scheme: Scheme) -> Contract:
        sizes = config.hidden_dim, config.intermediate_size_per_partition
        return contracts.triton_or_deepgemm(scheme, config.activation, *sizes)


class VllmCutlassExperts(VllmExperts):
    """vLLM's CUTLASS grouped GEMM."""

    which = Of("VLLM_CUTLASS", f"{EXPERTS}.cutlass_moe", "CutlassExpertsFp8")
    support = _support(
        "CUDA SM90", lambda cap: cap == 90, one_of(CHANNEL_TOKEN, TENSOR_DYNAMIC, TENSOR_STATIC), WITH_GELU
    )
    promises = staticmethod(contracts.cutlass)
    contract = contracts.cutlass(CHANNEL_TOKEN, "silu")


class VllmMarlinExperts(VllmExperts):
    """vLLM's Marlin kernels: FP8 weights, 16-bit activations."""

    which = Of("MARLIN", f"{EXPERTS}.marlin_moe", "MarlinExperts")
    support = _support(
        "CUDA SM75 or newer",
        lambda cap: cap >= 75,
        _weights_alone,
        WITH_GELU,
    )
    promises = staticmethod(contracts.marlin)
    contract = contracts.marlin(BLOCK, "silu")

    def declared(self, config: FusedMoEConfig, scheme: Scheme) -> Contract:
        return contracts.marlin_of(config, self.quant)

    @classmethod
    def refusal(cls, config: FusedMoEConfig, quant: FusedMoEQuantConfig, weights: MoEWeights) -> str:
        told = super().refusal(config, quant, weights)
        if told or config.hidden_dim % contracts.MULTIPLE == 0:
            return told
        return f"hidden_dim={config.hidden_dim}: expected a multiple of {contracts.MULTIPLE}"
