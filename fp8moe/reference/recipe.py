"""The recipe oracle: the declared quantisation bit for bit, everything between the roundings in float64."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fp8moe.config import FusedMoEConfig
from fp8moe.experts import MoEWeights
from fp8moe.keys import GroupShape
from fp8moe.quant import FusedMoEQuantConfig
from fp8moe.recipe import FirstOutput, Recipe, Rounding
from fp8moe.reference.activation import Activation, activated, activation_of
from fp8moe.reference.closed import must_be_open
from fp8moe.reference.problem import MoEProblem, Pairs, chunk_elements
from fp8moe.reference.quantisation import group_amax, quantised, scale_of, spread
from fp8moe.reference.rounding import round_to, to_float32

WITNESS_MARGIN = 2.0**-5
"""A pair this close below a shared amax is kept beside the judged ones, since its errors may move that amax.

The largest relative error of an element that sets an amax is a few 2^-10 for a 14-bit accumulator."""
FIRST_GROUP = GroupShape(1, 128)
"""What shares a scale in a first GEMM's result that is kept in FP8."""


@dataclass(frozen=True, eq=False)
class RecipeTrace:
    """What a call comes to under a recipe, for T judged tokens, and what its error bound is computed from.

    Args:
        problem: the call.
        R: (T, H) float64, every declared rounding applied but the output's.
        smooth: (T, H) float64, the roundings of the second GEMM's result and of the running sum left out.
        pairs: of the judged tokens, sorted by expert, then those that witness a shared dynamic scale among them.
        first: (P, 2I or I), the first GEMM's result with bias, not rounded.
        intermediate: (P, I), what the second GEMM multiplies, dequantised.
        scale: (P, groups), its scales; (P, 1) ones where it is not quantised.
        second: (P, H), the second GEMM's result with bias, not rounded; zeros for witnesses.
        kept: bounds and bands computed from this trace, kept by whoever computes them.
    """

    problem: MoEProblem
    R: Tensor
    smooth: Tensor
    pairs: Pairs
    first: Tensor
    intermediate: Tensor
    scale: Tensor
    second: Tensor
    kept: dict[Any, Any] = field(default_factory=dict)

    @property
    def activation(self) -> Activation:
        return activation_of(self.problem.config.activation)


def recipe_moe(
    config: FusedMoEConfig,
    quant: FusedMoEQuantConfig,
    recipe: Recipe,
    weights: MoEWeights,
    hidden_states: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    *,
    expert_map: Tensor | None = None,
    apply_router_weight_on_input: bool = False,
    tokens: Tensor | None = None,
) -> RecipeTrace:
    """The declared MoE in high precision. Shapes as `FusedMoEPermuteExpertsUnpermute.apply`.

    Args:
        tokens: rows of `hidden_states` to judge, each once; None: all. Dynamic per-tensor scales are measured on all.

    Raises:
        ValueError: an unknown activation, or activations quantised at a granularity that no scheme has.
    """
    must_be_open("recipe_moe")
    if tokens is None:
        tokens = torch.arange(hidden_states.shape[0], device=hidden_states.device)
    problem = MoEProblem(
        config,
        quant,
        recipe,
        weights,
        hidden_states,
        topk_weights,
        topk_ids,
        expert_map,
        apply_router_weight_on_input,
        tokens.to(hidden_states.device),
    )
    shared = first_scale(problem)
    amax = _shared_amax(problem, shared) if shares_a_scale(problem) else None
    pairs = problem.all_pairs.take(_kept_pairs(problem, amax))
    first = _first_gemm(problem, pairs, shared)
    values = nominal_intermediate(problem, first)
    group = problem.activation_group(problem.quant.a2) if recipe.requantize else None
    if group is None:
        scale = torch.ones(len(pairs), 1, dtype=torch.float64, device=problem.device)
        intermediate = values
    else:
        scale = _second_scale(problem, pairs, values, group, amax)
        wide = spread(scale, group, values.shape[1])
        intermediate = quantised(values, wide, problem.fp8, recipe.of_intermediate, group)
    second = _second_gemm(problem, pairs, intermediate)
    smooth = combined(problem, pairs, second)
    roundings = (recipe.gemm2_output, recipe.weighted, recipe.combine)
    declared = smooth if set(roundings) == {"float32"} else combined(problem, pairs, second, *roundings)
    return RecipeTrace(problem, declared, smooth, pairs, first, intermediate, scale, second)


