"""What a backend declares about its arithmetic: the recipe (what is rounded where) and the matrix unit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, TypeVar, get_args, get_origin, get_type_hints

T = TypeVar("T")
MOST_SHIFT = 126
"""Of a weight's exponent: fp32 has no smaller normal numbers."""
Rounding = Literal["float32", "input"]
"""Kept in fp32, or rounded to the dtype of the hidden states (bf16 or fp16)."""
FirstOutput = Literal["float32", "input", "float8"]
"""As `Rounding`, or kept as FP8 codes with scales."""
ScaleDivision = Literal["divide", "reciprocal", "inverse", "approximate_inverse"]
FACTORS = ("inverse", "approximate_inverse")
WeightForm = Literal["exact", "rounded_scales", "rounded", "requantised"]
REQUANTISED_FLOOR = 1e-4
"""Smallest amax of a group of weights that are quantised anew."""
KOrder = Literal["natural", "fours_halved"]
ORDERED = 32
"""Terms of K within which "fours_halved" changes the order."""


def _check_choices(declared: object) -> None:
    """
    Raises:
        ValueError: names a field whose value is none of those that its type allows.
    """
    for name, kind in get_type_hints(type(declared)).items():
        value = getattr(declared, name)
        if get_origin(kind) is Literal and value not in get_args(kind):
            raise ValueError(f"{name}={value!r}: expected one of {', '.join(map(repr, get_args(kind)))}")
        if kind is bool and not isinstance(value, bool):
            raise ValueError(f"{name}={value!r}: expected True or False")


@dataclass(frozen=True)
class Recipe:
    """The roundings of one MoE, in the order in which they happen; everything between them is judged as exact.

    Args:
        scale_rounding: dynamic scales as computed ("continuous"), or rounded up to a power of two, which is a normal
            number of fp32.
        scale_division: how a dynamic scale is made of an amax: IEEE division by the format's largest number, or
            multiplication by that number's fp32 reciprocal, such as fp32(1/448); or "inverse", the fp32 reciprocal of a
            factor, fp32(448 * fp32(1 / amax)), which then multiplies the values of a row's groups in the place of the
            scale's reciprocal; or "approximate_inverse", where the factor's 1 / amax is that of
            `fp8moe.approximate_reciprocal`.
        scaling: how a value meets its scale before the cast to FP8: IEEE division, or multiplication by the
            fp32 reciprocal 1/scale.
        amax_floor: smallest amax that a dynamic scale is computed from; a group of zeros gets floor/448.
        intermediate_amax_floor: that of the second GEMM's inputs, where it is another; None: the same.
        dynamic_tensor_scope: what shares a dynamic per-tensor scale: all tokens of the call ("batch"; for the
            second GEMM all token-expert pairs), or the tokens of one expert ("expert").
        quantize_input: whether the hidden states are quantised for the first GEMM as the activation key says; False,
            with `requantize`, for a backend whose weights alone are FP8.
        w13, w2: how these FP8 weights meet their scales: "exact", in fp32; with "rounded_scales", which are first
            rounded to the dtype of the hidden states; "rounded", where each weight times its rounded scale is
            rounded to that dtype as well, before the GEMM; or "requantised", where a layer's weights were quantised
            anew before its first call: each times its scale in fp32, divided by max(amax, 1e-4) / 448 of the same block
            (channel, tensor) rounded up to a power of two, and rounded to FP8. "exact" of these codes and scales.
        w13_shift, w2_shift: their codes enter the GEMM times 2^-n, and their scales the result times 2^n: a sum loses
            what lies below the smallest number of fp32, 2^-149, on that way.
        bias: "input" for GEMMs whose result is rounded before the bias is added.
        input_weights: "input" for routing weights that are rounded before hidden states are multiplied with them, where
            they are on the input; the product is rounded in any case.
        routing_weights: "input" for routing weights that are rounded before results are multiplied with them.
        gemm1_output: dtype of the first GEMM's result (bias included) before the activation; "float8" for FP8 codes
            with a dynamic scale for each 128 columns of the gate and of the up, made as those of the second GEMM's
            inputs are: it needs `requantize`, and means "float32" for layers whose activations are not quantised.
        gate_output: dtype of the gate's part of the activation before its product with the up's: of silu or gelu of the
            gate; of swigluoai's g sigmoid(1.702 g), where up + 1 stays in fp32; of swiglustep's silu, before or after
            its limit, which every format has. Nothing to an activation without a gate.
        activation_output: dtype of the activation's result before it is quantised again, or, where activations
            are not quantised, as it enters the second GEMM.
        requantize: whether the intermediate is quantised for the second GEMM as the activation key says.
        gemm2_output: dtype of one token-expert pair's result before the routing weight.
        weighted: dtype of that result times its routing weight, before it is added: "input" for a kernel that stores
            the product. With weights on the input the factor is 1, and the result is rounded all the same.
        combine: dtype of the running sum over a token's experts, in the order of the slots.

    Raises:
        ValueError: names the field.
    """

    scale_rounding: Literal["continuous", "power_of_two"] = "continuous"
    scale_division: ScaleDivision = "divide"
    scaling: Literal["divide", "reciprocal"] = "divide"
    amax_floor: float = 1e-10
    intermediate_amax_floor: float | None = None
    dynamic_tensor_scope: Literal["batch", "expert"] = "batch"
    quantize_input: bool = True
    w13: WeightForm = "exact"
    w2: WeightForm = "exact"
    w13_shift: int = 0
    w2_shift: int = 0
    bias: Rounding = "float32"
    input_weights: Rounding = "float32"
    routing_weights: Rounding = "float32"
    gemm1_output: FirstOutput = "float32"
    gate_output: Rounding = "float32"
    activation_output: Rounding = "float32"
    requantize: bool = True
    gemm2_output: Rounding = "float32"
    weighted: Rounding = "float32"
    combine: Rounding = "float32"

    def __post_init__(self) -> None:
        _check_choices(self)
        if not self.amax_floor >= 0:
            raise ValueError(f"amax_floor={self.amax_floor!r}: expected 0 or more")
        if self.intermediate_amax_floor is not None and not self.intermediate_amax_floor >= 0:
            raise ValueError(f"intermediate_amax_floor={self.intermediate_amax_floor!r}: expected None, 0 or more")
        if self.by_factor and (self.scaling, self.scale_rounding) != ("reciprocal", "continuous"):
            raise ValueError(
                f"scale_division={self.scale_division!r}: expected scaling='reciprocal' and scale_rounding='continuous'"
            )
        if self.gemm1_output == "float8" and not self.requantize:
            raise ValueError("gemm1_output='float8': expected requantize=True, since nothing else is kept in FP8 then")
        for name in ("w13_shift", "w2_shift"):
            shift = getattr(self, name)
            if not isinstance(shift, int) or not 0 <= shift <= MOST_SHIFT:
                raise ValueError(f"{name}={shift!r}: expected an integer from 0 to {MOST_SHIFT}")

    @property
    def of_intermediate(self) -> Recipe:
        """The same with the second GEMM's floor as its only one."""
        if self.intermediate_amax_floor is None:
            return self
        return replace(self, amax_floor=self.intermediate_amax_floor, intermediate_amax_floor=None)

    @property
    def by_factor(self) -> bool:
        """Whether a dynamic scale is the reciprocal of a factor."""
        return self.scale_division in FACTORS


