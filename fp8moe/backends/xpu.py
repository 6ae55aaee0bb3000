"""XPU: Intel's kernels."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fp8moe.backends.common import one_of
from fp8moe.backends.libraries import LibraryCall, LibraryExperts, loaded
from fp8moe.config import FusedMoEActivationFormat, FusedMoEConfig
from fp8moe.experts import MoEWeights
from fp8moe.quant import FusedMoEQuantConfig
from fp8moe.recipe import Contract, Recipe
from fp8moe.registry import BackendUnavailable, Fp8MoeBackend, LayerNotSupported
from fp8moe.schemes import TENSOR_DYNAMIC, TENSOR_NONE, UNQUANTISED, scheme_name
from fp8moe.support import Support
from fp8moe.validation import InvalidMoEInput

REMEDY = "install vllm-xpu-kernels 0.1.16 or newer, and the torch for Intel GPUs that it is built for"

SCHEMES = (UNQUANTISED, TENSOR_NONE, TENSOR_DYNAMIC)
ROUND_GATE = frozenset({"silu", "gelu"})
"""Its operators of these round the gate's part before the product; swigluoai's keeps all in fp32."""


class XpuExperts(LibraryExperts):
    """Intel's fused MoE: FP8 weights and 16-bit activations, which are quantised in no scheme.

    Written from the library's released source; it has run on no Intel GPU yet. What arithmetic it has is not declared.

    Raises:
        BackendUnavailable: another device, no library, or one whose extensions do not load.
        LayerNotSupported: a layer that its kernels cannot take.
    """

    backend = Fp8MoeBackend.XPU
    contract = Contract(
        Recipe(
            quantize_input=False,
            requantize=False,
            gemm1_output="input",
            activation_output="input",
            gemm2_output="input",
        )
    )
    written_from = "vllm-xpu-kernels 0.1.16.2"
    package = "vllm_xpu_kernels"
    support = Support(
        device=lambda platform, _env: platform.kind == "xpu",
        needs="an Intel XPU",
        scheme=one_of(*SCHEMES),
        activations=frozenset({"silu", "gelu", "swigluoai"}),
        activation_format=FusedMoEActivationFormat.Standard,
    )

    def __init__(self, config: FusedMoEConfig, quant: FusedMoEQuantConfig, weights: MoEWeights) -> None:
        super().__init__(config, quant, weights)
        name, platform = type(self).__name__, self.platform()
        if platform.kind != "xpu":
            raise BackendUnavailable(f"{name}: needs an Intel XPU, and this device is {platform.architecture}")
        refusal = _refused(quant, weights) or self.refused_activation()
        if refusal:
            raise LayerNotSupported(f"{name}: {refusal}")
        library = self.library()
        if config.activation in ROUND_GATE:
            self.contract = Contract(replace(self.contract.recipe, gate_output="input"))
        if not library.FUSEDMOE_AVAILABLE:
            why = library.FUSEDMOE_UNAVAILABLE_REASON
            raise BackendUnavailable(f"{name}: the extensions of vllm_xpu_kernels do not load: {why}; {REMEDY}")
        converted = self.converted_weights(platform)
        self.moe = library.XpuFusedMoe(
            converted.w13,
            converted.w13_scale,
            converted.w13_bias,
            converted.w2,
            converted.w2_scale,
            converted.w2_bias,
            n_experts_per_token=config.experts_per_token,
            activation=config.activation,
            num_experts=config.num_local_experts,
            ep_rank=config.moe_parallel_config.ep_rank,
            ep_size=config.moe_parallel_config.ep_size,
        )

    def library(self) -> Any:
        """What has `XpuFusedMoe`, and whether its extensions are there.

        Raises:
            BackendUnavailable: it does not load, or lacks one of them.
        """
        names = ("XpuFusedMoe", "FUSEDMOE_AVAILABLE", "FUSEDMOE_UNAVAILABLE_REASON")
        return loaded("vllm_xpu_kernels.fused_moe_interface", names, type(self).__name__, REMEDY)

    def compute(self, call: LibraryCall, output: Tensor) -> None:
        placed, ids = call.expert_map, call.ids
        parallel, top_k = self.config.moe_parallel_config, self.config.experts_per_token
        if ids.shape[1] != top_k:  # the library makes its buffers for so many
            raise InvalidMoEInput("topk_ids", f"of {ids.shape[1]} for each token", f"experts_per_token = {top_k}")
        if placed is None:  # the library takes ids for global ones where there are several ranks
            ids = ids + parallel.ep_rank * self.config.num_local_experts
        elif placed.numel() != self.config.num_local_experts * parallel.ep_size:
            expected = self.config.num_local_experts * parallel.ep_size
            raise InvalidMoEInput("expert_map", f"of {placed.numel()} experts", f"{expected}: as many on each rank")
        self.moe.apply(output, call.hidden_states, call.weights, ids, expert_map=placed)


def _refused(quant: FusedMoEQuantConfig, weights: MoEWeights) -> str:
    """What the kernels would take for something else; "" where they do not. The library tells a recipe by dtypes and by
    the scales' dimensions: a channel's scales pass for those of blocks, and e4m3fnuz for no FP8."""
    scheme = (quant.weight_key, quant.activation_key)
    if scheme not in SCHEMES:
        return f"{scheme_name(*scheme)}: expected {', '.join(scheme_name(*known) for known in SCHEMES)}"
    if weights.w13.dtype == torch.float8_e4m3fnuz:
        return f"weights of dtype {weights.w13.dtype}: expected torch.float8_e4m3fn"
    return ""
