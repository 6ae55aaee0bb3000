"""FLASHINFER_CUTLASS: FlashInfer's CUTLASS fused MoE."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fp8moe.backends.libraries import LibraryCall, LibraryExperts, first_local, loaded
from fp8moe.config import FusedMoEActivationFormat, FusedMoEConfig
from fp8moe.envs import Env
from fp8moe.experts import MoEWeights
from fp8moe.keys import QuantKey, kFp8StaticTensorSym
from fp8moe.platforms import Platform
from fp8moe.quant import FusedMoEQuantConfig
from fp8moe.registry import BackendUnavailable, Fp8MoeBackend, LayerNotSupported
from fp8moe.scaling import quantize
from fp8moe.schemes import BLOCK, NVFP4, TENSOR_STATIC, UNQUANTISED, scheme_name
from fp8moe.support import Support
from fp8moe.validation import InvalidMoEInput

REMEDY = "install flashinfer-python 0.6.13 or newer"
NAMES = ("cutlass_fused_moe", "ActivationType")
ACTIVATION_TYPES = {"silu": "Swiglu", "relu2_no_mul": "Relu2"}
"""Members of `flashinfer.fused_moe.ActivationType`."""
FAMILIES = (100, 110, 120)
MODULES = {90: "90", 103: "103", 100: "100", 110: "100", 120: "120"}
"""By a device's own capability, or else its family's: which of FlashInfer's modules `fused_moe_*` is its."""
BLOCK_MULTIPLE, TENSOR_MULTIPLE = 128, 16


def _device(platform: Platform, _env: Env) -> bool:
    return _takes(platform) and platform.has("flashinfer")


def _takes(platform: Platform) -> bool:
    return platform.is_cuda and (platform.cap == 90 or any(platform.in_family(family) for family in FAMILIES))


def _scheme(platform: Platform, weight_key: QuantKey | None, activation_key: QuantKey | None) -> bool:
    scheme, cap = (weight_key, activation_key), platform.cap
    if not platform.is_cuda or cap is None:
        return False
    return (
        (scheme in (UNQUANTISED, TENSOR_STATIC) and cap >= 90)
        or (scheme == BLOCK and cap == 90)
        or (scheme == NVFP4 and cap >= 100)
    )


class FlashInferCutlassExperts(LibraryExperts):
    """FlashInfer's CUTLASS fused MoE: with block scales it quantises activations by itself, with static ones per tensor
    it takes them in FP8.

    Its kernels take about twenty minutes to build on 16 cores, which nothing here does unasked: until they are there,
    "not built" is the reason. What arithmetic it has is not declared.

    Raises:
        BackendUnavailable: another device, no library, or kernels that are not built.
        LayerNotSupported: a layer that they cannot take.
    """

    backend = Fp8MoeBackend.FLASHINFER_CUTLASS
    written_from = "flashinfer-python 0.6.13"
    package = "flashinfer"
    support = Support(
        device=_device,
        needs="CUDA SM90, SM10x, SM11x or SM12x, and a FlashInfer whose fused MoE can be used",
        scheme=_scheme,
        activations=frozenset({"silu", "relu2_no_mul"}),
        activation_format=FusedMoEActivationFormat.Standard,
        parallel=lambda parallel: not parallel.is_sequence_parallel,
        non_gated=True,
    )

    def __init__(self, config: FusedMoEConfig, quant: FusedMoEQuantConfig, weights: MoEWeights) -> None:
        super().__init__(config, quant, weights)
        name, platform = type(self).__name__, self.platform()
        if not _takes(platform):
            raise BackendUnavailable(
                f"{name}: FlashInfer's CUTLASS kernels are for CUDA SM90, SM10x, SM11x and SM12x, not "
                f"{platform.architecture}"
            )
        self.block = quant.block_shape is not None
        refusal = _refusal(config, quant, weights, platform)
        if refusal:
            raise LayerNotSupported(f"{name}: {refusal}")
        self.flashinfer = self.library()
        self.converted = self.converted_weights(platform)
        self.scales = _scales(self.converted, block=self.block)

    def library(self) -> Any:
        """What has the function and the enumeration of `NAMES`.

        Raises:
            BackendUnavailable: it does not load, lacks one of them, or its kernels are not built.
        """
        name = type(self).__name__
        library = loaded("flashinfer.fused_moe", NAMES, name, REMEDY)
        places = loaded("flashinfer.jit.env", ("FLASHINFER_AOT_DIR", "FLASHINFER_JIT_DIR"), name, REMEDY)
        missing = not_built(self.platform(), (places.FLASHINFER_AOT_DIR, places.FLASHINFER_JIT_DIR))
        if missing:
            raise BackendUnavailable(f"{name}: {missing}")
        return library

    def compute(self, call: LibraryCall, output: Tensor) -> None:
        local = self.config.num_local_experts
        rank, ranks = 0, 1
        if call.expert_map is not None:
            offset = first_local(call.expert_map, local)
            if offset % local or call.expert_map.numel() % local:
                told = f"of {call.expert_map.numel()} experts, {local} from {offset} on here"
                raise InvalidMoEInput("expert_map", told, "ranks of one size")
            rank, ranks = offset // local, call.expert_map.numel() // local
        given = call.hidden_states
        if self.quant.use_fp8_w8a8 and not self.block:
            given, _ = quantize(given, kFp8StaticTensorSym, self.converted.a13_scale)
        self.flashinfer.cutlass_fused_moe(
            input=given,
            token_selected_experts=call.ids,
            token_final_scales=call.weights,
            fc1_expert_weights=self.converted.w13,
            fc2_expert_weights=self.converted.w2,
            output_dtype=output.dtype,
            quant_scales=self.scales,
            fc1_expert_biases=self.converted.w13_bias,
            fc2_expert_biases=self.converted.w2_bias,
            ep_size=ranks,
            ep_rank=rank,
            output=output,
            use_deepseek_fp8_block_scale=self.block,
            activation_type=getattr(self.flashinfer.ActivationType, ACTIVATION_TYPES[self.config.activation]),
        )


