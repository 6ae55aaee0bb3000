"""The activations of the specification's section 3.5, on fp32 tensors; gate rows come first, then up rows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import gelu, silu

SWIGLU_LIMIT = 7.0
SWIGLUOAI_ALPHA = 1.702


def _swigluoai(gate: Tensor, up: Tensor) -> Tensor:
    """gpt-oss: the gate clamped from above, the up from both sides; x * sigmoid(1.702 x) * (up + 1)."""
    gate = gate.clamp(max=SWIGLU_LIMIT)
    up = up.clamp(-SWIGLU_LIMIT, SWIGLU_LIMIT)
    return gate * torch.sigmoid(SWIGLUOAI_ALPHA * gate) * (up + 1)


def _swiglustep(gate: Tensor, up: Tensor) -> Tensor:
    """Step-3.5: silu of the gate clamped from above, the up clamped from both sides."""
    return silu(gate).clamp(max=SWIGLU_LIMIT) * up.clamp(-SWIGLU_LIMIT, SWIGLU_LIMIT)


GATED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "silu": lambda gate, up: silu(gate) * up,
    "gelu": lambda gate, up: gelu(gate) * up,
    "swigluoai": _swigluoai,
    "swiglustep": _swiglustep,
}
NON_GATED: dict[str, Callable[[Tensor], Tensor]] = {
    "silu_no_mul": silu,
    "gelu_no_mul": gelu,
    "relu2_no_mul": lambda value: value.relu().square(),
}


def activate(name: str, values: Tensor) -> Tensor:
    """(..., 2I) to (..., I) for a gated activation, (..., I) to (..., I) for the others.

    Raises:
        ValueError: the activation has no such name.
    """
    if name in GATED:
        gate, up = values.chunk(2, dim=-1)
        return GATED[name](gate, up)
    if name in NON_GATED:
        return NON_GATED[name](values)
    raise ValueError(f"activation={name!r}: expected one of {', '.join((*GATED, *NON_GATED))}")
