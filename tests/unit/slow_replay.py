"""The declared arithmetic of a small MoE in plain Python numbers, one pair and one element at a time.

What the replay oracle is compared with. Sums of a unit are `chain`'s, which has tests of its own, and activations are
the portable ones; all else is restated: which scale goes where, what is rounded when, and in what order.
"""

from __future__ import annotations

import math
import struct
from dataclasses import replace
from fractions import Fraction

import torch
from torch import Tensor

from conformance.build import CaseTensors
from fp8moe.keys import GroupShape
from fp8moe.quant import FusedMoEQuantDesc
from fp8moe.recipe import Arithmetic, Recipe, Steps
from fp8moe.reference.portable import PORTABLE, Portable
from fp8moe.reference.units import chain
from tests.unit.brute_force_moe import bfloat16, float32, fp8_table, nearest, scale_of

Row = list[float]


def fused(x: float, y: float, z: float) -> float:
    """x * y + z, rounded once to fp32."""
    exact = Fraction(x) * Fraction(y) + Fraction(z)
    if not exact:
        return 0.0
    exponent = abs(exact.numerator).bit_length() - exact.denominator.bit_length()
    exponent -= abs(exact) < Fraction(2) ** exponent
    step = Fraction(2) ** (max(exponent, -126) - 23)
    return float(round(exact / step) * step)  # round() of a Fraction goes to even at a tie