def first_input(problem: MoEProblem, pairs: Pairs, shared: Tensor | None = None) -> Tensor:
    """(P, H) float64: what the first GEMM multiplies for these pairs, quantised and dequantised.

    `shared` is the result of `first_scale`, for those who have it.
    """
    values = problem.inputs[pairs.row].double()
    group = problem.activation_group(problem.a1)
    if group is None:
        return values
    scale = input_scale(problem, pairs, shared)
    return quantised(values, spread(scale, group, values.shape[1]), problem.fp8, problem.recipe, group)


def input_scale(problem: MoEProblem, pairs: Pairs, shared: Tensor | None = None) -> Tensor:
    """(P, groups) float64: the scales of the first GEMM's inputs; ones where they are not quantised."""
    group = problem.activation_group(problem.a1)
    if group is None:
        return torch.ones(len(pairs), 1, dtype=torch.float64, device=problem.device)
    if group.is_per_tensor():
        shared = first_scale(problem) if shared is None else shared
        assert shared is not None
        return shared[pairs.expert, None]
    return scale_of(group_amax(problem.inputs[pairs.row].double(), group), problem.fp8, problem.recipe)


def nominal_intermediate(problem: MoEProblem, first: Tensor) -> Tensor:
    """(P, 2I or I) to (P, I) float64 holding float32 numbers, as they are quantised or enter the second GEMM."""
    recipe = problem.recipe
    values = activated(
        activation_of(problem.config.activation),
        _first_result(problem, first),
        lambda part: _rounded(problem, part, recipe.gate_output),
    )
    return to_float32(_rounded(problem, values, recipe.activation_output))


def keeps_float8(problem: MoEProblem) -> bool:
    """Whether the first GEMM's result is kept in FP8."""
    return problem.recipe.gemm1_output == "float8" and problem.quant.a2.dtype is not None


def first_scales(problem: MoEProblem, part: Tensor) -> Tensor:
    """(P, groups) float64: the scales of a gate's or an up's columns (P, I), float32 numbers, that are kept in FP8."""
    return scale_of(group_amax(part, FIRST_GROUP), problem.fp8, problem.recipe.of_intermediate)


def _first_result(problem: MoEProblem, first: Tensor) -> Tensor:
    """The first GEMM's result as the activation gets it."""
    recipe = problem.recipe
    if not keeps_float8(problem):
        return _rounded(problem, first, recipe.gemm1_output)
    kept = []
    for part in to_float32(first).chunk(problem.halves, dim=-1):
        scale = spread(first_scales(problem, part), FIRST_GROUP, part.shape[1])
        kept.append(quantised(part, scale, problem.fp8, recipe.of_intermediate, FIRST_GROUP))
    return torch.cat(kept, dim=-1)


def shares_a_scale(problem: MoEProblem) -> bool:
    """Whether pairs share a dynamic scale of the intermediate."""
    desc, group = problem.quant.a2, problem.activation_group(problem.quant.a2)
    return problem.recipe.requantize and group is not None and group.is_per_tensor() and not desc.static


def combined(
    problem: MoEProblem,
    pairs: Pairs,
    second: Tensor,
    gemm2_output: Rounding = "float32",
    weighted: Rounding = "float32",
    combine: Rounding = "float32",
) -> Tensor:
    """(P, H) to (T, H): weighted, added in the order of the slots, rounded as said."""
    total = second.new_zeros(problem.tokens.numel(), second.shape[1])
    for slot in range(problem.topk_ids.shape[1]):
        here = ((pairs.slot == slot) & (pairs.token >= 0)).nonzero()[:, 0]
        terms = pairs.weight[here, None] * _rounded(problem, second[here], gemm2_output)
        terms = _rounded(problem, terms, weighted)
        token = pairs.token[here]  # each at most once, since a token has one pair a slot
        total[token] = _rounded(problem, total[token] + terms, combine)
    return total


def _rounded(problem: MoEProblem, values: Tensor, where: FirstOutput) -> Tensor:
    """Rounded to the hidden states' dtype, through the float32 that a backend holds; or left as it is."""
    return round_to(to_float32(values), problem.carrier) if where == "input" else values


