"""Routing laws: small functions from (draw, M, E, k) to the weights and ids that a router would hand over.

Each returns topk_weights (M, k) fp32 and topk_ids (M, k) int32 of global experts, on the draw's device, which is the
CPU for a case. Ids in a row are distinct except under `repeated`. All but `router` use exact arithmetic on the drawn
integers (`skewed` takes a logarithm, to rank), so their bits are the same everywhere; `router` runs the real routing
code, whose softmax and sigmoid may differ in the last bit between builds of torch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from conformance.draw import Draw
from conformance.models import Router
from fp8moe.config import RoutingMethodType

Routing = tuple[Tensor, Tensor]

MASKED_ONE_IN = 4
ZERO_WEIGHT_ONE_IN = 4
LIGHT_SUM, HEAVY_SUM = 0.2, 3.0


def uniform(draw: Draw, tokens: int, experts: int, top_k: int) -> Routing:
    """Distinct experts, each equally likely; positive weights that sum to 1, or for top-1 lie between 0 and 1."""
    return _weights(draw, tokens, top_k), _choose(draw, "ids", tokens, experts, top_k)


def skewed(draw: Draw, tokens: int, experts: int, top_k: int) -> Routing:
    """Distinct experts by Zipf's law: the r-th most popular is drawn with a weight of 1/r."""
    # Efraimidis and Spirakis: the k smallest of -log(u)/weight are a weighted sample without replacement.
    popularity = 1 + _permutation(draw, "popularity", experts).to(torch.float64)
    keys = -torch.log(_positive(draw, "keys", (tokens, experts)).to(torch.float64) / 2.0**31) * popularity
    return _weights(draw, tokens, top_k), _smallest(keys, top_k)


def all_to_one(draw: Draw, tokens: int, experts: int, top_k: int) -> Routing:
    """Every token's first slot goes to one and the same expert; the other slots elsewhere."""
    chosen = int(draw.integers("expert", (1,), experts))
    return _weights(draw, tokens, top_k), _with_first(draw, tokens, experts, top_k, chosen)


def last(draw: Draw, tokens: int, experts: int, top_k: int) -> Routing:
    """Every token's first slot goes to the last expert; the other slots elsewhere."""
    return _weights(draw, tokens, top_k), _with_first(draw, tokens, experts, top_k, experts - 1)


def one_each(draw: Draw, tokens: int, experts: int, top_k: int) -> Routing:
    """Every expert gets at most one token-expert pair; slots beyond the number of experts are -1."""
    ids = torch.full((tokens * top_k,), -1, dtype=torch.int32, device=draw.device)
    used = min(tokens * top_k, experts)
    ids[:used] = _permutation(draw, "ids", experts)[:used].to(torch.int32)
    return _weights(draw, tokens, top_k), ids.view(tokens, top_k)


def empty(draw: Draw, tokens: int, experts: int, top_k: int) -> Routing:
    """Half of the experts (rounded down) get no token, whoever they are; the rest as `uniform`."""
    used = _permutation(draw, "used", experts)[: experts - experts // 2]
    places = _choose(draw, "ids", tokens, len(used), top_k)
    return _weights(draw, tokens, top_k), used[places.long()].to(torch.int32)


def repeated(draw: Draw, tokens: int, experts: int, top_k: int) -> Routing:
    """The first and last slot of every other token name the same expert, with different weights."""
    weights, ids = uniform(draw, tokens, experts, top_k)
    ids[::2, -1] = ids[::2, 0]
    return weights, ids


def masked(draw: Draw, tokens: int, experts: int, top_k: int) -> Routing:
    """As `uniform`, with a quarter of the slots -1, one token that has no expert at all, and one that has all.

    A masked slot keeps its weight. A single token has all but its last expert; with top-1 it has none.
    """
    weights, ids = uniform(draw, tokens, experts, top_k)
    gone = draw.integers("gone", (tokens, top_k), MASKED_ONE_IN) == 0
    if tokens > 1:
        gone[0], gone[tokens // 2] = False, True
    elif tokens:
        gone[0] = False
        gone[0, -1] = True
    return weights, ids.masked_fill(gone, -1)


def unnormalised(draw: Draw, tokens: int, experts: int, top_k: int) -> Routing:
    """As `uniform` with weights times 0.2 and 3 in turn, and a slot of weight zero in every fourth row (k > 1)."""
    weights, ids = uniform(draw, tokens, experts, top_k)
    weights[::2] *= LIGHT_SUM
    weights[1::2] *= HEAVY_SUM
    if top_k > 1:
        weights[::ZERO_WEIGHT_ONE_IN, -1] += weights[::ZERO_WEIGHT_ONE_IN, 0]
        weights[::ZERO_WEIGHT_ONE_IN, 0] = 0.0
    return weights, ids


def router(draw: Draw, tokens: int, experts: int, top_k: int, by: Router | None = None) -> Routing:
    """Logits through `fp8moe.routing.route`, with the model's groups, factor and bias; softmax where `by` is None."""
    from fp8moe.routing import route

    if by is None:
        by = Router(RoutingMethodType.Renormalize)
    logits = 2.0 * draw.normal("logits", (tokens, experts))
    bias = 0.25 * draw.normal("correction_bias", (experts,)) if by.biased else None
    return route(
        by.method,
        logits,
        top_k,
        num_expert_group=by.num_expert_group,
        topk_group=by.topk_group,
        correction_bias=bias,
        routed_scaling_factor=by.routed_scaling_factor,
    )


Law = Callable[[Draw, int, int, int], Routing]

LAWS: dict[str, Law] = {
    "uniform": uniform,
    "skewed": skewed,
    "all_to_one": all_to_one,
    "one_each": one_each,
    "empty": empty,
    "repeated": repeated,
    "masked": masked,
    "last": last,
    "unnormalised": unnormalised,
    "router": router,
}


def _positive(draw: Draw, name: str, shape: tuple[int, ...]) -> Tensor:
    """int64 from 1 to 2^31 - 1."""
    return draw.integers(name, shape, (1 << 31) - 1) + 1


def _weights(draw: Draw, tokens: int, top_k: int) -> Tensor:
    """Positive and uneven, as a softmax has them: shares of squared uniform numbers, one division in float64."""
    parts = 1 + draw.integers("weights", (tokens, top_k), 1 << 20) ** 2
    whole = parts.sum(dim=-1, keepdim=True) if top_k > 1 else torch.full_like(parts, 1 << 40)
    return (parts.to(torch.float64) / whole.to(torch.float64)).to(torch.float32)


def _smallest(keys: Tensor, count: int) -> Tensor:
    """Positions of the `count` smallest of each row, in that order."""
    return keys.sort(dim=-1, stable=True).indices[:, :count].to(torch.int32)


def _choose(draw: Draw, name: str, tokens: int, experts: int, count: int) -> Tensor:
    """(tokens, count) distinct numbers below `experts` in random order."""
    return _smallest(_positive(draw, name, (tokens, experts)), count)


def _permutation(draw: Draw, name: str, experts: int) -> Tensor:
    return _positive(draw, name, (experts,)).sort(stable=True).indices


def _with_first(draw: Draw, tokens: int, experts: int, top_k: int, first: int) -> Tensor:
    """The first slot holds `first`, the others distinct experts other than it."""
    ids = torch.full((tokens, top_k), first, dtype=torch.int32, device=draw.device)
    if top_k > 1:
        others = _choose(draw, "ids", tokens, experts - 1, top_k - 1)
        ids[:, 1:] = others + (others >= first)
    return ids
