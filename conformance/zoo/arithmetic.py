"""Faults of arithmetic: sums over K, the sum over experts, roundings that are not declared, gains."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from conformance.cases import Case
from conformance.zoo.activations import ACTIVATIONS
from conformance.zoo.around import _weights as weights
from conformance.zoo.inside import _computes as computes
from conformance.zoo.limits import LIMITS
from conformance.zoo.ordered import Ordered
from conformance.zoo.override import overriding
from conformance.zoo.plant import ExpertsClass, Fault
from conformance.zoo.quantisation import Members, declaring
from fp8moe.dispatch import combine, local_ids
from fp8moe.experts import MoEWeights

SMALL = Case(tokens=17)
EDGES = Case(tokens=17, hidden=272, inter=200)
LONG = Case(tokens=17, experts=2, hidden=2048, inter=128)
SIGNIFICANT_14 = -1024
"""Mask of the bits of fp32 that 14 significant ones need."""
TILE = 32

# -- sums over K --


def multiplies(product: Callable[[Any, Tensor, Tensor], Tensor]) -> Members:
    """Both GEMMs of the mutant are `product` of (P, K) and (N, K), dequantised, in fp32."""
    stages = {"first_gemm": Ordered.first_gemm, "second_gemm": Ordered.second_gemm}
    return lambda _: {"product": product, **stages}


def _accumulates(step: int, rounded: Callable[[Tensor], Tensor]) -> Members:
    """The running sum is rounded after every `step` terms of K."""

    def product(self: Any, a: Tensor, weight: Tensor) -> Tensor:
        total = a.new_zeros(a.shape[0], weight.shape[0])
        for left, right in zip(torch.split(a, step, 1), torch.split(weight, step, 1), strict=True):
            total = rounded(total + left @ right.t())
        return total

    return multiplies(product)


def _partials(step: int) -> Members:
    """Sums over every `step` terms of K are rounded to bf16 before they are added."""

    def product(self: Any, a: Tensor, weight: Tensor) -> Tensor:
        pairs = zip(torch.split(a, step, 1), torch.split(weight, step, 1), strict=True)
        return torch.stack([(left @ right.t()).bfloat16().float() for left, right in pairs]).sum(0)

    return multiplies(product)


def _to_14_bits(total: Tensor) -> Tensor:
    return (total.view(torch.int32) & SIGNIFICANT_14).view(torch.float32)


def _to_tf32(values: Tensor) -> Tensor:
    """To 11 significant bits, ties away."""
    return (values.contiguous().view(torch.int32) + (1 << 12) & -(1 << 13)).view(torch.float32)


def _without(last: int) -> Members:
    return multiplies(lambda self, a, weight: a[:, :-last] @ weight[:, :-last].t())


def _whole_tiles(self: Any, a: Tensor, weight: Tensor) -> Tensor:
    kept = max(a.shape[1] // 64, 1) * 64
    return a[:, :kept] @ weight[:, :kept].t()


def _first_tile_twice(self: Any, a: Tensor, weight: Tensor) -> Tensor:
    return a @ weight.t() + a[:, :TILE] @ weight[:, :TILE].t()


def _shuffled(self: Any, a: Tensor, weight: Tensor) -> Tensor:
    """Positions 2 and 3 of each four change places with 4 and 5 of each eight, on one side alone."""
    order = torch.arange(a.shape[1], device=a.device)
    middle = (order % 8 // 2 == 1).long() - (order % 8 // 2 == 2).long()
    return a[:, order + 2 * middle] @ weight.t()


# -- the sum over experts --


def weighs(changed: Callable[[Tensor], Tensor]) -> Members:
    """The combine takes other weights."""

    def members(base: Any) -> dict[str, Any]:
        def combined(self: Any, slots: Tensor, weights: Tensor, present: Tensor) -> Tensor:
            found: Tensor = base.combine(self, slots, changed(weights), present)
            return found

        return {"combine": combined}

    return members


@overriding("combine", "the sum over experts runs in fp16, whatever the layer's dtype", subtle=True, witness=SMALL)
def sum_in_fp16(right: Any, self: Any, slots: Tensor, weights: Tensor, present: Tensor) -> Any:
    return combine(slots, weights, present, torch.float16, True).to(self.config.in_dtype)


def _weighted_early(stage: str, before: bool) -> Members:
    """The routing weight multiplies what goes into a stage, or what comes out of it, instead of the result."""

    def members(base: Any) -> dict[str, Any]:
        def apply(self: Any, hidden: Tensor, weights: Tensor, ids: Tensor, **options: Any) -> Tensor:
            local = local_ids(ids, options["expert_map"], self.config.num_local_experts).reshape(-1)
            order = torch.argsort(local, stable=True)
            self.of_pairs = weights.reshape(-1)[order[local[order] >= 0], None]
            if options["apply_router_weight_on_input"]:
                self.of_pairs = torch.ones_like(self.of_pairs)
            else:
                weights = torch.ones_like(weights)
            found: Tensor = base.apply(self, hidden, weights, ids, **options)
            return found

        def early(self: Any, values: Tensor, *rest: Any) -> Tensor:
            found: Tensor = getattr(base, stage)(self, values * self.of_pairs if before else values, *rest)
            return found if before else found * self.of_pairs

        return {"apply": apply, stage: early}

    return members


# -- gains, and single numbers --


@overriding(
    "second_gemm", "one expert's results are 0.2% too large: an alpha folded in twice", subtle=True, witness=SMALL
)
def one_expert_gains(right: Any, self: Any, intermediate: Tensor, index: int) -> Any:
    return right(self, intermediate, index) * (1.002 if index == 0 else 1.0)


def _one_code_off(given: MoEWeights) -> MoEWeights:
    """The neighbour of smaller magnitude; of 0 the smallest number."""
    w13 = given.w13.clone()
    code = w13.view(torch.uint8 if w13.element_size() == 1 else torch.int16)
    zero = given.w13[0, 0, 1].float() == 0
    code[0, 0, 1] += 1 if zero else -1
    return replace(given, w13=w13)


def _undeclared(**fields: Any) -> Members:
    return computes(lambda recipe: replace(recipe, **fields))


def _declared_only(base: ExpertsClass) -> dict[str, Any]:
    """A bf16 intermediate is declared, and never rounded."""
    plain = base.contract.recipe
    return declaring(lambda _: {"recipe": property(lambda self: plain)}, activation_output="input")(base)


@overriding(
    "apply_batched",
    "results go back in 16 bits, as dispatchers send them, and fp32 is declared",
    subtle=True,
    witness=SMALL,
    format="Batched",
)
def results_sent_in_16_bits(right: Any, self: Any, hidden_states: Tensor, expert_num_tokens: Tensor) -> Any:
    return right(self, hidden_states, expert_num_tokens).to(hidden_states.dtype).float()


NUMERICS = (
    *ACTIVATIONS,
    *LIMITS,
    Fault(
        "partials_of_14_bits",
        "fp22-partials",
        "sums over all of K keep 14 bits, as Hopper's FP8 unit does that is never promoted, and fp32 is declared",
        True,
        _accumulates(TILE, _to_14_bits),
        SMALL,
    ),
    Fault(
        "accumulator_in_fp16",
        "",
        "the sum over K is kept in fp16, an option of mma.sync for consumer cards",
        True,
        _accumulates(16, lambda total: total.half().float()),
        SMALL,
    ),
    Fault(
        "promoted_in_bf16",
        "",
        "sums of 128 terms are rounded to bf16 when they are promoted: an accumulator of the output's type",
        True,
        _partials(128),
        SMALL,
    ),
    Fault(
        "split_k_in_bf16", "", "the parts of a split K are written in the output's dtype", True, _partials(1024), LONG
    ),
    Fault("last_term_lost", "", "the last term of K is lost: a bound with < for <=", True, _without(1), SMALL),
    Fault(
        "partial_tile_lost",
        "",
        "of K only whole tiles of 64 are added: a loop bound divided, not rounded up",
        True,
        multiplies(_whole_tiles),
        EDGES,
    ),
    Fault(
        "first_tile_twice",
        "",
        "the first 32 terms of K count twice: a prologue that the loop repeats",
        False,
        multiplies(_first_tile_twice),
        SMALL,
    ),
    Fault(
        "k_shuffled_on_one_side",
        "",
        "K is permuted for a unit's lanes in the activations, not in the weights",
        False,
        multiplies(_shuffled),
        SMALL,
    ),
    Fault(
        "operands_in_tf32",
        "",
        "dequantised operands meet in TF32, torch's own when it is allowed",
        True,
        multiplies(lambda self, a, w: _to_tf32(a) @ _to_tf32(w).t()),
        SMALL,
    ),
    Fault(
        "weights_dequantised_to_bf16",
        "",
        "weights are dequantised to bf16 with their scale in it",
        True,
        multiplies(lambda self, a, w: a @ w.bfloat16().float().t()),
        SMALL,
    ),
    Fault(
        "first_result_in_bf16",
        "",
        "the first GEMM's result is rounded to 16 bits, undeclared: an activation kernel of its own",
        True,
        _undeclared(gemm1_output="input"),
        SMALL,
    ),
    Fault(
        "gate_in_bf16",
        "",
        "the gate's part is rounded to 16 bits before its product with the up, undeclared: any activation's template",
        True,
        _undeclared(gate_output="input"),
        SMALL,
    ),
    Fault(
        "gate_in_bf16_as_well",
        "",
        "the activation's 16 bits on both sides are declared, and the gate's part, rounded before the product, is not",
        True,
        declaring(_undeclared(gate_output="input"), gemm1_output="input", activation_output="input"),
        SMALL,
    ),
    Fault(
        "intermediate_in_bf16",
        "",
        "the intermediate is rounded to 16 bits, undeclared: a quantiser of its own",
        True,
        _undeclared(activation_output="input"),
        SMALL,
    ),
    Fault(
        "declared_bf16_not_rounded",
        "",
        "an intermediate of 16 bits is declared, and kept in fp32 by a fused kernel",
        True,
        _declared_only,
        SMALL,
    ),
    Fault(
        "running_sum_in_bf16",
        "",
        "the sum over experts is rounded to 16 bits after each, undeclared: in-place index_add",
        True,
        _undeclared(combine="input"),
        replace(SMALL, top_k=4),
    ),
    Fault(
        "combine_weights_squared",
        "",
        "a routing weight counts twice: fused into the GEMM, and applied by the combine",
        False,
        weighs(torch.square),
        SMALL,
    ),
    Fault(
        "combine_weights_in_fp16",
        "",
        "routing weights are rounded to fp16, in a payload that is sent with the tokens",
        True,
        weighs(lambda weights: weights.half().float()),
        SMALL,
    ),
    Fault(
        "weighted_before_activation",
        "",
        "the routing weight multiplies the first GEMM's result: a flag for the wrong one of two launches",
        False,
        _weighted_early("activation", True),
        SMALL,
    ),
    Fault(
        "weighted_before_quantisation",
        "",
        "the routing weight is folded into the activation, before the second quantisation: a fused kernel's saving",
        True,
        _weighted_early("activation", False),
        replace(SMALL, bias=True),
    ),
    Fault(
        "gain_one_in_a_thousand",
        "",
        "the result is 0.1% too large (made up, to find the limit)",
        True,
        weighs(lambda weights: weights * 1.001),
        SMALL,
    ),
    Fault(
        "one_code_off",
        "",
        "one weight's code in one expert is its neighbour: a repacking's rounding",
        True,
        weights(_one_code_off),
        SMALL,
    ),
    sum_in_fp16,
    one_expert_gains,
    results_sent_in_16_bits,
)
