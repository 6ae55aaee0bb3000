"""Routing: from a router's logits to expert ids and weights, by the methods of the specification's section 3.4.

Ids in a row are distinct and in range whatever the logits hold, because kernels index with them: they are the head
of a stable sort, so ties go to the lowest id, and a NaN ranks below every number instead of matching every slot.
What a broken row means for the weights:

- A NaN among a token's logits makes all of that token's weights NaN. The token is broken before it gets here, and
  finite weights would hide that; its neighbours are not touched.
- A row of -inf only names no expert. Softmax and sigmoid give such a token the weights 0, not 0/0; TopK returns the
  logits as they are.
- Scores that underflow to 0 altogether stay 0 when they are renormalised; otherwise 0/0 would make them NaN.
- Softmax over a row with +inf is NaN, as arithmetic has it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fp8moe.config import RoutingMethodType
from fp8moe.validation import InvalidMoEInput

LOGITS_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _softmax(logits: Tensor) -> Tensor:
    nothing = (logits == -math.inf).all(dim=-1, keepdim=True)
    return torch.softmax(logits, dim=-1).masked_fill(nothing, 0.0)


def _raw(logits: Tensor) -> Tensor:
    return logits


@dataclass(frozen=True)
class _Method:
    """One routing method: what scores the logits, before or after the choice, and what may be asked of it."""

    scoring: Callable[[Tensor], Tensor]
    scores_first: bool
    """Every expert is scored before the choice; only then can a bias or groups steer it."""
    renormalize: bool | None
    """Whether the weights are divided by their sum; None: the model's choice, on unless it says no."""
    only_top_1: bool = False


_METHODS = {
    RoutingMethodType.Default: _Method(_softmax, True, False),
    RoutingMethodType.Renormalize: _Method(_softmax, False, True),
    RoutingMethodType.DeepSeekV3: _Method(torch.sigmoid, True, None),
    RoutingMethodType.Llama4: _Method(torch.sigmoid, False, False, only_top_1=True),
    RoutingMethodType.RenormalizeNaive: _Method(_softmax, True, True),
    RoutingMethodType.TopK: _Method(_raw, False, False),
}

_NO_LAW = {
    RoutingMethodType.Custom: "its law is the model's own function: call that, and give its ids and weights to apply()",
    RoutingMethodType.Simulated: "a simulator makes up the ids: draw them, and give them to apply()",
    RoutingMethodType.Unspecified: "it names no law: use grouped_topk() for grouped top-k, or the method the model has",
}


