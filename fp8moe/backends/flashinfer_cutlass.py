"""FLASHINFER_CUTLASS: FlashInfer's CUTLASS fused MoE."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fp8moe.backends.flashinfer_modules import (
    AHEAD,
    CHANGED,
    COMMAND,
    FlashInferModule,
    has_cutlass,
    steps_to_build,
)
from fp8moe.backends.libraries import LibraryExperts, loaded
from fp8moe.backends.triton_stages import device_guard, gate_refused
from fp8moe.config import FusedMoEActivationFormat, FusedMoEConfig
from fp8moe.envs import Env
from fp8moe.experts import MoEWeights
from fp8moe.keys import GroupShape, QuantKey
from fp8moe.libraries import one_line
from fp8moe.platforms import Platform
from fp8moe.quant import FusedMoEQuantConfig
from fp8moe.recipe import Arithmetic, Contract, Recipe, Steps
from fp8moe.registry import BackendUnavailable, Fp8MoeBackend, LayerNotSupported
from fp8moe.scaling import quantize
from fp8moe.schemes import BLOCK, NVFP4, TENSOR_STATIC, UNQUANTISED, scheme_name
from fp8moe.support import Support

REMEDY = "install flashinfer-python 0.6.13 or newer"
NAMES = ("cutlass_fused_moe", "ActivationType")
ACTIVATION_TYPES = {"silu": "Swiglu", "relu2_no_mul": "Relu2"}
"""Members of `flashinfer.fused_moe.ActivationType`."""
BLOCK_NVCC = "TRTLLM_DG_NVCC_COMPILER"
BLOCK_MULTIPLE, TENSOR_MULTIPLE = 128, 16
ROUNDED = Recipe(gemm1_output="input", gemm2_output="input")
"""Of every scheme: both GEMMs store 16 bits. The activation, biases and the sum over slots are fp32."""
RECIPES = {
    TENSOR_STATIC: replace(ROUNDED, scaling="reciprocal"),  # the library is given 1 / a2_scale
    BLOCK: replace(
        ROUNDED,
        activation_output="input",
        scale_division="approximate_inverse",
        scaling="reciprocal",
        amax_floor=2.0**-119,
    ),
    UNQUANTISED: replace(ROUNDED, activation_output="input"),
}
"""The floor of blocks is no floor of the library's: of a smaller amax, 448 / amax is infinite there."""
SORTED_TOKENS, SORTED_SLOTS = 256, frozenset({1, 2, 4, 6, 8})
"""The most tokens, and numbers of slots, whose pairs one kernel sorts. Three others sort all else, and know
an expert that a token has in several slots in the first alone. So slots are merged, but where bits are declared."""
UNITS_OF_SM90 = {
    TENSOR_STATIC: Arithmetic.on("hopper.wgmma"),  # CUTLASS's "FP8FastAccum": one chain over all of K
    BLOCK: Arithmetic.on("hopper.wgmma", promote_every=BLOCK_MULTIPLE),  # its copy of DeepGEMM
    UNQUANTISED: Arithmetic.on("hopper.wgmma_f16"),
}


def _device(platform: Platform, _env: Env) -> bool:
    return has_cutlass(platform) and platform.has("flashinfer")


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

    Its kernels take about twenty minutes to build on 16 cores, which `fp8moe build` does and nothing here does unasked:
    until they are there, "not built" is the reason. Those for block scales are compiled by nvcc, besides, for each new
    shape.

    The contract is that of the kernels which it takes untuned. Where its tuner has run in the process, or was given a
    file, it may take kernels that add a token's slots in 16 bits, in no order: they keep none of it.

    Raises:
        BackendUnavailable: another device, no library, or kernels that are not built.
        LayerNotSupported: a layer that they cannot take.
    """

    backend = Fp8MoeBackend.FLASHINFER_CUTLASS
    written_from = "flashinfer-python 0.6.13"
    tried_on = "an H200"
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
        if not has_cutlass(platform):
            raise BackendUnavailable(
                f"{name}: FlashInfer's CUTLASS kernels are for CUDA SM90, SM10x, SM11x and SM12x, not "
                f"{platform.architecture}"
            )
        self.block = quant.block_shape is not None
        refusal = _refusal(config, quant, weights, platform)
        if refusal:
            raise LayerNotSupported(f"{name}: {refusal}")
        self.contract = contract_for(config, quant, weights, platform)
        self.flashinfer = self.library()
        self.converted = self.converted_weights(platform)
        self.scales = _scales(self.converted, block=self.block)

    def library(self) -> Any:
        """What has the function and the enumeration of `NAMES`.

        Raises:
            BackendUnavailable: it does not load, lacks one of them, its kernels are not built, or it would build them
                anew.
        """
        name = type(self).__name__
        library = loaded("flashinfer.fused_moe", NAMES, name, REMEDY)
        places = loaded("flashinfer.jit.env", ("FLASHINFER_AOT_DIR", "FLASHINFER_JIT_DIR"), name, REMEDY)
        module = FlashInferModule.of(self.platform(), places)
        missing = module.not_built(os.environ) or (block_compiler(os.environ) if self.block else "")
        if missing:
            raise BackendUnavailable(f"{name}: {missing}")
        try:
            check_loads_as_it_is(module)
        except RuntimeError as error:
            raise BackendUnavailable(f"{name}: {error}") from error
        return library

    @classmethod
    def lacks_here(cls, platform: Platform, env: Mapping[str, str]) -> str:
        try:
            places = loaded("flashinfer.jit.env", ("FLASHINFER_AOT_DIR", "FLASHINFER_JIT_DIR"), cls.__name__, REMEDY)
        except BackendUnavailable as error:
            return str(error)
        return FlashInferModule.of(platform, places).not_built(env)

    def compute_pairs(
        self, hidden_states: Tensor, weights: Tensor, ids: Tensor, expert_map: Tensor | None, output: Tensor
    ) -> None:
        tokens, top_k = ids.shape
        merge = top_k > 1 and self.contract.steps_for(tokens * top_k) is None
        ids, weights, without = self.slots(ids, weights, expert_map, merge=merge)
        given = hidden_states.contiguous()
        if self.quant.use_fp8_w8a8 and not self.block:
            scaling = self.contract.recipe.scaling
            given, _ = quantize(given, GroupShape.PER_TENSOR, self.converted.a13_scale, scaling=scaling)
        self.flashinfer.cutlass_fused_moe(
            input=given,
            token_selected_experts=ids,
            token_final_scales=weights,
            fc1_expert_weights=self.converted.w13,
            fc2_expert_weights=self.converted.w2,
            output_dtype=output.dtype,
            quant_scales=self.scales,
            fc1_expert_biases=self.converted.w13_bias,
            fc2_expert_biases=self.converted.w2_bias,
            ep_size=2,
            ep_rank=0,
            output=output,
            use_deepseek_fp8_block_scale=self.block,
            activation_type=getattr(self.flashinfer.ActivationType, ACTIVATION_TYPES[self.config.activation]),
        )
        output.masked_fill_(without, 0.0)

    def slots(
        self, ids: Tensor, weights: Tensor, expert_map: Tensor | None, *, merge: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `fp8moe.kernels.merge.merge_slots`, by our kernel.

        The library's ranks hold runs of one size. So this one is told to be the first of two: a pair without an expert
        here has one of the other's.
        """
        from fp8moe.kernels.merge import merge_slots

        placed = None if expert_map is None else expert_map.contiguous()
        with device_guard(ids.device):
            return merge_slots(ids, weights, placed, self.config.num_local_experts, merge=merge)