@dataclass(frozen=True)
class Arithmetic:
    """How a GEMM accumulates. `Arithmetic.on(unit)` fills in what the table of units knows.

    Args:
        unit: "fp32" (any order, rounded to nearest), a matrix unit of `fp8moe.reference.units.UNITS` such as
            "hopper.wgmma", or "unknown".
        fraction_bits: bits kept below the largest exponent of a group when its terms are aligned; None for fp32.
        group: terms of K that one step of the unit adds.
        promote_every: terms of K after which the unit's sum is added to an fp32 accumulator; None: never.
        k_order: the order in which the kernel feeds K to the unit: "natural", or "fours_halved": within each 32 first
            the positions with k mod 4 in {0, 1}, then those in {2, 3}, which is what Triton makes of FP8 operands that
            it widens to fp16.

    Raises:
        ValueError: names the field; an unknown unit or order, numbers that are not the unit's, or a promotion that
            the unit cannot do.
    """

    unit: str = "fp32"
    fraction_bits: int | None = None
    group: int = 1
    promote_every: int | None = None
    k_order: KOrder = "natural"

    def __post_init__(self) -> None:
        _check_choices(self)
        if self.group < 1:
            raise ValueError(f"group={self.group}: expected at least 1")
        if self.promote_every is not None and (self.promote_every < 1 or self.promote_every % self.group):
            raise ValueError(
                f"promote_every={self.promote_every}: expected None or a multiple of group={self.group}, "
                "since a unit adds a whole group in one step"
            )
        if self.k_order == "fours_halved" and self.promote_every is not None and self.promote_every % ORDERED:
            raise ValueError(
                f"promote_every={self.promote_every}: expected None or a multiple of {ORDERED} with "
                f"k_order={self.k_order!r}, which goes by {ORDERED} of K"
            )
        if self.unit != "unknown":
            self._check_unit()

    def _check_unit(self) -> None:
        from fp8moe.reference.units import UNITS

        if self.unit not in UNITS:
            raise ValueError(f"unit={self.unit!r}: expected one of {', '.join(UNITS)}, or 'unknown'")
        known = UNITS[self.unit]
        for name in ("fraction_bits", "group"):
            if getattr(self, name) != getattr(known, name):
                raise ValueError(
                    f"{name}={getattr(self, name)}: expected {getattr(known, name)}, since unit={self.unit!r}; "
                    "Arithmetic.on() fills it in"
                )

    @classmethod
    def on(cls, unit: str, *, promote_every: int | None = None, k_order: KOrder = "natural") -> Arithmetic:
        """The arithmetic of a unit of `fp8moe.reference.units.UNITS`.

        Raises:
            ValueError: there is none of that name, or as the class.
        """
        from fp8moe.reference.units import UNITS

        if unit not in UNITS:
            raise ValueError(f"unit={unit!r}: expected one of {', '.join(UNITS)}")
        return cls(unit, UNITS[unit].fraction_bits, UNITS[unit].group, promote_every, k_order)