def route(
    method: RoutingMethodType,
    router_logits: Tensor,
    top_k: int,
    *,
    num_expert_group: int | None = None,
    topk_group: int | None = None,
    correction_bias: Tensor | None = None,
    renormalize: bool | None = None,
    routed_scaling_factor: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """The experts of each token and their weights, best first, in fp32 arithmetic.

    Args:
        method: `Default`, `Renormalize`, `DeepSeekV3`, `Llama4`, `RenormalizeNaive` or `TopK`.
        router_logits: (M, E), fp32, bf16 or fp16, on any device; M may be 0.
        top_k: k, at most E; 1 for `Llama4`.
        num_expert_group, topk_group: groups of E / num_expert_group neighbours, of which the best `topk_group` are
            kept; the others count as -inf. For the methods that score first: `Default`, `RenormalizeNaive`,
            `DeepSeekV3`. A group's score is the sum of its two best biased scores for `DeepSeekV3` and wherever a
            bias is given, else its best score.
        correction_bias: (E,), finite; added to the scores for the choice only, never to the weights.
        renormalize: `DeepSeekV3`'s weights divided by their sum, default True. The other methods' names say it,
            and a flag that contradicts the name is an error.
        routed_scaling_factor: multiplies the weights, last.

    Returns:
        topk_weights (M, k) fp32 and topk_ids (M, k) int32.

    Raises:
        ValueError: `Custom`, `Simulated` and `Unspecified`, which have no law of their own.
        InvalidMoEInput: (a ValueError) a shape, dtype, device or value is not what is expected here.
    """
    law = _law(method, top_k, renormalize, correction_bias is not None, num_expert_group is not None)
    _check_logits(router_logits, top_k)
    _check_groups(router_logits.shape[1], top_k, num_expert_group, topk_group)
    _check_bias(router_logits, correction_bias)
    factor = routed_scaling_factor
    if not isinstance(factor, int | float) or not (math.isfinite(factor) and factor > 0):
        raise InvalidMoEInput("routed_scaling_factor", repr(factor), "a finite factor above 0")

    logits = router_logits.float()
    scores = law.scoring(logits) if law.scores_first else logits
    two_best = method == RoutingMethodType.DeepSeekV3 or correction_bias is not None
    ids = _choose(scores, top_k, num_expert_group or 1, topk_group or 1, correction_bias, two_best)
    weights = scores.gather(-1, ids)
    if not law.scores_first:
        weights = law.scoring(weights)
    elif law.renormalize or (law.renormalize is None and renormalize is not False):
        total = weights.sum(dim=-1, keepdim=True)
        weights = torch.where(total > 0, weights / total, weights)
    weights = weights * factor
    broken = logits.isnan().any(dim=-1, keepdim=True)
    return weights.masked_fill(broken, math.nan), ids.to(torch.int32)


def grouped_topk(
    router_logits: Tensor,
    top_k: int,
    *,
    scoring: str,
    num_expert_group: int,
    topk_group: int,
    correction_bias: Tensor | None = None,
    renormalize: bool = True,
    routed_scaling_factor: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Grouped top-k by its scoring, "softmax" (DeepSeek-V2) or "sigmoid" (DeepSeek-V3); the rest as `route`.

    Raises:
        InvalidMoEInput: another scoring, and as `route`.
    """
    if scoring == "sigmoid":
        method = RoutingMethodType.DeepSeekV3
    elif scoring == "softmax":
        method = RoutingMethodType.RenormalizeNaive if renormalize else RoutingMethodType.Default
    else:
        raise InvalidMoEInput("scoring", repr(scoring), "'softmax' or 'sigmoid'")
    return route(
        method,
        router_logits,
        top_k,
        num_expert_group=num_expert_group,
        topk_group=topk_group,
        correction_bias=correction_bias,
        renormalize=renormalize,
        routed_scaling_factor=routed_scaling_factor,
    )


def routing_method_of(
    scoring: str,
    *,
    top_k: int,
    renormalize: bool,
    grouped: bool = False,
    custom: str | None = None,
    simulated: bool = False,
) -> RoutingMethodType:
    """The routing method that a layer reports to the selector (specification section 3.4, profile A).

    It is what the selector is told, which is not always the law that runs: softmax with grouped top-k reports
    `Unspecified`, and sigmoid with top-1 reports `Llama4`.

    Args:
        scoring: "softmax", "sigmoid", or any other name.
        grouped: grouped top-k; goes before `custom`.
        custom: "llama4" for Llama 4's router, any other text for another router of the model's own.
        simulated: a routing simulator is on; goes before everything.
    """
    if simulated:
        return RoutingMethodType.Simulated
    if grouped:
        return RoutingMethodType.DeepSeekV3 if scoring == "sigmoid" else RoutingMethodType.Unspecified
    if custom is not None:
        return RoutingMethodType.Llama4 if custom.lower() == "llama4" else RoutingMethodType.Custom
    if scoring == "sigmoid":
        return RoutingMethodType.Llama4 if top_k == 1 else RoutingMethodType.DeepSeekV3
    if scoring == "softmax":
        return RoutingMethodType.Renormalize if renormalize else RoutingMethodType.Default
    return RoutingMethodType.Unspecified


def _best(keys: Tensor, count: int) -> Tensor:
    """Positions of the `count` largest of each row; of equal ones, the lowest position."""
    return keys.sort(dim=-1, descending=True, stable=True).indices[..., :count]


def _choose(scores: Tensor, top_k: int, groups: int, kept_groups: int, bias: Tensor | None, two_best: bool) -> Tensor:
    keys = scores if bias is None else scores + bias.float()
    # A NaN ranks below every number and above a group that was not kept. Adding 0 turns -0 into 0: they are a tie.
    keys = keys.masked_fill(keys.isnan(), torch.finfo(torch.float32).min) + 0.0
    if kept_groups < groups:
        size = keys.shape[-1] // groups
        grouped = keys.reshape(*keys.shape[:-1], groups, size)
        of_group = grouped.topk(min(2, size), dim=-1).values.sum(dim=-1) if two_best else grouped.amax(dim=-1)
        dropped = torch.ones_like(of_group, dtype=torch.bool).scatter(-1, _best(of_group, kept_groups), False)
        keys = grouped.masked_fill(dropped.unsqueeze(-1), -math.inf).flatten(-2)
    return _best(keys, top_k)


def _law(method: RoutingMethodType, top_k: int, renormalize: bool | None, biased: bool, grouped: bool) -> _Method:
    try:
        method = RoutingMethodType(method)
    except ValueError:
        known = ", ".join(known.name for known in _METHODS)
        raise InvalidMoEInput("method", repr(method), f"a RoutingMethodType with a law: {known}") from None
    if method in _NO_LAW:
        raise ValueError(f"RoutingMethodType.{method.name}: {_NO_LAW[method]}")
    law, name = _METHODS[method], method.name
    if renormalize is not None and law.renormalize not in (None, bool(renormalize)):
        raise InvalidMoEInput(
            "renormalize", f"{renormalize} with {name}", f"{law.renormalize} or None, as its name says"
        )
    if (biased or grouped) and not law.scores_first:
        field = "correction_bias" if biased else "num_expert_group"
        expected = "None, or a method that scores before it chooses: RenormalizeNaive for Renormalize"
        raise InvalidMoEInput(field, f"given with {name}", expected)
    if law.only_top_1 and top_k != 1:
        raise InvalidMoEInput("top_k", f"{top_k} with {name}", "1")
    return law


def _check_count(field: str, value: int, limit: int, of_what: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= limit:
        raise InvalidMoEInput(field, repr(value), f"an integer from 1 to {limit}, {of_what}")


def _check_logits(logits: Tensor, top_k: int) -> None:
    if not isinstance(logits, Tensor):
        raise InvalidMoEInput("router_logits", f"a {type(logits).__name__}", "a tensor (M, E)")
    if logits.dim() != 2 or logits.shape[1] < 1:
        raise InvalidMoEInput("router_logits", f"of shape {tuple(logits.shape)}", "(M, E) with E >= 1")
    if logits.dtype not in LOGITS_DTYPES:
        raise InvalidMoEInput("router_logits", f"of dtype {logits.dtype}", "float32, bfloat16 or float16")
    _check_count("top_k", top_k, logits.shape[1], "the number of experts")


def _check_groups(experts: int, top_k: int, groups: int | None, kept: int | None) -> None:
    if groups is None and kept is None:
        return
    if groups is None or kept is None:
        raise InvalidMoEInput("num_expert_group", f"{groups} with topk_group={kept}", "both, or neither")
    _check_count("num_expert_group", groups, experts, "the number of experts")
    if experts % groups:
        raise InvalidMoEInput("num_expert_group", f"{groups}", f"a divisor of {experts}, the number of experts")
    _check_count("topk_group", kept, groups, "the number of groups")
    _check_count("top_k", top_k, kept * (experts // groups), f"the experts of {kept} groups of {experts // groups}")


def _check_bias(logits: Tensor, bias: Tensor | None) -> None:
    if bias is None:
        return
    expected = f"a tensor ({logits.shape[1]},), one value an expert"
    if not isinstance(bias, Tensor):
        raise InvalidMoEInput("correction_bias", f"a {type(bias).__name__}", expected)
    if tuple(bias.shape) != (logits.shape[1],):
        raise InvalidMoEInput("correction_bias", f"of shape {tuple(bias.shape)}", expected)
    if bias.dtype not in LOGITS_DTYPES:
        raise InvalidMoEInput("correction_bias", f"of dtype {bias.dtype}", "float32, bfloat16 or float16")
    if bias.device != logits.device:
        raise InvalidMoEInput("correction_bias", f"on {bias.device}", f"the device of router_logits, {logits.device}")
    capturing = bias.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    if not capturing and not bool(torch.isfinite(bias).all()):  # a capture forbids to look at values
        raise InvalidMoEInput("correction_bias", "not finite", "finite values")
