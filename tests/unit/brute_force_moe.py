"""A tiny MoE in plain Python numbers, one element at a time: what the oracles are compared with.

Sums are exact (`math.fsum`), quantisation looks the nearest code up in the list of all 256; nothing is shared with
the oracles but the inputs.
"""

from __future__ import annotations

import bisect
import math
import struct
from fractions import Fraction
from types import SimpleNamespace

import torch

from fp8moe.approximate_reciprocal import OFF

FP8_BIAS = {torch.float8_e4m3fn: 7, torch.float8_e4m3fnuz: 8}


def fp8_table(dtype: torch.dtype) -> list[float]:
    bias = FP8_BIAS[dtype]
    table = []
    for code in range(256):
        sign, exponent, mantissa = code >> 7, (code >> 3) & 15, code & 7
        value = mantissa / 8 * 2.0 ** (1 - bias) if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - bias)
        nan = (code & 127) == 127 if bias == 7 else code == 128
        table.append(math.nan if nan else (-value if sign else value))
    return table


def float32(value: float) -> float:
    return struct.unpack("f", struct.pack("f", value))[0]


def nearest(value: float, table: list[float]) -> float:
    """The nearest value of a table of codes, ties to the even code, past the largest the largest."""
    positive = [known for known in table[:128] if known == known]  # code by code, ascending
    magnitude = abs(value)
    above = min(bisect.bisect_left(positive, magnitude), len(positive) - 1)
    best = min((max(above - 1, 0), above), key=lambda c: (abs(Fraction(positive[c]) - Fraction(magnitude)), c & 1))
    return math.copysign(positive[best], value)


def bfloat16(value: float) -> float:
    """float32 to bfloat16, to nearest even, on the bits."""
    bits = struct.unpack("I", struct.pack("f", float32(value)))[0]
    kept = bits + 0x7FFF + ((bits >> 16) & 1) & 0xFFFF0000
    return struct.unpack("f", struct.pack("I", kept))[0]


def reciprocal(value: float, recipe: SimpleNamespace) -> float:
    """fp32(1 / value), which Hopper's approximate one misses by a unit in the last place for some bf16 mantissas."""
    bits = struct.unpack("i", struct.pack("f", 1 / value))[0]
    given = struct.unpack("I", struct.pack("f", value))[0]
    if recipe.scale_division == "approximate_inverse" and given & 0xFFFF == 0:
        bits += OFF.get(given >> 16 & 127 | 128, 0)
    return struct.unpack("f", struct.pack("i", bits))[0]


def scale_of(amax: float, limit: float, recipe: SimpleNamespace) -> float:
    amax = max(amax, float32(recipe.amax_floor))
    if recipe.scale_division.endswith("inverse"):
        return float32(1 / float32(limit * reciprocal(amax, recipe)))
    scale = float32(amax / limit if recipe.scale_division == "divide" else amax * float32(1 / limit))
    if recipe.scale_rounding == "power_of_two":
        scale = 2.0 ** math.ceil(math.log2(scale))
    return scale


def quantise(
    value: float, scale: float, table: list[float], recipe: SimpleNamespace, amax: float | None = None
) -> float:
    exact = value / scale if recipe.scaling == "divide" else value * float32(1 / scale)
    if recipe.scale_division.endswith("inverse") and amax is not None:
        exact = value * float32(table_limit(table) * reciprocal(max(amax, float32(recipe.amax_floor)), recipe))
    return nearest(float32(exact), table) * scale


def table_limit(table: list[float]) -> float:
    return max(value for value in table if value == value)


def quantised_rows(rows, group, static, owners, table, recipe):
    """`group`: None, "tensor", "token" or a number of columns; `owners` tells rows apart that do not share a scale."""
    if group is None:
        return rows
    limit = table_limit(table)
    if group == "tensor":
        if static is not None:
            scales = [static] * len(rows)
        else:
            scales = [
                scale_of(
                    max((abs(v) for r, o in zip(rows, owners, strict=True) if o == owner for v in r), default=0),
                    limit,
                    recipe,
                )
                for owner in owners
            ]
        return [[quantise(v, s, table, recipe) for v in row] for row, s in zip(rows, scales, strict=True)]
    result = []
    for row in rows:
        width = len(row) if group == "token" else group
        done = []
        for start in range(0, len(row), width):
            part = row[start : start + width]
            amax = max(map(abs, part))
            scale = scale_of(amax, limit, recipe)
            done += [quantise(value, scale, table, recipe, amax) for value in part]
        result.append(done)
    return result


def activation(name: str, gate_up: list[float], gate_rounded=lambda part: part) -> list[float]:
    def silu(x):
        return x / (1 + math.exp(-x))

    def gelu(x):
        return 0.5 * x * math.erfc(-x / math.sqrt(2))

    single = {"silu_no_mul": silu, "gelu_no_mul": gelu, "relu2_no_mul": lambda x: max(x, 0) ** 2}
    if name in single:
        return [single[name](x) for x in gate_up]
    half = len(gate_up) // 2
    result = []
    for gate, up in zip(gate_up[:half], gate_up[half:], strict=True):
        if name == "silu":
            result.append(gate_rounded(silu(gate)) * up)
        elif name == "gelu":
            result.append(gate_rounded(gelu(gate)) * up)
        elif name == "swigluoai":
            gate, up = min(gate, 7), max(min(up, 7), -7)
            result.append(gate_rounded(gate / (1 + math.exp(-1.702 * gate))) * (up + 1))
        else:
            result.append(min(gate_rounded(silu(gate)), 7) * max(min(up, 7), -7))
    return result