FP32 = Arithmetic()


@dataclass(frozen=True)
class Steps:
    """What happens around the matrix unit, to the bit: every step in fp32, rounded to nearest, ties to even.

    Args:
        scale_order: how a sum c of the unit meets the scales of activations and of weights. "activation_first":
            fp32(c * s_a), then times s_w; "weights_first": the other way round; "product": c times fp32(s_a * s_w).
            Block scales are applied to the sum over each block of K, others once, to the sum over all of K.
        scale_fma: whether, with block scales, the last product and its addition to the running sum are one fused
            multiply-add, or two roundings.
        activation: "portable": the exponential, the error function and the divisions of `fp8moe.kernels.activation`.
        combine: "slot_fma": from zero, in the order of the slots, fma(routing weight, result, total); "slot_sum": the
            product is rounded before it is added.

    Raises:
        ValueError: names the field.
    """

    scale_order: Literal["activation_first", "weights_first", "product"] = "activation_first"
    scale_fma: bool = True
    activation: Literal["portable"] = "portable"
    combine: Literal["slot_fma", "slot_sum"] = "slot_fma"

    def __post_init__(self) -> None:
        _check_choices(self)


@dataclass(frozen=True)
class Contract:
    """What a backend promises; what it leaves at None is unknown, and judged by a bound instead of by equality.

    Args:
        recipe: the declared roundings.
        arithmetic: of the GEMMs, or a function of the number of token-expert pairs of a call (absent ones included).
        steps: what happens around the GEMMs, to the bit, or a function of that number; with `arithmetic` it makes a
            replay possible.
        deterministic: the same call gives the same bits again.
        batch_invariant: a token's result does not depend on the other tokens.
        graph_capturable: `apply` can be captured in a device graph.
        max_top_k, max_experts: largest sizes that the kernels take; None: no limit.
        fewer: (tokens, contract): what holds instead for calls of fewer tokens than that, where another kernel runs.

    Raises:
        ValueError: names the field.
    """

    recipe: Recipe = Recipe()
    arithmetic: Arithmetic | Callable[[int], Arithmetic] | None = None
    steps: Steps | Callable[[int], Steps | None] | None = None
    deterministic: bool | None = None
    batch_invariant: bool | None = None
    graph_capturable: bool | None = None
    max_top_k: int | None = None
    max_experts: int | None = None
    fewer: tuple[int, Contract] | None = None

    def __post_init__(self) -> None:
        if self.fewer is not None:
            tokens, contract = self.fewer
            if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1:
                raise ValueError(f"fewer={tokens!r} tokens: expected an integer of at least 1")
            if not isinstance(contract, Contract) or contract.fewer is not None:
                raise ValueError(f"fewer={contract!r}: expected a Contract that has no `fewer` of its own")
        if not isinstance(self.recipe, Recipe):
            raise ValueError(f"recipe={self.recipe!r}: expected a fp8moe.recipe.Recipe")
        if not (self.steps is None or isinstance(self.steps, Steps) or callable(self.steps)):
            raise ValueError(f"steps={self.steps!r}: expected a fp8moe.recipe.Steps, or a function that gives one")
        if not (self.arithmetic is None or isinstance(self.arithmetic, Arithmetic) or callable(self.arithmetic)):
            raise ValueError(f"arithmetic={self.arithmetic!r}: expected an Arithmetic, or a function that gives one")
        for name in ("max_top_k", "max_experts"):
            limit = getattr(self, name)
            if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
                raise ValueError(f"{name}={limit!r}: expected None or an integer of at least 1")

    def for_tokens(self, tokens: int) -> Contract:
        """What holds for a call of so many tokens."""
        if self.fewer is None:
            return self
        return self.fewer[1] if tokens < self.fewer[0] else replace(self, fewer=None)

    def arithmetic_for(self, pairs: int) -> Arithmetic | None:
        """The declared arithmetic of a call with `pairs` token-expert pairs.

        Raises:
            TypeError: the declared function gives something else.
        """
        return _given("arithmetic", self.arithmetic, Arithmetic, pairs)

    def steps_for(self, pairs: int) -> Steps | None:
        """The declared steps of a call with `pairs` token-expert pairs.

        Raises:
            TypeError: the declared function gives something else.
        """
        return _given("steps", self.steps, Steps, pairs)


def _given(name: str, declared: T | Callable[[int], T | None] | None, kind: type[T], pairs: int) -> T | None:
    found = declared(pairs) if callable(declared) else declared
    if not (found is None or isinstance(found, kind)):
        raise TypeError(
            f"{name}: a function that gives a {type(found).__name__}: expected a fp8moe.recipe.{kind.__name__}"
        )
    return found
