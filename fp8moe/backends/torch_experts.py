"""TorchExperts: a plain, honest MoE in PyTorch, for every recipe, scheme, activation and format.

It is in no selection list. It is what a vendor subclasses for a first experiment, and what mutants are made of:
each stage is a method of its own.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fp8moe.activations import activate
from fp8moe.config import FusedMoEActivationFormat, FusedMoEConfig
from fp8moe.dispatch import combine, local_ids, weighted_input
from fp8moe.experts import FusedMoEPermuteExpertsUnpermute, MoEWeights
from fp8moe.keys import GroupShape
from fp8moe.quant import FusedMoEQuantConfig, FusedMoEQuantDesc
from fp8moe.recipe import FP32, REQUANTISED_FLOOR, Contract, Recipe
from fp8moe.registry import LayerNotSupported
from fp8moe.scaling import FP8_FORMATS, dequantize, group_amax, quantize, scale_from_amax


class TorchExperts(FusedMoEPermuteExpertsUnpermute):
    """fp32 matrix products of dequantised operands, expert by expert; runs on any device, slowly.

    Recipes: `TorchExperts.with_recipe(Recipe(...))` gives a class that computes, and declares, another one.
    Arguments, shapes and errors: the base class.

    Raises:
        LayerNotSupported: a quantisation other than FP8.
    """

    contract = Contract(recipe=Recipe(), arithmetic=FP32, deterministic=True)

    def __init__(self, config: FusedMoEConfig, quant: FusedMoEQuantConfig, weights: MoEWeights) -> None:
        for name in ("w1", "a1"):
            dtype = getattr(quant, name).dtype
            if dtype is not None and dtype not in FP8_FORMATS:
                raise LayerNotSupported(f"{type(self).__name__}: quant.{name}.dtype={dtype}: only FP8 is there")
        super().__init__(config, quant, weights)
        self.halves = 2 if config.is_act_and_mul else 1
        self.fp8_dtype = weights.w13.dtype if weights.w13.dtype in FP8_FORMATS else torch.float8_e4m3fn

    @classmethod
    def with_recipe(cls, recipe: Recipe) -> type[TorchExperts]:
        """The same computation with other roundings, declared as such."""
        return type(cls.__name__, (cls,), {"contract": replace(cls.contract, recipe=recipe)})

    @staticmethod
    def activation_format() -> FusedMoEActivationFormat:
        return FusedMoEActivationFormat.Standard

    @property
    def recipe(self) -> Recipe:
        return self.contract.recipe

    def apply(
        self,
        hidden_states: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        *,
        expert_map: Tensor | None = None,
        apply_router_weight_on_input: bool = False,
        output: Tensor | None = None,
    ) -> Tensor:
        self.check_call(
            hidden_states,
            topk_weights,
            topk_ids,
            expert_map=expert_map,
            apply_router_weight_on_input=apply_router_weight_on_input,
            output=output,
        )
        tokens, top_k = topk_ids.shape
        local = local_ids(topk_ids, expert_map, self.config.num_local_experts)
        weights = topk_weights
        if apply_router_weight_on_input:
            given = self.rounded(topk_weights, self.recipe.input_weights)
            hidden_states, weights = weighted_input(hidden_states, given), torch.ones_like(topk_weights)
        flat = local.reshape(-1)
        order = torch.argsort(flat, stable=True)
        pairs = order[flat[order] >= 0]  # pairs with a local expert, expert by expert
        results = self.experts(hidden_states, pairs // max(top_k, 1), flat[pairs])
        slots = torch.zeros(tokens * top_k, self.config.hidden_dim, dtype=torch.float32, device=flat.device)
        slots[pairs] = results
        total = self.combine(slots.view(tokens, top_k, self.config.hidden_dim), weights, local >= 0)
        if output is None:
            return total
        output.copy_(total)
        return output

    # -- the stages; a mutant overrides one --

    def experts(self, tokens: Tensor, source: Tensor, expert: Tensor) -> Tensor:
        """Both GEMMs for pairs sorted by expert: pair p is token `source[p]` on local expert `expert[p]`.

        Args:
            tokens: (M, H); source, expert: (P,).

        Returns:
            (P, H) fp32.
        """
        scope = expert if self.recipe.dynamic_tensor_scope == "expert" else None
        if scope is not None:
            tokens, source = tokens[source], torch.arange(source.numel(), device=source.device)
        inputs = self.quantize_input(tokens, scope)
        gate_up = torch.cat(
            [self.first_gemm(inputs[source[rows]], index) for index, rows in _segments(expert)]
            or [inputs.new_zeros(0, self.weights.w13.shape[1])]
        )
        intermediate = self.requantize(self.activation(self.first_result(gate_up)), expert)
        return torch.cat(
            [self.second_gemm(intermediate[rows], index) for index, rows in _segments(expert)]
            or [inputs.new_zeros(0, self.config.hidden_dim)]
        )

    def quantize_input(self, tokens: Tensor, expert: Tensor | None) -> Tensor:
        """(M, H) to what the first GEMM multiplies, dequantised, fp32."""
        if not self.recipe.quantize_input:
            return tokens.float()
        return self.through_fp8(tokens, self.quant.a1, self.weights.a13_scale, expert)

    def first_gemm(self, inputs: Tensor, index: int) -> Tensor:
        """(m, H) fp32 times expert `index` of w13: (m, 2I or I), rounded as the recipe says."""
        result = inputs @ self.weight("w13", index).t()
        if self.weights.w13_bias is not None:
            result = self.rounded(result, self.recipe.bias) + self.weights.w13_bias[index].float()
        return self.rounded(result, self.recipe.gemm1_output)

    def first_result(self, gate_up: Tensor) -> Tensor:
        """(P, 2I or I) as it is kept until the activation: in FP8, each half by itself, where the recipe says so."""
        if self.recipe.gemm1_output != "float8" or self.quant.a2.dtype is None:
            return gate_up
        by_128 = FusedMoEQuantDesc(self.fp8_dtype, GroupShape(1, 128), static=False)
        floor = self.recipe.of_intermediate.amax_floor
        parts = [part.contiguous() for part in gate_up.chunk(self.halves, dim=-1)]
        return torch.cat([self.through_fp8(part, by_128, None, None, amax_floor=floor) for part in parts], dim=-1)

    def activation(self, gate_up: Tensor) -> Tensor:
        """(P, 2I or I) to (P, I)."""
        gate_dtype = self.config.in_dtype if self.recipe.gate_output == "input" else None
        return self.rounded(activate(self.config.activation, gate_up, gate_dtype), self.recipe.activation_output)

    def requantize(self, intermediate: Tensor, expert: Tensor) -> Tensor:
        """(P, I) to what the second GEMM multiplies, dequantised, fp32."""
        if not self.recipe.requantize:
            return intermediate
        scope = expert if self.recipe.dynamic_tensor_scope == "expert" else None
        given = (intermediate, self.quant.a2, self.weights.a2_scale, scope)
        if self.recipe.intermediate_amax_floor is None:
            return self.through_fp8(*given)
        return self.through_fp8(*given, amax_floor=self.recipe.intermediate_amax_floor)

    def second_gemm(self, intermediate: Tensor, index: int) -> Tensor:
        """(m, I) fp32 times expert `index` of w2: (m, H), rounded as the recipe says."""
        result = intermediate @ self.weight("w2", index).t()
        if self.weights.w2_bias is not None:
            result = self.rounded(result, self.recipe.bias) + self.weights.w2_bias[index].float()
        return self.rounded(result, self.recipe.gemm2_output)

    def combine(self, slots: Tensor, weights: Tensor, present: Tensor) -> Tensor:
        """(M, k, H) to (M, H) in the layer's dtype."""
        roundings = (self.recipe.combine == "input", self.recipe.weighted == "input")
        weights = self.rounded(weights, self.recipe.routing_weights)
        return combine(slots, weights, present, self.config.in_dtype, *roundings)

    # -- what the stages share --

    def weight(self, name: str, index: int) -> Tensor:
        """One expert's matrix of w13 or w2, dequantised, fp32."""
        codes: Tensor = getattr(self.weights, name)[index]
        scale: Tensor | None = getattr(self.weights, f"{name}_scale")
        if scale is None:
            return codes.float()
        form = getattr(self.recipe, name)
        if form in ("rounded_scales", "rounded"):
            scale = self.rounded(scale, "input")
        group = self.quant.w1.shape or GroupShape.PER_TENSOR
        parts = self.halves if name == "w13" and group.is_block() else 1  # w13's halves are blocked apart
        pairs = [(codes, scale[index])]
        if parts > 1:
            pairs = list(zip(codes.chunk(parts), scale[index].chunk(parts), strict=True))
        found = [dequantize(*pair, group) for pair in pairs]
        if form == "requantised":
            found = [dequantize(*self.requantised(part, group), group) for part in found]
        whole = found[0] if parts == 1 else torch.cat(found)
        return self.rounded(whole, "input") if form == "rounded" else whole

    def requantised(self, values: Tensor, group: GroupShape) -> tuple[Tensor, Tensor]:
        """One expert's weights, or a half of them, in fp32, to codes and scales that are powers of two."""
        how: dict[str, Any] = {"scale_rounding": "power_of_two", "amax_floor": REQUANTISED_FLOOR}
        return quantize(values, group, dtype=self.fp8_dtype, **how)

    def through_fp8(
        self,
        values: Tensor,
        desc: FusedMoEQuantDesc,
        static: Tensor | None,
        expert: Tensor | None,
        *,
        amax_floor: float | None = None,
    ) -> Tensor:
        """Quantised and dequantised as `desc` says, fp32; `expert` gives each row's expert where that is the scope, and
        `amax_floor` another floor than the recipe's first."""
        if desc.dtype is None:
            return values.float()
        group = desc.shape or GroupShape.PER_TENSOR
        recipe = self.recipe
        amax_floor = recipe.amax_floor if amax_floor is None else amax_floor
        scale = static
        if not desc.static and group.is_per_tensor() and expert is not None:
            group = GroupShape.PER_TOKEN
            amax = group_amax(values, group)
            largest = amax.new_zeros(self.config.num_local_experts).scatter_reduce(0, expert, amax[:, 0], "amax")
            scale = scale_from_amax(
                largest[expert, None],
                self.fp8_dtype,
                scale_rounding=recipe.scale_rounding,
                scale_division=recipe.scale_division,
                amax_floor=amax_floor,
            )
        codes, scale = quantize(
            values,
            group,
            scale,
            dtype=self.fp8_dtype,
            scale_rounding=recipe.scale_rounding,
            scale_division=recipe.scale_division,
            scaling=recipe.scaling,
            amax_floor=amax_floor,
        )
        return dequantize(codes, scale, group)

    def rounded(self, values: Tensor, where: str) -> Tensor:
        """fp32 as it is, or rounded to the layer's 16-bit dtype."""
        return values.to(self.config.in_dtype).float() if where == "input" else values