def dequantised(weights, name: str, expert: int, halves: int) -> list[list[float]]:
    codes, scale = getattr(weights, name)[expert], getattr(weights, name + "_scale")
    if scale is None:
        return codes.double().tolist()
    table = fp8_table(codes.dtype)
    raw = codes.view(torch.uint8).tolist()
    given = scale[expert].double().tolist()
    rows, columns = len(raw), len(raw[0])
    per_half = rows // halves

    def scale_at(row: int, column: int) -> float:
        if isinstance(given, float):
            return given
        if len(given[0]) == 1 and len(given) == rows:
            return given[row][0]
        return given[row // per_half * -(-per_half // 128) + row % per_half // 128][column // 128]

    return [[table[raw[r][c]] * scale_at(r, c) for c in range(columns)] for r in range(rows)]


def moe(case: SimpleNamespace, recipe: SimpleNamespace | None):
    """The output of a tiny case as lists, and the dequantised intermediate of each pair; `recipe` None: the ideal."""
    hidden, router, ids = case.hidden.double().tolist(), case.router.double().tolist(), case.ids.tolist()
    quantised = recipe is not None
    table = fp8_table(case.weights.w13.dtype) if case.weights.w13_scale is not None else []
    if case.on_input:
        by = router
        if quantised and recipe.input_weights == "input":
            by = [[bfloat16(w) for w in row] for row in router]
        hidden = [[v * w[0] for v in row] for row, w in zip(hidden, by, strict=True)]
        hidden = [[bfloat16(float32(v)) for v in row] for row in hidden] if quantised else hidden
        router = [[1.0] for _ in router]
    mapped = [[-1 if e < 0 else (e if case.map is None else case.map[e]) for e in row] for row in ids]
    pairs = [(t, s, e) for t, row in enumerate(mapped) for s, e in enumerate(row) if e >= 0]
    by_expert = quantised and recipe.dynamic_tensor_scope == "expert"
    per_pair = [hidden[t] for t, _, _ in pairs]
    if quantised and case.group == "tensor" and case.a13 is None and not by_expert:
        everything = quantised_rows(hidden, "tensor", None, [0] * len(hidden), table, recipe)
        per_pair = [everything[t] for t, _, _ in pairs]
    elif quantised:
        per_pair = quantised_rows(per_pair, case.group, case.a13, [e for _, _, e in pairs], table, recipe)
    middle = []
    for (_, _, expert), row in zip(pairs, per_pair, strict=True):
        first = _times(case, "w13", expert, row, case.halves)
        if quantised and recipe.gemm1_output == "input":
            first = [bfloat16(value) for value in first]
        if quantised and recipe.gemm1_output == "float8" and case.group is not None:
            part = len(first) // case.halves
            halves = [[float32(value) for value in first[start : start + part]] for start in range(0, len(first), part)]
            kept = quantised_rows(halves, 128, None, [0] * len(halves), table, of_second(recipe))
            first = [value for part in kept for value in part]
        by_itself = quantised and recipe.gate_output == "input"
        values = activation(case.activation, first, bfloat16) if by_itself else activation(case.activation, first)
        if quantised and recipe.activation_output == "input":
            values = [bfloat16(value) for value in values]
        middle.append([float32(value) for value in values] if quantised else values)
    if quantised and recipe.requantize:
        owners = [e if by_expert else 0 for _, _, e in pairs]
        middle = quantised_rows(middle, case.group, case.a2, owners, table, of_second(recipe))
    total = [[0.0] * len(hidden[0]) for _ in hidden]
    for (token, slot, expert), row in zip(pairs, middle, strict=True):
        second = _times(case, "w2", expert, row, 1)
        if quantised and recipe.gemm2_output == "input":
            second = [bfloat16(value) for value in second]
        for column, value in enumerate(second):
            term = router[token][slot] * value
            total[token][column] += bfloat16(term) if quantised and recipe.weighted == "input" else term
            if quantised and recipe.combine == "input":
                total[token][column] = bfloat16(total[token][column])
    return total, middle


def of_second(recipe: SimpleNamespace) -> SimpleNamespace:
    """How the second GEMM's inputs are quantised."""
    second = SimpleNamespace(**vars(recipe))
    if recipe.intermediate_amax_floor is not None:
        second.amax_floor = recipe.intermediate_amax_floor
    return second


def _times(case: SimpleNamespace, name: str, expert: int, row: list[float], halves: int) -> list[float]:
    key = (name, expert)
    if key not in case.cache:
        case.cache[key] = dequantised(case.weights, name, expert, halves)
    bias = getattr(case.weights, name + "_bias")
    added = [0.0] * len(case.cache[key]) if bias is None else bias[expert].double().tolist()
    return [
        math.fsum(a * w for a, w in zip(row, line, strict=True)) + b
        for line, b in zip(case.cache[key], added, strict=True)
    ]
