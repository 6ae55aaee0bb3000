"""AITER: AMD's library on CDNA devices."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fp8moe.backends.common import no_flashinfer_all2all, one_of
from fp8moe.backends.libraries import LibraryCall, LibraryExperts, loaded, once_a_token
from fp8moe.backends.triton_stages import gate_refused
from fp8moe.config import FusedMoEActivationFormat, FusedMoEConfig
from fp8moe.envs import Env
from fp8moe.experts import MoEWeights
from fp8moe.platforms import Platform
from fp8moe.quant import FusedMoEQuantConfig
from fp8moe.recipe import Contract, Recipe
from fp8moe.registry import BackendUnavailable, Fp8MoeBackend, LayerNotSupported
from fp8moe.schemes import BLOCK, CHANNEL_TOKEN, TENSOR_DYNAMIC, TENSOR_STATIC, UNQUANTISED, Scheme, scheme_name
from fp8moe.support import Support
from fp8moe.validation import InvalidMoEInput

REMEDY = "install amd-aiter, built for this ROCm"
DEVICES = ("gfx942", "gfx950")
"""gfx90a, which the selector takes, is in none of the library's tables."""
BLOCK_MULTIPLE = 128
QUANT_TYPES: dict[Scheme, str] = {
    UNQUANTISED: "No",
    TENSOR_STATIC: "per_Tensor",
    TENSOR_DYNAMIC: "per_Tensor",
    CHANNEL_TOKEN: "per_Token",
    BLOCK: "per_128x128",
}
"""Members of `aiter.QuantType`."""
ACTIVATION_TYPES = {"silu": "Silu", "gelu": "Gelu"}
"""Members of `aiter.ActivationType`."""


def _device(platform: Platform, env: Env) -> bool:
    return platform.is_rocm_gfx9 and platform.has("aiter") and env.use_aiter_moe


class AiterExperts(LibraryExperts):
    """AITER's fused MoE, which sorts, quantises activations, activates and combines by itself.

    Written from the library's released source; it has run on no AMD device yet. What arithmetic it has is not declared;
    its recipe is that of its two GEMMs apart, which layers have that its fused kernels do not take. With
    tensor_dyn they take the second scale of all slots, also of those that no expert here has, whose memory nobody
    wrote: by the release's source, only a call is right whose every slot has an expert of its own on this rank.

    Raises:
        BackendUnavailable: another device or no library.
        LayerNotSupported: a layer that its kernels or its layout cannot take.
    """

    backend = Fp8MoeBackend.AITER
    contract = Contract(Recipe(activation_output="input", weighted="input", combine="input"))
    written_from = "amd-aiter 0.1.7.post2.dev18"
    package = "aiter"
    support = Support(
        device=_device,
        needs="ROCm on gfx90a, gfx942 or gfx950, the library aiter, and VLLM_ROCM_USE_AITER=1",
        scheme=one_of(UNQUANTISED, BLOCK, TENSOR_STATIC, TENSOR_DYNAMIC, CHANNEL_TOKEN),
        activations=frozenset({"silu", "gelu"}),
        activation_format=FusedMoEActivationFormat.Standard,
        parallel=no_flashinfer_all2all,
    )

    def __init__(self, config: FusedMoEConfig, quant: FusedMoEQuantConfig, weights: MoEWeights) -> None:
        super().__init__(config, quant, weights)
        name, platform = type(self).__name__, self.platform()
        if not platform.has_gcn_arch(*DEVICES):
            raise BackendUnavailable(
                f"{name}: AITER is for ROCm on {' and '.join(DEVICES)}, not {platform.architecture}"
            )
        scheme = (quant.weight_key, quant.activation_key)
        if scheme not in QUANT_TYPES or config.activation not in ACTIVATION_TYPES:
            raise LayerNotSupported(
                f"{name}: {scheme_name(*scheme)} with {config.activation}: AITER has {', '.join(ACTIVATION_TYPES)} and "
                f"{', '.join(scheme_name(*known) for known in QUANT_TYPES)}"
            )
        refusal = gate_refused(config) or _parts_of_blocks(config, quant)
        if refusal:
            raise LayerNotSupported(f"{name}: {refusal}")
        if weights.w13_bias is not None or weights.w2_bias is not None:
            raise LayerNotSupported(f"{name}: biases: AITER passes over them in these schemes")
        library = self.library()
        self.fused_moe = library.fused_moe
        self.quant_type = getattr(library.QuantType, QUANT_TYPES[scheme])
        self.activation = getattr(library.ActivationType, ACTIVATION_TYPES[config.activation])
        self.converted = self.converted_weights(platform)
        for tensor in (self.converted.w13, self.converted.w2):
            shuffled: Any = tensor
            shuffled.is_shuffled = True  # what the library looks for, on the very tensor that it is given

    def library(self) -> Any:
        """What has `fused_moe` and the two enumerations. On other devices nothing is imported: that alone compiles.

        Raises:
            BackendUnavailable: it does not load, or lacks one of them.
        """
        return loaded("aiter.fused_moe", ("fused_moe", "QuantType", "ActivationType"), type(self).__name__, REMEDY)

    def compute(self, call: LibraryCall, output: Tensor) -> None:
        mask = mask_of(call.expert_map, self.config.num_local_experts, call.ids.device)
        # Its sort marks a token's slot in a table of experts by tokens, one slot in each place.
        ids, weights = once_a_token(call.ids.masked_fill(~call.present, -1), call.weights)
        found = self.fused_moe(
            call.hidden_states,
            self.converted.w13,
            self.converted.w2,
            weights,
            ids.masked_fill(ids < 0, mask.numel() - 1),
            expert_mask=mask,
            activation=self.activation,
            quant_type=self.quant_type,
            w1_scale=self.converted.w13_scale,
            w2_scale=self.converted.w2_scale,
            a1_scale=self.converted.a13_scale,
            a2_scale=self.converted.a2_scale,
            dtype=call.hidden_states.dtype,
        )
        output.copy_(found)


def _parts_of_blocks(config: FusedMoEConfig, quant: FusedMoEQuantConfig) -> str:
    """Which size ends within a block of scales, where the library counts w13's through gate and up; "" where none."""
    if quant.block_shape is None:
        return ""
    sizes = {"hidden_dim": config.hidden_dim, "intermediate_size_per_partition": config.intermediate_size_per_partition}
    wrong = [
        f"{name}={size}: expected a multiple of {BLOCK_MULTIPLE}"
        for name, size in sizes.items()
        if size % BLOCK_MULTIPLE
    ]
    return "; ".join(wrong)


def mask_of(expert_map: Tensor | None, local: int, device: torch.device) -> Tensor:
    """(num_experts + 1,) int32: 1 for experts of this rank, and a 0 at the end, as the library's callers have it: what
    is sent there is left out.

    Raises:
        InvalidMoEInput: local ids do not ascend with the global ones, by which the library numbers them.
    """
    if expert_map is None:
        here = torch.ones(local, dtype=torch.bool, device=device)
    else:
        here = expert_map >= 0
        if not torch.equal(torch.where(here, here.cumsum(0) - 1, -1), expert_map.long()):
            raise InvalidMoEInput(
                "expert_map", "not ascending", "local experts numbered in the order of their global ids"
            )
    return torch.nn.functional.pad(here.to(torch.int32), (0, 1))
