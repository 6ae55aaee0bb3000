"""What vLLM's classes round, and where: read in vLLM 0.25.1's Python and in its CUDA sources. Measured is one thing: on
Hopper the sums of Triton's and CUTLASS's GEMMs without blocks are never promoted (`ONE_CHAIN`).

The sources are below csrc/libtorch_stable in its source distribution:

- activation_kernels.cu: silu_and_mul and gelu_and_mul, one template, read 16 bits, round the gate's part to 16 bits,
  multiply it with the up in fp32 and round the product. So does DeepGEMM's class, in a Triton kernel that quantises as
  well. quantization/fused_kernels/fused_silu_mul_block_quant.cu rounds nothing before it quantises: silu of
  `TritonExperts` with blocks.
- quantization/w8a8/fp8/common.cu: a token's scale is its amax divided by 448, and its values are divided by it; a whole
  tensor's values are multiplied by the scale's reciprocal, and its amax has no floor. per_token_group_quant.cu beside
  it: blocks of hidden states, and of gelu's result, by two divisions.
- moe/moe_align_sum_kernels.cu and moe/permute_unpermute_kernels: sums over a token's experts in fp32. Triton's GEMM
  multiplies by the routing weight before it rounds, Marlin's rounds result, weight and product.

What a Recipe cannot say, and is therefore not declared:

- DeepGEMM's class multiplies by fp32(1/448) in the second quantisation; the bound there has room for either.
- Routing weights on the input count a second time in the CUTLASS class (moe_unpermute takes them as they are) and in
  Marlin's (its first GEMM is told to multiply with them).
- In fp16, results of Triton's GEMMs on FP8 inputs are rounded to bf16 and then to fp16.
"""

from __future__ import annotations

from dataclasses import replace

from fp8moe.backends.marlin import BY_MARLIN, contract_for
from fp8moe.config import FusedMoEConfig
from fp8moe.quant import FusedMoEQuantConfig
from fp8moe.recipe import Arithmetic, Contract, Recipe, Rounding
from fp8moe.schemes import BLOCK, CHANNEL_TOKEN, Scheme

LEAST_SCALE_AMAX = 1 / 512
"""A scale is at least 1 / (448 * 512), of a token and of a block of silu's result."""
MULTIPLE, NARROW = 128, 512
"""Of rows and sizes that DeepGEMM takes; up to which intermediate size vLLM prefers Triton."""

HOPPER = 90
ONE_CHAIN = Arithmetic.on("hopper.wgmma")
"""All of K in one sum of the matrix unit. Of eleven elements that failed on an H200 when a promotion every 128 was
allowed for, the replay has each with it, to the bit, and none without (README.md)."""

_BY_KERNELS_OF_16_BITS = Recipe(
    input_weights="input", gemm1_output="input", gate_output="input", activation_output="input"
)
_UNKNOWN = Contract(_BY_KERNELS_OF_16_BITS, graph_capturable=True)


MORE_THAN_MARLIN: dict[str, Rounding] = {"input_weights": "input", "gate_output": "input"}
"""What vLLM's class rounds around the kernels of our MARLIN."""


def _quantised(recipe: Recipe, scheme: Scheme) -> Recipe:
    """As vLLM's operators quantise what they read in 16 bits."""
    if scheme == BLOCK:
        return recipe
    if scheme == CHANNEL_TOKEN:
        return replace(recipe, amax_floor=LEAST_SCALE_AMAX)
    return replace(recipe, amax_floor=0.0, scaling="reciprocal")


def triton(scheme: Scheme, activation: str, cap: int | None = None) -> Contract:
    """Each pair's result times its weight is stored in 16 bits.

    Args:
        cap: the device's capability, 90 for SM90.
    """
    recipe = replace(_quantised(_BY_KERNELS_OF_16_BITS, scheme), weighted="input")
    if scheme == BLOCK and activation == "silu":  # one kernel that quantises what it has in fp32
        recipe = replace(
            recipe, gate_output="float32", activation_output="float32", intermediate_amax_floor=LEAST_SCALE_AMAX
        )
    return replace(_UNKNOWN, recipe=recipe, arithmetic=ONE_CHAIN if cap == HOPPER and scheme != BLOCK else None)


def cutlass(scheme: Scheme, activation: str) -> Contract:
    """Results of pairs in 16 bits; on SM90, which is all that the bridge takes."""
    recipe = replace(_quantised(_BY_KERNELS_OF_16_BITS, scheme), gemm2_output="input")
    return replace(_UNKNOWN, recipe=recipe, arithmetic=ONE_CHAIN)


def deepgemm(scheme: Scheme, activation: str) -> Contract:
    """As CUTLASS, with DeepGEMM's arithmetic, which is promoted."""
    arithmetic = Arithmetic.on("hopper.wgmma", promote_every=MULTIPLE)
    return replace(cutlass(scheme, activation), arithmetic=arithmetic)


def marlin(scheme: Scheme, activation: str) -> Contract:
    """Weights alone are FP8; the kernels are those of fp8moe's MARLIN, the activation is vLLM's."""
    return replace(_UNKNOWN, recipe=replace(BY_MARLIN, **MORE_THAN_MARLIN))


def marlin_of(config: FusedMoEConfig, quant: FusedMoEQuantConfig) -> Contract:
    """With how a layer's weights meet their scales."""
    contract = contract_for(config, quant)
    return replace(contract, recipe=replace(contract.recipe, **MORE_THAN_MARLIN))


def triton_or_deepgemm(scheme: Scheme, activation: str, hidden: int, inter: int) -> Contract:
    """By vLLM's own rule, which looks at the intermediate size, and at each call's number of tokens."""
    few = triton(scheme, activation)
    if inter <= NARROW or inter % MULTIPLE or hidden % MULTIPLE:
        return few
    return replace(deepgemm(scheme, activation), fewer=(MULTIPLE, few))
