"""The ideal oracle: the MoE that the dequantised weights and the unquantised activations define, in float64.

It shares no code with the recipe oracle, with `quant` or with any backend: what it computes is written once more here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from fp8moe.config import FusedMoEConfig
from fp8moe.experts import MoEWeights
from fp8moe.quant import FusedMoEQuantConfig
from fp8moe.reference.closed import must_be_open

ROWS_ELEMENTS = 1 << 22
"""Elements of a weight that are held in float64 at a time on a CPU; a GPU takes 32 times as many."""


def ideal_moe(
    config: FusedMoEConfig,
    quant: FusedMoEQuantConfig,
    weights: MoEWeights,
    hidden_states: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    *,
    expert_map: Tensor | None = None,
    apply_router_weight_on_input: bool = False,
    tokens: Tensor | None = None,
) -> Tensor:
    """The layer's output without any rounding; shapes as `FusedMoEPermuteExpertsUnpermute.apply`.

    Args:
        tokens: rows of `hidden_states` to compute; None: all.

    Returns:
        (T, H) float64; zeros for a token without a local expert.

    Raises:
        ValueError: an unknown activation.
    """
    must_be_open("ideal_moe")
    chosen = torch.arange(hidden_states.shape[0]) if tokens is None else tokens
    chosen = chosen.to(hidden_states.device)
    x, router, ids = hidden_states[chosen].double(), topk_weights[chosen].double(), topk_ids[chosen].long()
    if expert_map is not None:
        ids = torch.where(ids >= 0, expert_map.long()[ids.clamp_min(0)], ids)
    total = torch.zeros_like(x)
    for expert in sorted(set(ids[ids >= 0].tolist())):
        token, slot = torch.nonzero(ids == expert, as_tuple=True)
        weight = router[token, slot].unsqueeze(1)
        inputs = x[token] * weight if apply_router_weight_on_input else x[token]
        hidden = activation(config.activation, _times(weights, quant, "w13", expert, inputs, config.is_act_and_mul))
        result = _times(weights, quant, "w2", expert, hidden, False)
        total.index_add_(0, token, result if apply_router_weight_on_input else result * weight)
    return total


def activation(name: str, gate_up: Tensor) -> Tensor:
    """Section 3.5 of the specification: (P, 2I), gate rows before up rows, or (P, I), to (P, I).

    Raises:
        ValueError: the activation has no such name.
    """
    if name in _GATED:
        half = gate_up.shape[1] // 2
        return _GATED[name](gate_up[:, :half], gate_up[:, half:])
    if name in _SINGLE:
        return _SINGLE[name](gate_up)
    raise ValueError(f"activation={name!r}: expected one of {', '.join([*_GATED, *_SINGLE])}")


def _swish(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def _normal(x: Tensor) -> Tensor:
    """x times the normal distribution function."""
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def _oss(gate: Tensor, up: Tensor) -> Tensor:
    gate, up = torch.clamp(gate, max=7), torch.clamp(up, -7, 7)
    return gate / (1 + torch.exp(-1.702 * gate)) * (1 + up)


_GATED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "silu": lambda gate, up: _swish(gate) * up,
    "gelu": lambda gate, up: _normal(gate) * up,
    "swigluoai": _oss,
    "swiglustep": lambda gate, up: torch.clamp(_swish(gate), max=7) * torch.clamp(up, -7, 7),
}
_SINGLE: dict[str, Callable[[Tensor], Tensor]] = {
    "silu_no_mul": _swish,
    "gelu_no_mul": _normal,
    "relu2_no_mul": lambda x: torch.relu(x).pow(2),
}


def fp8_values(dtype: torch.dtype) -> list[float]:
    """The 256 values of e4m3fn (bias 7, NaN at 0x7f and 0xff) or e4m3fnuz (bias 8, NaN at 0x80), by code.

    Raises:
        ValueError: another dtype.
    """
    bias = {torch.float8_e4m3fn: 7, torch.float8_e4m3fnuz: 8}.get(dtype)
    if bias is None:
        raise ValueError(f"dtype={dtype}: expected float8_e4m3fn or float8_e4m3fnuz")
    table = []
    for sign in (1.0, -1.0):
        table += [sign * mantissa * 2.0 ** (1 - bias - 3) for mantissa in range(8)]
        table += [sign * (8 + m) * 2.0 ** (e - bias - 3) for e in range(1, 16) for m in range(8)]
    for code in (0x7F, 0xFF) if bias == 7 else (0x80,):
        table[code] = math.nan
    return table


def dequantised_rows(
    weights: MoEWeights, quant: FusedMoEQuantConfig, name: str, expert: int, gated: bool
) -> Iterator[tuple[int, Tensor]]:
    """Rows of one expert's matrix in float64, some at a time: (first row, (rows, K)).

    Args:
        name: "w13" or "w2".
        gated: the matrix is made of two halves whose blocks do not overlap.
    """
    matrix: Tensor = getattr(weights, name)[expert]
    scales: Tensor | None = getattr(weights, name + "_scale")
    rows, columns = matrix.shape
    step = max(1, (ROWS_ELEMENTS if matrix.device.type == "cpu" else 32 * ROWS_ELEMENTS) // columns)
    half = rows // 2 if gated else rows
    first = 0
    while first < rows:
        last = min(first + step, rows if first >= half else half)
        if scales is None:
            yield first, matrix[first:last].double()
        else:
            block = quant.block_shape
            values = _look_up(matrix[first:last])
            if block is None:  # one scale for the matrix, or one for each row
                scale = scales[expert].double()
                values *= scale if scale.dim() == 0 else scale[first:last]
            else:
                in_half = torch.arange(first % half, first % half + last - first, device=matrix.device)
                above = (first // half) * math.ceil(half / block[0])
                scale = scales[expert].double()[above + in_half // block[0]]
                whole = columns // block[1]  # blocks that are not cut off
                values[:, : whole * block[1]].view(len(values), whole, block[1]).mul_(scale[:, :whole, None])
                values[:, whole * block[1] :] *= scale[:, whole:]
            yield first, values
        first = last


def _look_up(codes: Tensor) -> Tensor:
    table = fp8_values(codes.dtype)
    if codes.device.type == "cpu":
        return torch.from_numpy(np.take(np.array(table), codes.view(torch.uint8).numpy()))
    return torch.tensor(table, dtype=torch.float64, device=codes.device)[codes.view(torch.uint8).int()]


def _times(
    weights: MoEWeights, quant: FusedMoEQuantConfig, name: str, expert: int, inputs: Tensor, gated: bool
) -> Tensor:
    """inputs (P, K) times one expert's matrix, plus its bias."""
    parts = [inputs @ values.T for _, values in dequantised_rows(weights, quant, name, expert, gated)]
    result = torch.cat(parts, dim=1)
    bias: Tensor | None = getattr(weights, name + "_bias")
    return result if bias is None else result + bias[expert].double()