class SlowReplay:
    """One call; `output` is (M, H) as lists, `stages` gives (token, slot) its row of each stage."""

    def __init__(self, tensors: CaseTensors, recipe: Recipe, arithmetic: Arithmetic, steps: Steps) -> None:
        self.tensors, self.recipe, self.arithmetic, self.steps = tensors, recipe, arithmetic, steps
        self.stages: dict[str, dict[tuple[int, int], Row]] = {}
        weights = tensors.weights
        self.table = fp8_table(weights.w13.dtype) if weights.w13_scale is not None else []
        group = tensors.quant.w1.shape
        self.blocked = group is not None and group.is_block()
        router, ids = tensors.topk_weights.tolist(), tensors.topk_ids.tolist()
        rows = tensors.hidden_states.float().tolist()
        if tensors.apply_router_weight_on_input:
            by = [self.cast(row, recipe.input_weights) for row in router]
            rows = [[self.narrow(float32(v * w[0])) for v in row] for row, w in zip(rows, by, strict=True)]
        local = None if tensors.expert_map is None else tensors.expert_map.tolist()
        self.experts = {
            (token, slot): expert if local is None else local[expert]
            for token, chosen in enumerate(ids)
            for slot, expert in enumerate(chosen)
            if expert >= 0 and (local is None or local[expert] >= 0)
        }
        each = {pair: rows[pair[0]] for pair in self.experts}
        first_input = self.quantised(each, tensors.quant.a1, weights.a13_scale, rows, recipe.amax_floor)
        first = {pair: self.cast(self.gemm("w13", pair, *first_input[pair]), recipe.gemm1_output) for pair in each}
        activate = PORTABLE[tensors.config.activation]
        values = {
            pair: self.cast(self.activated(activate, torch.tensor(row)), recipe.activation_output)
            for pair, row in first.items()
        }
        quantised = bool(self.table)
        floor = recipe.amax_floor if recipe.intermediate_amax_floor is None else recipe.intermediate_amax_floor
        second_input = self.quantised(values, tensors.quant.a2, weights.a2_scale, list(values.values()), floor)
        second = {pair: self.cast(self.gemm("w2", pair, *second_input[pair]), recipe.gemm2_output) for pair in each}
        self.stages = {"first_gemm": first, "activation": values, "second_gemm": second}
        if quantised:
            self.stages["requantisation"] = {pair: codes for pair, (codes, _) in second_input.items()}
        self.output = [self.combined(token, second, router[token]) for token in range(len(rows))]

    def activated(self, activate: Portable, row: Tensor) -> Row:
        if activate.of_up is None:
            return activate.of_gate(row).tolist()
        gate, up = row.chunk(2)
        parts = self.cast(activate.of_gate(gate).tolist(), self.recipe.gate_output), activate.of_up(up).tolist()
        return [float32(left * right) for left, right in zip(*parts, strict=True)]

    def narrow(self, value: float) -> float:
        """fp32 to the dtype of the hidden states."""
        if self.tensors.hidden_states.dtype == torch.bfloat16:
            return bfloat16(value)
        return float(struct.unpack("e", struct.pack("e", value))[0])

    def cast(self, row: Row, where: str) -> Row:
        return [self.narrow(value) for value in row] if where == "input" else row

    def quantised(
        self,
        pairs: dict[tuple[int, int], Row],
        desc: FusedMoEQuantDesc,
        static: Tensor | None,
        everything: list[Row],
        floor: float,
    ) -> dict[tuple[int, int], tuple[Row, Row]]:
        """Each pair's values of the FP8 codes and its scales, one for each group of columns."""
        if desc.dtype is None:
            return {pair: (self.cast(row, "input"), []) for pair, row in pairs.items()}
        group, limit = desc.shape or GroupShape.PER_TENSOR, max(v for v in self.table if v == v)
        found = {}
        for pair, row in pairs.items():
            width = group.col if group.is_per_group() else len(row)
            parts = [row[start : start + width] for start in range(0, len(row), width)]
            shared = None
            if group.is_per_tensor():
                whose = everything
                if self.recipe.dynamic_tensor_scope == "expert":
                    whose = [r for other, r in pairs.items() if self.experts[other] == self.experts[pair]]
                shared = static.item() if static is not None else self.scale(whose, limit, floor)
            scales = [self.scale([part], limit, floor) if shared is None else shared for part in parts]
            codes = [self.code(v, s) for part, s in zip(parts, scales, strict=True) for v in part]
            found[pair] = codes, scales
        return found

    def scale(self, rows: list[Row], limit: float, floor: float) -> float:
        amax = max((abs(value) for row in rows for value in row), default=0.0)
        return scale_of(amax, limit, replace(self.recipe, amax_floor=floor))

    def code(self, value: float, scale: float) -> float:
        exact = value / scale if self.recipe.scaling == "divide" else value * float32(1 / scale)
        return nearest(float32(exact), self.table)

    def gemm(self, name: str, pair: tuple[int, int], codes: Row, scales: Row) -> Row:
        expert, weights = self.experts[pair], self.tensors.weights
        weight: Tensor = getattr(weights, name)[expert]
        columns = weight.shape[1]
        every = self.arithmetic.promote_every or columns
        a = torch.tensor([codes], dtype=torch.float32).to(weight.dtype)
        sums = []
        for start in range(0, columns, every):
            order = self.order(start, min(start + every, columns))
            left, right = (_columns(matrix, order) for matrix in (a, weight))
            sums.append(chain(left, right, self.arithmetic.unit)[0].tolist())
        total = [self.scaled(name, expert, n, [part[n] for part in sums], scales) for n in range(len(sums[0]))]
        bias: Tensor | None = getattr(weights, f"{name}_bias")
        if bias is None:
            return total
        return [float32(value + added) for value, added in zip(total, bias[expert].float().tolist(), strict=True)]

    def order(self, start: int, stop: int) -> list[int]:
        """The places of K from `start` to `stop` in the unit's order; -1 for padding."""
        if self.arithmetic.k_order == "natural":
            return list(range(start, stop))
        places = []
        for base in range(start, stop, 32):
            for wanted in ((0, 1), (2, 3)):
                places += [k if k < stop else -1 for k in range(base, base + 32) if k % 4 in wanted]
        return places

    def scaled(self, name: str, expert: int, n: int, sums: Row, scales: Row) -> float:
        if not self.blocked:
            total = sums[0]
            for value in sums[1:]:
                total = float32(total + value)
            if not scales:
                return total
            left, right = scales[0], self.weight_scale(name, expert, n, 0)
            if self.steps.scale_order == "product":
                return float32(total * float32(left * right))
            if self.steps.scale_order == "weights_first":
                left, right = right, left
            return float32(float32(total * left) * right)
        total = 0.0
        for block, (value, left) in enumerate(zip(sums, scales, strict=True)):
            right = self.weight_scale(name, expert, n, block)
            if self.steps.scale_order == "product":
                right = float32(left * right)
            elif self.steps.scale_order == "weights_first":
                value, right = float32(value * right), left
            else:
                value = float32(value * left)
            total = fused(value, right, total) if self.steps.scale_fma else float32(float32(value * right) + total)
        return total

    def weight_scale(self, name: str, expert: int, n: int, block: int) -> float:
        scale: Tensor = getattr(self.tensors.weights, f"{name}_scale")[expert]
        if scale.ndim == 0:
            return scale.item()
        if not self.blocked:
            return scale[n, 0].item()
        halves = 2 if name == "w13" and self.tensors.config.is_act_and_mul else 1
        half = getattr(self.tensors.weights, name).shape[1] // halves
        return scale[n // half * math.ceil(half / 128) + n % half // 128, block].item()

    def combined(self, token: int, second: dict[tuple[int, int], Row], router: Row) -> Row:
        total = [0.0] * self.tensors.config.hidden_dim
        for slot, weight in enumerate(router):
            if (token, slot) not in second:
                continue
            for column, value in enumerate(second[token, slot]):
                if self.tensors.apply_router_weight_on_input:
                    added = float32(total[column] + self.cast([value], self.recipe.weighted)[0])
                elif self.recipe.weighted == "input":
                    added = float32(self.narrow(float32(weight * value)) + total[column])
                elif self.steps.combine == "slot_fma":
                    added = fused(weight, value, total[column])
                else:
                    added = float32(float32(weight * value) + total[column])
                total[column] = self.narrow(added) if self.recipe.combine == "input" else added
        return [self.narrow(value) for value in total]


def _columns(matrix: Tensor, places: list[int]) -> Tensor:
    """These columns, zeros at -1."""
    raw = matrix.view(torch.uint8) if matrix.itemsize == 1 else matrix
    padded = torch.nn.functional.pad(raw, (0, 1))  # the last column is what -1 asks for; a code of 0 is zero
    return padded[:, places].contiguous().view(matrix.dtype)
