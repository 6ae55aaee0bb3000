"""Static activation scales of a case, as a calibration run would leave them: from the case's own data.

The second one comes from a sample: a few token-expert pairs, some rows of w13. The sample's largest value is rounded
coarsely before it is used, so that the order in which a device sums does not reach the scale's bits.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from conformance.draw import Draw
from fp8moe.activations import activate
from fp8moe.config import FusedMoEConfig
from fp8moe.dispatch import local_ids

LARGEST = 448.0
LOUD_PAIRS, EVEN_PAIRS, SAMPLED_ROWS = 4, 4, 256
COARSE = 1 << 8
SHARE_LOW, SHARE_RANGE = 0.8, 0.15
"""The second scale covers 80% to 95% of the sample's largest value: the rest saturates, as in a real model."""


def input_scale(inputs: Tensor) -> Tensor:
    """(1,) fp32: the largest magnitude of the first GEMM's inputs (M, H) becomes 448."""
    peak = float(inputs.abs().max()) if inputs.numel() else 0.0
    return torch.tensor([(peak or 1.0) / LARGEST], dtype=torch.float32, device=inputs.device)


def intermediate_scale(
    draw: Draw,
    config: FusedMoEConfig,
    inputs: Tensor,
    topk_ids: Tensor,
    expert_map: Tensor | None,
    w13: Tensor,
    w13_scale: Tensor,
    w13_bias: Tensor | None,
) -> Tensor:
    """(1,) fp32: somewhat less than what the second GEMM's inputs need.

    Args:
        inputs: (M, H), what the first GEMM takes.
        w13: (E, rows, H), FP8; w13_scale: (E,), the static scheme's.
    """
    local = local_ids(topk_ids, expert_map, config.num_local_experts)
    pairs = (local >= 0).nonzero()
    peak = 0.0
    if len(pairs):
        tokens, experts = _sample(pairs, inputs, local, w13_scale)
        values = _results(config, inputs[tokens], experts, w13, w13_scale, w13_bias)
        peak = float(activate(config.activation, values).abs().max())
    share = SHARE_LOW + SHARE_RANGE * float(draw.on("cpu").uniform("a2_scale", (1,)))
    return torch.tensor([_coarse(peak) * share / LARGEST], dtype=torch.float32, device=inputs.device)


def _sample(pairs: Tensor, inputs: Tensor, local: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens and local experts of the pairs with the largest input and scale, and of some spread over the batch."""
    tokens, experts = pairs[:, 0], local[pairs[:, 0], pairs[:, 1]]
    loudness = inputs.abs().amax(dim=1)[tokens].double() * scale[experts].double()
    loudest = loudness.sort(descending=True, stable=True).indices[:LOUD_PAIRS]
    even = torch.arange(EVEN_PAIRS, device=pairs.device) * len(pairs) // EVEN_PAIRS
    chosen = torch.cat([loudest, even])
    return tokens[chosen], experts[chosen]


def _results(
    config: FusedMoEConfig, inputs: Tensor, experts: Tensor, w13: Tensor, scale: Tensor, bias: Tensor | None
) -> Tensor:
    """The first GEMM in float64 for (pairs, H) inputs, on some of its rows: (pairs, rows)."""
    inter = config.intermediate_size_per_partition
    sampled = min(SAMPLED_ROWS, inter)
    rows = torch.arange(sampled, device=inputs.device) * inter // sampled
    if config.is_act_and_mul:
        rows = torch.cat([rows, rows + inter])
    weights = w13.view(torch.uint8)[experts[:, None], rows].view(w13.dtype).to(torch.float32).double()
    values = torch.einsum("ph,prh->pr", inputs.double(), weights) * scale[experts, None].double()
    return values if bias is None else values + bias[experts[:, None], rows].double()


def _coarse(value: float) -> float:
    """To 8 bits; 1 where there is nothing."""
    if value == 0.0:
        return 1.0
    mantissa, exponent = math.frexp(value)
    return math.ldexp(round(mantissa * COARSE) / COARSE, exponent)
