"""One call of an MoE layer as the recipe oracle and its bound see it: token-expert pairs and dequantised weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from fp8moe.config import FusedMoEConfig
from fp8moe.experts import MoEWeights
from fp8moe.keys import GroupShape
from fp8moe.quant import FusedMoEQuantConfig, FusedMoEQuantDesc
from fp8moe.recipe import REQUANTISED_FLOOR, Recipe
from fp8moe.reference.quantisation import scale_of, scaled
from fp8moe.reference.rounding import E4M3FN, FloatFormat, code_values, format_of, round_to, to_float32

REQUANTISING = Recipe(scale_rounding="power_of_two", amax_floor=REQUANTISED_FLOOR)
"""How weights are quantised anew."""
SMALLEST_EXPONENT = 149
"""2 to the minus this is the smallest number of fp32."""
CHUNK_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 26}
"""Elements of a temporary of the oracles: 32 MiB of float64 on a CPU, 512 MiB on a GPU."""


def chunk_elements(device: torch.device) -> int:
    """How many elements a temporary on this device may have."""
    return CHUNK_ELEMENTS.get(device.type, CHUNK_ELEMENTS["cpu"])


@dataclass(frozen=True)
class Pairs:
    """Token-expert pairs sorted by expert; all (P,).

    Args:
        row: the token's row in `hidden_states`.
        token: its place among the judged tokens; -1 for a pair that only witnesses a shared scale.
        slot: its place among the token's k experts.
        expert: local id.
        weight: routing weight, float64; 1 where it was applied to the input.
    """

    row: Tensor
    token: Tensor
    slot: Tensor
    expert: Tensor
    weight: Tensor

    def __len__(self) -> int:
        return self.row.numel()

    def segments(self) -> list[tuple[int, slice]]:
        """(local expert, its pairs) for each expert that has some."""
        experts, counts = torch.unique_consecutive(self.expert, return_counts=True)
        found, start = [], 0
        for expert, count in zip(experts.tolist(), counts.tolist(), strict=True):
            found.append((int(expert), slice(start, start + int(count))))
            start += int(count)
        return found

    def take(self, index: Tensor) -> Pairs:
        """The pairs at these places, which must keep the order by expert."""
        return Pairs(*(value[index] for value in vars(self).values()))


@dataclass(frozen=True, eq=False)
class MoEProblem:
    """The arguments of `recipe_moe`, with what follows from them before anything is computed."""

    config: FusedMoEConfig
    quant: FusedMoEQuantConfig
    recipe: Recipe
    weights: MoEWeights
    hidden_states: Tensor
    topk_weights: Tensor
    topk_ids: Tensor
    expert_map: Tensor | None
    apply_router_weight_on_input: bool
    tokens: Tensor

    @property
    def device(self) -> torch.device:
        return self.hidden_states.device

    @property
    def halves(self) -> int:
        return 2 if self.config.is_act_and_mul else 1

    @property
    def fp8(self) -> FloatFormat:
        """What activations are quantised to: the format of the weights, which is the platform's."""
        return format_of(self.weights.w13.dtype) if self.quant.w1.dtype is not None else E4M3FN

    @property
    def carrier(self) -> FloatFormat:
        """The format of the hidden states, of the output and of a declared rounding to "input"."""
        return format_of(self.hidden_states.dtype)

    @cached_property
    def inputs(self) -> Tensor:
        """(M, H) as they are quantised: weighted by the router in float32 and rounded again, where that is asked."""
        if not self.apply_router_weight_on_input:
            return self.hidden_states
        weight = self.topk_weights.double()
        if self.recipe.input_weights == "input":
            weight = round_to(weight, self.carrier)
        weighted = to_float32(self.hidden_states.double() * weight)
        return round_to(weighted, self.carrier).to(self.hidden_states.dtype)

    @cached_property
    def all_pairs(self) -> Pairs:
        """Every pair with a local expert; `token` is -1 where the token is not judged."""
        ids = self.topk_ids.to(torch.int64)
        if self.expert_map is not None:
            ids = torch.where(ids < 0, -1, self.expert_map.to(torch.int64)[ids.clamp(min=0)])
        place = torch.full((ids.shape[0],), -1, device=self.device)
        place[self.tokens] = torch.arange(self.tokens.numel(), device=self.device)
        expert = ids.reshape(-1)
        order = torch.argsort(expert, stable=True)
        order = order[expert[order] >= 0]
        row = order // max(ids.shape[1], 1)
        weight = self.topk_weights.double().reshape(-1)[order]
        if self.recipe.routing_weights == "input":
            weight = round_to(weight, self.carrier)
        if self.apply_router_weight_on_input:
            weight = torch.ones_like(weight)
        return Pairs(row, place[row], order % max(ids.shape[1], 1), expert[order], weight)

    @property
    def a1(self) -> FusedMoEQuantDesc:
        """How the first GEMM's input is quantised, by the layer and the recipe."""
        return self.quant.a1 if self.recipe.quantize_input else FusedMoEQuantDesc()

    def activation_group(self, desc: FusedMoEQuantDesc) -> GroupShape | None:
        """What shares a scale in the inputs of a GEMM; None where they are not quantised.

        Raises:
            ValueError: a granularity other than tensor, token or groups of columns.
        """
        if desc.dtype is None:
            return None
        group = desc.shape or GroupShape.PER_TENSOR
        if not (group.is_per_tensor() or group.is_per_token() or group.is_per_group()):
            raise ValueError(f"activations quantised per {group}: expected per tensor, per token or groups of columns")
        if desc.static and not group.is_per_tensor():
            raise ValueError(f"activations with static scales per {group}: expected one static scale per tensor")
        return group

    @cached_property
    def _tables(self) -> tuple[Tensor, np.ndarray]:
        values = torch.tensor(code_values(format_of(self.weights.w13.dtype)), dtype=torch.float64)
        return values.to(self.device), values.numpy()

    def weight_rows(self, name: str, expert: int, start: int, stop: int) -> Tensor:
        """Rows of expert `expert` of w13 or w2, dequantised: float64 (stop - start, K)."""
        rows = torch.arange(start, stop, device=self.device)
        return self._dequantised(name, expert, self._codes(name)[expert, start:stop], rows, None)

    def weight_columns(self, name: str, expert: int, columns: Tensor) -> Tensor:
        """Columns of expert `expert` of w13 or w2, dequantised: float64 (rows, columns)."""
        matrix = self._codes(name)[expert]
        rows = torch.arange(matrix.shape[0], device=self.device)
        raw = matrix.view(torch.uint8)[:, columns].view(matrix.dtype) if matrix.itemsize == 1 else matrix[:, columns]
        return self._dequantised(name, expert, raw, rows, columns)

    def weight_scale(self, name: str, expert: int, rows: Tensor) -> Tensor | None:
        """(rows, groups of columns) float64: scales of these rows of w13 or w2, rounded or made anew where the recipe
        says so; None where they are not quantised."""
        scale: Tensor | None = getattr(self.weights, f"{name}_scale")
        if scale is None:
            return None
        if name in self._requantised:
            scale = self._requantised[name][1]
        elif getattr(self.recipe, name) != "exact":
            scale = round_to(scale.double(), self.carrier)
        return self._spread(name, scale, expert, rows)

    def _codes(self, name: str) -> Tensor:
        """w13 or w2 as it enters the GEMM."""
        codes: Tensor = self._requantised[name][0] if name in self._requantised else getattr(self.weights, name)
        return codes

    @cached_property
    def _requantised(self) -> dict[str, tuple[Tensor, Tensor]]:
        """By w13 and w2, where they are quantised anew: codes and scales as given, but for scales in float64."""
        names = [name for name in ("w13", "w2") if getattr(self.weights, f"{name}_scale") is not None]
        return {name: self._requantise(name) for name in names if getattr(self.recipe, name) == "requantised"}

    def _requantise(self, name: str) -> tuple[Tensor, Tensor]:
        matrix, given = getattr(self.weights, name), getattr(self.weights, f"{name}_scale")
        group, columns = self.quant.w1.shape or GroupShape.PER_TENSOR, matrix.shape[2]
        parts = self.halves if name == "w13" and group.is_block() else 1
        rows = matrix.shape[1] // parts
        high, wide = (group.row, group.col) if group.is_block() else (1 if group.is_per_channel() else rows, columns)
        every = torch.arange(matrix.shape[1], device=self.device)
        codes, scale = torch.empty_like(matrix), torch.empty_like(given, dtype=torch.float64)
        for expert, found in enumerate(scale):
            values = to_float32(self._scaled(matrix[expert], self._spread(name, given, expert, every), None))
            magnitude = values.abs().view(parts, rows, columns)
            padded = torch.nn.functional.pad(magnitude, (0, -columns % wide, 0, -rows % high))
            tiles = padded.view(parts, padded.shape[1] // high, high, padded.shape[2] // wide, wide)
            found.copy_(scale_of(tiles.amax((2, 4)), self.fp8, REQUANTISING).view(found.shape))
            new = scaled(values, self._across(self._spread(name, scale, expert, every), columns, None), REQUANTISING)
            codes[expert] = round_to(new, self.fp8).to(codes.dtype)  # which has these numbers
        return codes, scale

    def _spread(self, name: str, scale: Tensor, expert: int, rows: Tensor) -> Tensor:
        """The scales of an expert's rows, (rows, groups of columns) float64."""
        group = self.quant.w1.shape or GroupShape.PER_TENSOR
        if group.is_per_tensor():
            return scale[expert].double().expand(len(rows), 1)
        if group.is_per_channel():
            return scale[expert, rows].double()
        per_half = getattr(self.weights, name).shape[1] // (self.halves if name == "w13" else 1)
        block_row = rows // per_half * -(-per_half // group.row) + rows % per_half // group.row
        return scale[expert].double()[block_row]

    def underflow(self, name: str, expert: int, rows: slice) -> Tensor | float:
        """(rows,) float64: the most that a sum over K loses below the smallest number of fp32 in a GEMM with these rows
        of w13 or w2, by the recipe's shift: of each term as much as that number, scaled."""
        shift = getattr(self.recipe, f"{name}_shift")
        if not shift:
            return 0.0
        matrix = getattr(self.weights, name)
        scale = self.weight_scale(name, expert, torch.arange(rows.start, rows.stop, device=self.device))
        if scale is None:
            return 0.0
        lost: Tensor = scale.abs().amax(1) * (matrix.shape[2] * 2.0 ** (shift - SMALLEST_EXPONENT))
        return lost

    def _dequantised(self, name: str, expert: int, raw: Tensor, rows: Tensor, columns: Tensor | None) -> Tensor:
        """`raw` is the part of an expert's matrix at these rows and columns; `columns` None: all of them."""
        scale = self.weight_scale(name, expert, rows)
        if scale is None:
            return raw.double()
        values = self._scaled(raw, scale, columns)
        return round_to(values, self.carrier) if getattr(self.recipe, name) == "rounded" else values

    def weight_deviation(self, name: str, expert: int, rows: slice) -> Tensor | None:
        """(rows, K) float64: what the recipe's roundings add to these rows of w13 or w2; None where none is made."""
        scale: Tensor | None = getattr(self.weights, f"{name}_scale")
        if scale is None or getattr(self.recipe, name) == "exact":
            return None
        index = torch.arange(rows.start, rows.stop, device=self.device)
        spread = self._spread(name, scale, expert, index)
        exact = self._scaled(getattr(self.weights, name)[expert, rows], spread, None)
        return self.weight_rows(name, expert, rows.start, rows.stop) - exact

    def _scaled(self, raw: Tensor, scale: Tensor, columns: Tensor | None) -> Tensor:
        values = self._looked_up(raw.view(torch.uint8))
        if scale.shape[1] == 1:
            return values.mul_(scale)
        width = (self.quant.w1.shape or GroupShape.PER_TENSOR).col
        # One operation for the whole chunk; one for each block would spend its time in waking threads up.
        if columns is None and raw.shape[1] % width == 0:
            values.view(len(scale), -1, width).mul_(scale[:, :, None])
            return values
        return values.mul_(self._across(scale, raw.shape[1], columns))

    def _across(self, scale: Tensor, count: int, columns: Tensor | None) -> Tensor:
        """(rows, groups of columns) to what broadcasts over `count` of the columns, the first ones or these."""
        if scale.shape[1] == 1:
            return scale
        width = (self.quant.w1.shape or GroupShape.PER_TENSOR).col
        if columns is not None:
            return scale[:, columns // width]
        return scale.repeat_interleave(width, dim=1)[:, :count]

    def _looked_up(self, codes: Tensor) -> Tensor:
        device_table, host_table = self._tables
        if self.device.type == "cpu":  # numpy looks up several times faster than torch on a CPU
            return torch.from_numpy(np.take(host_table, codes.numpy()))
        return device_table[codes.to(torch.int32)]

    def weight_chunks(self, name: str, expert: int) -> Iterator[tuple[slice, Tensor]]:
        """An expert's dequantised rows, a chunk at a time: (rows, float64 (rows, K))."""
        rows, columns = getattr(self.weights, name).shape[1:]
        step = max(chunk_elements(self.device) // columns, 1)
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            yield slice(start, stop), self.weight_rows(name, expert, start, stop)

    def bias(self, name: str, expert: int) -> Tensor | None:
        """(rows,) float64, or None."""
        bias: Tensor | None = getattr(self.weights, f"{name}_bias")
        return None if bias is None else bias[expert].double()