def first_scale(problem: MoEProblem) -> Tensor | None:
    """(E,) the scale of the first GEMM's inputs for each expert, where it is per tensor."""
    group = problem.activation_group(problem.a1)
    if group is None or not group.is_per_tensor():
        return None
    experts = problem.config.num_local_experts
    if problem.a1.static:
        assert problem.weights.a13_scale is not None
        return problem.weights.a13_scale.double().reshape(1).expand(experts)
    rows = problem.inputs.abs().amax(-1).double() if problem.inputs.numel() else problem.inputs.double().sum(-1)
    pairs = problem.all_pairs
    return scale_of(_by_scope(problem, rows, rows[pairs.row], pairs), problem.fp8, problem.recipe)


def _by_scope(problem: MoEProblem, everything: Tensor, per_pair: Tensor, pairs: Pairs) -> Tensor:
    """(E,) amaxes: of `everything`, or of each expert's own pairs."""
    experts = problem.config.num_local_experts
    zeros = torch.zeros(experts, dtype=torch.float64, device=problem.device)
    if problem.recipe.dynamic_tensor_scope == "expert":
        return zeros.scatter_reduce(0, pairs.expert, per_pair, "amax")
    return zeros + everything.amax() if everything.numel() else zeros


def _shared_amax(problem: MoEProblem, shared: Tensor | None) -> Tensor:
    """Largest magnitude of the intermediate of every pair of the call, in the order of `all_pairs`."""
    pairs = problem.all_pairs
    amax = torch.zeros(len(pairs), dtype=torch.float64, device=problem.device)
    step = max(chunk_elements(problem.device) // max(problem.weights.w13.shape[1:]), 1)
    for _, rows in pairs.segments():
        for start in range(rows.start, rows.stop, step):
            part = slice(start, min(start + step, rows.stop))
            index = torch.arange(part.start, part.stop, device=problem.device)
            first = _first_gemm(problem, pairs.take(index), shared)
            amax[part] = nominal_intermediate(problem, first).abs().amax(-1)
    return amax


def _kept_pairs(problem: MoEProblem, amax: Tensor | None) -> Tensor:
    """Places in `all_pairs` of the judged tokens' pairs, and of those that may set a shared amax."""
    pairs = problem.all_pairs
    keep = pairs.token >= 0
    if amax is not None:
        shared = _by_scope(problem, amax, amax, pairs)[pairs.expert]
        keep = keep | (amax >= shared * (1 - WITNESS_MARGIN))
    return keep.nonzero()[:, 0]


def _first_gemm(problem: MoEProblem, pairs: Pairs, shared: Tensor | None) -> Tensor:
    return _gemm(problem, "w13", pairs, first_input(problem, pairs, shared))


def _second_gemm(problem: MoEProblem, pairs: Pairs, intermediate: Tensor) -> Tensor:
    judged = pairs.token >= 0
    if bool(judged.all()):
        return _gemm(problem, "w2", pairs, intermediate)
    result = intermediate.new_zeros(len(pairs), problem.config.hidden_dim)
    result[judged] = _gemm(problem, "w2", pairs.take(judged.nonzero()[:, 0]), intermediate[judged])
    return result


def _gemm(problem: MoEProblem, name: str, pairs: Pairs, inputs: Tensor) -> Tensor:
    """Each pair's row times its expert's weight, and the bias: float64 (P, rows of the weight)."""
    result = inputs.new_empty(len(pairs), getattr(problem.weights, name).shape[1])
    for expert, rows in pairs.segments():
        bias = problem.bias(name, expert)
        for columns, weight in problem.weight_chunks(name, expert):
            product = inputs[rows] @ weight.t()
            result[rows, columns] = product if bias is None else product + bias[columns]
    return result


def _second_scale(problem: MoEProblem, pairs: Pairs, values: Tensor, group: GroupShape, amax: Tensor | None) -> Tensor:
    recipe = problem.recipe.of_intermediate
    if not group.is_per_tensor():
        return scale_of(group_amax(values, group), problem.fp8, recipe)
    if problem.quant.a2.static:
        assert problem.weights.a2_scale is not None
        return problem.weights.a2_scale.double().reshape(1, 1).expand(len(pairs), 1)
    assert amax is not None
    per_expert = scale_of(_by_scope(problem, amax, amax, problem.all_pairs), problem.fp8, recipe)
    return per_expert[pairs.expert, None]