class BatchedTorchExperts(TorchExperts):
    """The same over experts' batches; a dynamic per-tensor scale is one expert's, since its batch is a tensor."""

    contract = replace(TorchExperts.contract, recipe=Recipe(dynamic_tensor_scope="expert"))
    apply = FusedMoEPermuteExpertsUnpermute.apply  # dispatches to apply_batched

    @classmethod
    def with_recipe(cls, recipe: Recipe) -> type[TorchExperts]:
        """Another recipe; a dynamic per-tensor scale stays one expert's, since the batches lack the tokens of none."""
        return super().with_recipe(replace(recipe, dynamic_tensor_scope="expert"))

    @staticmethod
    def activation_format() -> FusedMoEActivationFormat:
        return FusedMoEActivationFormat.BatchedExperts

    def apply_batched(self, hidden_states: Tensor, expert_num_tokens: Tensor) -> Tensor:
        experts, longest, hidden = hidden_states.shape
        valid = torch.arange(longest, device=hidden_states.device) < expert_num_tokens[:, None]
        expert = torch.arange(experts, device=hidden_states.device)[:, None].expand(experts, longest)[valid]
        results = hidden_states.new_zeros(experts, longest, hidden, dtype=torch.float32)
        rows = torch.arange(expert.numel(), device=hidden_states.device)
        results[valid] = self.experts(hidden_states[valid], rows, expert)
        return results


def _segments(expert: Tensor) -> list[tuple[int, slice]]:
    """Runs of equal values in a sorted vector: (value, rows)."""
    values, counts = torch.unique_consecutive(expert, return_counts=True)
    segments, start = [], 0
    for value, count in zip(values.tolist(), counts.tolist(), strict=True):
        segments.append((value, slice(start, start + count)))
        start += count
    return segments
