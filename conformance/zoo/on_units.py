"""Honest backends on matrix units: both GEMMs as a unit of `fp8moe.reference.units` computes them, bit by bit."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from fp8moe.backends.torch_experts import TorchExperts
from fp8moe.config import FusedMoEConfig
from fp8moe.experts import MoEWeights
from fp8moe.keys import GroupShape
from fp8moe.quant import FusedMoEQuantConfig, FusedMoEQuantDesc
from fp8moe.recipe import Arithmetic, Recipe
from fp8moe.reference.units import UNITS, promoted
from fp8moe.scaling import dequantize, quantize

BLOCK = 128


class OnUnit(TorchExperts):
    """Both GEMMs through a matrix unit, bit by bit; slow.

    Block scales, and groups of activations, meet the unit's sum over each 128 of K; others the sum over all of K.
    Operands that the unit of FP8 does not take go through the 16-bit one; declared, as is everything else.
    """

    fp8_unit: ClassVar[str]
    wide_unit: ClassVar[str]
    promote_every: ClassVar[int | None] = BLOCK
    own_recipe: ClassVar[Recipe] = Recipe()

    def __init__(self, config: FusedMoEConfig, quant: FusedMoEQuantConfig, weights: MoEWeights) -> None:
        super().__init__(config, quant, weights)
        fits = quant.a1.dtype is not None and UNITS[self.fp8_unit].takes(weights.w13.dtype)
        self.unit = self.fp8_unit if fits else self.wide_unit
        groups = [desc.shape for desc in (quant.a1, quant.w1) if desc.dtype is not None and desc.shape is not None]
        self.by_block = any(group.is_block() or group.is_per_group() for group in groups)
        every = BLOCK if self.by_block else self.promote_every
        recipe = self.own_recipe
        if quant.a2.dtype is None:  # a unit takes no fp32
            recipe = replace(recipe, activation_output="input")
        arithmetic = Arithmetic.on(self.unit, promote_every=every)
        self.contract = replace(type(self).contract, recipe=recipe, arithmetic=arithmetic)
        self.operands = {name: self._operand(name) for name in ("w13", "w2")}

    def experts(self, tokens: Tensor, source: Tensor, expert: Tensor) -> Tensor:
        codes, scale = self.codes(tokens, self.quant.a1, self.weights.a13_scale, self.recipe.amax_floor)
        first = self._gemm("w13", codes[source], None if scale is None else scale[source], expert)
        values = self.activation(self.rounded(first, self.recipe.gemm1_output))
        codes, scale = self.codes(values, self.quant.a2, self.weights.a2_scale, self.recipe.of_intermediate.amax_floor)
        return self.rounded(self._gemm("w2", codes, scale, expert), self.recipe.gemm2_output)

    def codes(
        self, values: Tensor, desc: FusedMoEQuantDesc, static: Tensor | None, amax_floor: float
    ) -> tuple[Tensor, Tensor | None]:
        """What the unit multiplies, and (rows, groups) scales; None where there are none."""
        if desc.dtype is None:
            return values.to(self.config.in_dtype), None
        group, recipe = desc.shape or GroupShape.PER_TENSOR, self.recipe
        codes, scale = quantize(
            values,
            group,
            static,
            dtype=self.fp8_dtype,
            scale_rounding=recipe.scale_rounding,
            scale_division=recipe.scale_division,
            scaling=recipe.scaling,
            amax_floor=amax_floor,
        )
        return codes, scale.reshape(-1, scale.shape[-1] if scale.dim() else 1).expand(len(values), -1)

    def _operand(self, name: str) -> tuple[Tensor, Tensor | None]:
        """w13 or w2 and its scales, as they enter the GEMM."""
        codes, scale = getattr(self.weights, name), getattr(self.weights, f"{name}_scale")
        if scale is None or getattr(self.recipe, name) != "requantised":
            return codes, scale
        group = self.quant.w1.shape or GroupShape.PER_TENSOR
        parts = self.halves if name == "w13" and group.is_block() else 1
        found, scales = torch.empty_like(codes), torch.empty_like(scale)
        for index, (matrix, own) in enumerate(zip(codes, scale, strict=True)):
            halves = zip(matrix.chunk(parts), own.chunk(parts) if parts > 1 else [own], strict=True)
            new = [self.requantised(dequantize(*half, group), group) for half in halves]
            found[index] = torch.cat([part for part, _ in new])
            scales[index] = torch.cat([powers for _, powers in new]).view(own.shape)
        return found, scales

    def _gemm(self, name: str, codes: Tensor, scale: Tensor | None, expert: Tensor) -> Tensor:
        weight, _ = self.operands[name]
        bias: Tensor | None = getattr(self.weights, f"{name}_bias")
        result = torch.zeros(len(codes), weight.shape[1], device=codes.device)
        for index in torch.unique(expert).tolist():
            here = expert == index
            total = self._product(name, codes[here], None if scale is None else scale[here], index)
            result[here] = total if bias is None else total + bias[index].float()
        return result

    def _product(self, name: str, codes: Tensor, scale: Tensor | None, index: int) -> Tensor:
        weight_scale = self._weight_scale(name, index)
        arithmetic = self.contract.arithmetic
        assert isinstance(arithmetic, Arithmetic)
        sums = promoted(codes, self.operands[name][0][index], self.unit, arithmetic.promote_every)
        total = torch.zeros_like(sums[0])
        for block, part in enumerate(sums):
            total = total + (_scaled(part, scale, weight_scale, block) if self.by_block else part)
        return total if self.by_block else _scaled(total, scale, weight_scale, 0)

    def _weight_scale(self, name: str, index: int) -> Tensor | None:
        """(rows or 1, blocks of K or 1)."""
        weight, scale = self.operands[name]
        if scale is None:
            return None
        one, group = scale[index], self.quant.w1.shape or GroupShape.PER_TENSOR
        if not group.is_block():
            return one.reshape(-1, 1)
        halves = self.halves if name == "w13" else 1
        rows = weight.shape[1] // halves
        return torch.cat([half.repeat_interleave(group.row, 0)[:rows] for half in one.chunk(halves)])


def _scaled(total: Tensor, scale: Tensor | None, weight_scale: Tensor | None, block: int) -> Tensor:
    for factor in (scale, None if weight_scale is None else weight_scale.t()):
        if factor is not None:
            across = factor.t() if factor is scale else factor  # (blocks, rows of either side)
            one = across[block if len(across) > 1 else 0]
            total = total * (one[:, None] if factor is scale else one[None, :])
    return total


def on_unit(name: str, fp8: str, wide: str, every: int | None = BLOCK, recipe: Recipe | None = None) -> type[OnUnit]:
    """A backend on a matrix unit, by its keys of `UNITS`."""
    members = {"fp8_unit": fp8, "wide_unit": wide, "promote_every": every, "own_recipe": recipe or Recipe()}
    return type(name, (OnUnit,), {"__module__": __name__, "__doc__": f"{fp8}, {wide}; every {every}", **members})
