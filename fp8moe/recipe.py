"""What a backend declares about its arithmetic: the recipe (what is rounded where) and the matrix unit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Rounding = Literal["float32", "input"]
"""Kept in fp32, or rounded to the dtype of the hidden states (bf16 or fp16)."""


@dataclass(frozen=True)
class Recipe:
    """The roundings of one MoE, in the order in which they happen; everything between them is judged as exact.

    Args:
        scale_rounding: dynamic scales as computed ("continuous"), or rounded up to a power of two.
        scaling: how a value meets its scale before the cast to FP8: IEEE division, or multiplication by the
            fp32 reciprocal 1/scale.
        amax_floor: smallest amax that a dynamic scale is computed from; a group of zeros gets floor/448.
        dynamic_tensor_scope: what shares a dynamic per-tensor scale: all tokens of the call ("batch"; for the
            second GEMM all token-expert pairs), or the tokens of one expert ("expert").
        gemm1_output: dtype of the first GEMM's result (bias included) before the activation.
        activation_output: dtype of the activation's result before it is quantised again, or, where activations
            are not quantised, as it enters the second GEMM.
        requantize: whether the intermediate is quantised for the second GEMM as the activation key says.
        gemm2_output: dtype of one token-expert pair's result before the routing weight.
        combine: dtype of the running sum over a token's experts, in the order of the slots.
    """

    scale_rounding: Literal["continuous", "power_of_two"] = "continuous"
    scaling: Literal["divide", "reciprocal"] = "divide"
    amax_floor: float = 1e-10
    dynamic_tensor_scope: Literal["batch", "expert"] = "batch"
    gemm1_output: Rounding = "float32"
    activation_output: Rounding = "float32"
    requantize: bool = True
    gemm2_output: Rounding = "float32"
    combine: Rounding = "float32"


@dataclass(frozen=True)
class Arithmetic:
    """How a GEMM accumulates.

    Args:
        unit: "fp32" (any order, rounded to nearest), or a matrix unit such as "hopper.wgmma".
        fraction_bits: bits kept below the largest exponent of a group when its terms are aligned; None for fp32.
        group: terms of K that one step of the unit adds.
        promote_every: terms of K after which the unit's sum is added to an fp32 accumulator; None: never.
    """

    unit: str = "fp32"
    fraction_bits: int | None = None
    group: int = 1
    promote_every: int | None = None


FP32 = Arithmetic()


@dataclass(frozen=True)
class Contract:
    """What a backend promises; what it leaves at None is unknown, and judged by a bound instead of by equality.

    Args:
        recipe: the declared roundings.
        arithmetic: of the GEMMs, or a function of the number of token-expert pairs of a call.
        deterministic: the same call gives the same bits again.
        batch_invariant: a token's result does not depend on the other tokens.
        graph_capturable: `apply` can be captured in a device graph.
        max_top_k, max_experts: largest sizes that the kernels take; None: no limit.
    """

    recipe: Recipe = Recipe()
    arithmetic: Arithmetic | Callable[[int], Arithmetic] | None = None
    deterministic: bool | None = None
    batch_invariant: bool | None = None
    graph_capturable: bool | None = None
    max_top_k: int | None = None
    max_experts: int | None = None

    def arithmetic_for(self, pairs: int) -> Arithmetic | None:
        """The declared arithmetic of a call with `pairs` token-expert pairs."""
        return self.arithmetic(pairs) if callable(self.arithmetic) else self.arithmetic