def module_of(platform: Platform) -> str:
    """The name of FlashInfer's module for a device that `_takes`."""
    assert platform.cap is not None
    known = MODULES.get(platform.cap)
    return f"fused_moe_{known or MODULES[next(family for family in FAMILIES if platform.in_family(family))]}"


def not_built(platform: Platform, places: tuple[Path, Path]) -> str:
    """What to do where neither folder has the device's module, the one for those built ahead of time or the cache; ""
    where one has."""
    module = module_of(platform)
    if any((place / module / f"{module}.so").is_file() for place in places):
        return ""
    builder = f"gen_cutlass_fused_moe_sm{module.rpartition('_')[2]}_module"
    return (
        f"not built: no {module}.so in {places[0]} or {places[1]}; build it, in about 20 minutes on 16 cores with 100 "
        f"GB of memory (MAX_JOBS takes fewer; stopped, it goes on where it was): "
        f'python -c "from flashinfer.jit.fused_moe import {builder} as module; module().build(verbose=True)"'
    )


def _refusal(config: FusedMoEConfig, quant: FusedMoEQuantConfig, weights: MoEWeights, platform: Platform) -> str:
    """What the kernels cannot take of a layer; "" where they take it."""
    scheme = (quant.weight_key, quant.activation_key)
    if scheme not in (UNQUANTISED, TENSOR_STATIC, BLOCK):
        return f"{scheme_name(*scheme)}: expected none, tensor_static or block"
    if config.activation not in ACTIVATION_TYPES:
        return f"activation={config.activation}: expected {' or '.join(ACTIVATION_TYPES)}"
    if (weights.w13_bias is None) != (weights.w2_bias is None):
        return "biases: one of the two; expected both, or none"
    if scheme == BLOCK and platform.cap != 90:
        return f"block: its kernels are for SM90 alone, not {platform.architecture}"
    sizes = {"hidden_dim": config.hidden_dim}
    if scheme == BLOCK:
        sizes["intermediate_size_per_partition"] = config.intermediate_size_per_partition
    multiple = BLOCK_MULTIPLE if scheme == BLOCK else TENSOR_MULTIPLE
    wrong = [f"{name}={size}: expected a multiple of {multiple}" for name, size in sizes.items() if size % multiple]
    if scheme == BLOCK and config.in_dtype != torch.bfloat16:
        wrong.append(f"in_dtype={config.in_dtype}: expected torch.bfloat16")
    return "; ".join(wrong)


def _scales(weights: MoEWeights, *, block: bool) -> list[Tensor]:
    """As the library takes them: of blocks both weights'; per tensor those of the first result, of the second GEMM's
    input (its reciprocal), of the second result, and of the first input."""
    if weights.w13_scale is None or weights.w2_scale is None:
        return []
    if block:
        return [weights.w13_scale, weights.w2_scale]
    assert weights.a13_scale is not None
    assert weights.a2_scale is not None
    a13, a2 = weights.a13_scale.reshape(()), weights.a2_scale.reshape(())
    return [weights.w13_scale * a13, 1.0 / a2, weights.w2_scale * a2, a13]
