"""What vLLM's classes round, and where: read in vLLM 0.25.1's Python and in its public CUDA sources; nothing measured.

What a `Recipe` cannot say: vLLM's silu rounds the gate's part before the product; its first and its second quantisation
may have other floors; with blocks, DeepGEMM's class divides by 448 in the first and multiplies in the second.
"""

from __future__ import annotations

from dataclasses import replace

from fp8moe.recipe import Arithmetic, Contract, Recipe
from fp8moe.schemes import BLOCK, CHANNEL_TOKEN, Scheme

LEAST_SCALE_AMAX = 1 / 512
"""A scale is at least 1 / (448 * 512): of a token (dynamic_per_token_scaled_fp8_quant) and of a block of the activation
(silu_and_mul_per_block_quant). A block of the hidden states (per_token_group_fp8_quant) has 1e-10."""
MULTIPLE, NARROW = 128, 512
"""Of rows and sizes that DeepGEMM takes; up to which intermediate size vLLM prefers Triton."""

_SIXTEEN_BIT = Recipe(gemm1_output="input", activation_output="input")
_UNKNOWN = Contract(_SIXTEEN_BIT, graph_capturable=True)


def _quantised(recipe: Recipe, scheme: Scheme) -> Recipe:
    """As vLLM's operators quantise: a token or a block by division, a whole tensor by a reciprocal, without a floor."""
    if scheme in (BLOCK, CHANNEL_TOKEN):
        return replace(recipe, amax_floor=LEAST_SCALE_AMAX)
    return replace(recipe, amax_floor=0.0, scaling="reciprocal")


def triton(scheme: Scheme, activation: str) -> Contract:
    """Each pair's result times its weight is stored in 16 bits, and those are added in 16 bits or better."""
    recipe = replace(_quantised(_SIXTEEN_BIT, scheme), weighted="input", combine="input")
    if scheme == BLOCK and activation == "silu":  # one kernel that quantises what it has in fp32
        recipe = replace(recipe, activation_output="float32")
    return replace(_UNKNOWN, recipe=recipe)


def cutlass(scheme: Scheme, activation: str) -> Contract:
    """Results of pairs in 16 bits, weighted and added in fp32."""
    return replace(_UNKNOWN, recipe=replace(_quantised(_SIXTEEN_BIT, scheme), gemm2_output="input"))


def deepgemm(scheme: Scheme, activation: str) -> Contract:
    """As CUTLASS, with DeepGEMM's arithmetic, which is known."""
    recipe = replace(_SIXTEEN_BIT, gemm2_output="input", scale_division="reciprocal")
    return replace(_UNKNOWN, recipe=recipe, arithmetic=Arithmetic.on("hopper.wgmma", promote_every=MULTIPLE))


def marlin(scheme: Scheme, activation: str) -> Contract:
    """Weights alone are FP8."""
    recipe = replace(_SIXTEEN_BIT, quantize_input=False, requantize=False, weighted="input", combine="input")
    return replace(_UNKNOWN, recipe=recipe)


def triton_or_deepgemm(scheme: Scheme, activation: str, hidden: int, inter: int) -> Contract:
    """By vLLM's own rule, which looks at the intermediate size, and at each call's number of tokens."""
    few = triton(scheme, activation)
    if inter <= NARROW or inter % MULTIPLE or hidden % MULTIPLE:
        return few
    return replace(deepgemm(scheme, activation), fewer=(MULTIPLE, few))