def contract_for(
    config: FusedMoEConfig, quant: FusedMoEQuantConfig, weights: MoEWeights, platform: Platform
) -> Contract:
    """Of a layer that the kernels take.

    They are compiled with nvcc's fast math: silu is an approximate exponential and reciprocal, and no bits are known
    after it, but relu2 is two products. With block scales the reciprocal of an amax is approximate as well, and the one
    that is declared is Hopper's: a unit in the last place decides about values half-way between two codes.
    """
    scheme = (quant.weight_key, quant.activation_key)
    if platform.cap is None or (scheme == UNQUANTISED and platform.cap >= 120):  # older kernels, fused with silu
        return Contract()
    recipe = RECIPES[scheme]
    if weights.w13_bias is not None:  # added in fp32 to what the GEMMs have stored
        recipe = replace(recipe, bias="input", gemm1_output="float32", gemm2_output="float32")
    if platform.cap != 90:
        return Contract(recipe)
    top_k = config.experts_per_token
    by_bits = scheme == TENSOR_STATIC and config.activation == "relu2_no_mul" and weights.w13_bias is None

    def steps(pairs: int) -> Steps | None:
        return Steps(scale_order="product") if sorts_every_slot(pairs // top_k, top_k) else None

    return Contract(
        recipe,
        arithmetic=UNITS_OF_SM90[scheme],
        steps=steps if by_bits else None,
        deterministic=True,
        batch_invariant=None if by_bits and top_k > 1 else True,  # slots are merged where tokens are many
        graph_capturable=True,
    )


def sorts_every_slot(tokens: int, top_k: int) -> bool:
    """Whether the library's sort finds an expert in each of a token's slots."""
    return tokens <= SORTED_TOKENS and top_k in SORTED_SLOTS


@cache
def check_loads_as_it_is(module: FlashInferModule) -> None:
    """FlashInfer asks ninja before it loads a module of its cache, and builds what has changed: not unasked, here.

    Raises:
        RuntimeError: it would build, or it cannot be told.
    """
    found = module.located(os.environ)
    if found is None or found.kind == AHEAD:
        return
    try:
        steps = steps_to_build(module.spec(), os.environ)
    except Exception as error:  # whatever FlashInfer's set-up raises, it would raise at the first call
        raise RuntimeError(f"FlashInfer cannot load {found.path} ({one_line(error)})") from error
    if steps:
        raise RuntimeError(
            f"FlashInfer would run {steps} steps of a build before it loads {found.path}: {CHANGED}; set them as they "
            f"were, or run `{COMMAND}`"
        )


def block_compiler(env: Mapping[str, str]) -> str:
    """Why the nvcc that it calls for each new shape with block scales is not there; "" where it is."""
    home = env.get("CUDA_HOME")
    compiler = env.get(BLOCK_NVCC) or (f"{home}/bin/nvcc" if home else "nvcc")
    if shutil.which(compiler, path=env.get("PATH")):
        return ""
    return (
        f"block: its kernels are compiled at the first call by {compiler}, which is not there; put nvcc on PATH, or "
        f"set CUDA_HOME or {BLOCK_NVCC}"
    )


def _refusal(config: FusedMoEConfig, quant: FusedMoEQuantConfig, weights: MoEWeights, platform: Platform) -> str:
    """What the kernels cannot take of a layer; "" where they take it."""
    scheme = (quant.weight_key, quant.activation_key)
    if scheme not in (UNQUANTISED, TENSOR_STATIC, BLOCK):
        return f"{scheme_name(*scheme)}: expected none, tensor_static or block"
    if weights.w13.dtype == torch.float8_e4m3fnuz:
        return f"weights of dtype {weights.w13.dtype}: expected torch.float8_e4m3fn"
    if config.activation not in ACTIVATION_TYPES:
        return f"activation={config.activation}: expected {' or '.join(ACTIVATION_TYPES)}"
    if gate_refused(config):
        return gate_refused(config)
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
