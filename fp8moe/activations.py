"""The activations of the specification's section 3.5, on fp32 tensors; gate rows come first, then up rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import gelu, silu

SWIGLU_LIMIT = 7.0
SWIGLUOAI_ALPHA = 1.702


@dataclass(frozen=True)
class Gated:
    """An activation of a gate, times what it makes of the up."""

    of_gate: Callable[[Tensor], Tensor]
    of_up: Callable[[Tensor], Tensor] = lambda up: up


def _sigmoid_of_limited(gate: Tensor) -> Tensor:
    gate = gate.clamp(max=SWIGLU_LIMIT)
    return gate * torch.sigmoid(SWIGLUOAI_ALPHA * gate)


def _limited(up: Tensor) -> Tensor:
    return up.clamp(-SWIGLU_LIMIT, SWIGLU_LIMIT)


GATED = {
    "silu": Gated(silu),
    "gelu": Gated(gelu),
    # gpt-oss: the gate clamped from above, the up from both sides; x * sigmoid(1.702 x) * (up + 1).
    "swigluoai": Gated(_sigmoid_of_limited, lambda up: _limited(up) + 1),
    # Step-3.5: silu of the gate clamped from above, the up clamped from both sides.
    "swiglustep": Gated(lambda gate: silu(gate).clamp(max=SWIGLU_LIMIT), _limited),
}
NON_GATED: dict[str, Callable[[Tensor], Tensor]] = {
    "silu_no_mul": silu,
    "gelu_no_mul": gelu,
    "relu2_no_mul": lambda value: value.relu().square(),
}


def activate(name: str, values: Tensor, gate_dtype: torch.dtype | None = None) -> Tensor:
    """(..., 2I) to (..., I) for a gated activation, (..., I) to (..., I) for the others.

    Args:
        gate_dtype: what the gate's part is rounded to before its product with the up's; None: not at all.

    Raises:
        ValueError: the activation has no such name.
    """
    if name in GATED:
        gate, up = values.chunk(2, dim=-1)
        part = GATED[name].of_gate(gate)
        if gate_dtype is not None:
            part = part.to(gate_dtype).to(values.dtype)
        return part * GATED[name].of_up(up)
    if name in NON_GATED:
        return NON_GATED[name](values)
    raise ValueError(f"activation={name!r}: expected one of {', '.join((*GATED, *NON_GATED))}")
