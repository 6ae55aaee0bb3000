"""A case's tensors and what they must come to, kept for whoever asks again: every backend, and every mutant."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from conformance.build import CaseTensors, build, judged_tokens
from conformance.cases import Case
from fp8moe.recipe import FP32, Arithmetic, Recipe, Steps
from fp8moe.reference.ideal import ideal_moe
from fp8moe.reference.recipe import RecipeTrace, recipe_moe
from fp8moe.reference.replay import Replay, replay_moe
from fp8moe.schemes import SCHEMES, TENSOR_DYNAMIC

KEPT_CASES = 32
REPLAYED_WHOLE, REPLAYED_WHOLE_ON_CPU = 1 << 30, 1 << 25
"""Up to so many products all tokens of a case are replayed; of larger ones some are, and relations do the rest."""


@dataclass(frozen=True, eq=False)
class Oracles:
    """What a case must come to, for its judged tokens."""

    tokens: Tensor
    trace: RecipeTrace
    replays: dict[tuple[Arithmetic, Steps], Replay] = field(default_factory=dict)

    @cached_property
    def ideal(self) -> Tensor:
        call = self.trace.problem
        return ideal_moe(
            call.config,
            call.quant,
            call.weights,
            call.hidden_states,
            call.topk_weights,
            call.topk_ids,
            expert_map=call.expert_map,
            apply_router_weight_on_input=call.apply_router_weight_on_input,
            tokens=self.tokens,
        )

    def replay(self, arithmetic: Arithmetic, steps: Steps) -> Replay:
        """Computed once for each declared arithmetic."""
        if (arithmetic, steps) not in self.replays:
            self.replays[arithmetic, steps] = replay_moe(self.trace, arithmetic, steps)
        return self.replays[arithmetic, steps]


def is_small(case: Case) -> bool:
    return case.weight_bytes <= 1 << 22 and case.tokens * case.hidden <= 1 << 20


def tensors_of(case: Case, device: str) -> CaseTensors:
    """The case's tensors on a device."""
    return (_small_tensors if is_small(case) else _large_tensors)(str(case), device)


def trace_of(tensors: CaseTensors, recipe: Recipe, tokens: Tensor | None = None) -> RecipeTrace:
    """The recipe oracle of a case's call, for some of its tokens or all."""
    return recipe_moe(
        tensors.config,
        tensors.quant,
        recipe,
        tensors.weights,
        tensors.hidden_states,
        tensors.topk_weights,
        tensors.topk_ids,
        expert_map=tensors.expert_map,
        apply_router_weight_on_input=tensors.apply_router_weight_on_input,
        tokens=tokens,
    )


def oracles_of(case: Case, recipe: Recipe, arithmetic: Arithmetic | None, device: str, *, by_bits: bool) -> Oracles:
    """The oracles of a case under a recipe; of all its tokens, where they are replayed and the products are few."""
    products = case.tokens * case.top_k * case.hidden * case.inter * (3 if case.gated else 2)
    everything = by_bits and products <= (REPLAYED_WHOLE_ON_CPU if device == "cpu" else REPLAYED_WHOLE)
    if SCHEMES[case.scheme] != TENSOR_DYNAMIC:  # the only scheme in which what shares a tensor's scale plays a part
        recipe = replace(recipe, dynamic_tensor_scope=Recipe().dynamic_tensor_scope)
    kept = _small_oracles if is_small(case) else _large_oracles
    return kept(str(case), recipe, oracle_device(case, arithmetic, device), everything)


def oracle_device(case: Case, arithmetic: Arithmetic | None, device: str) -> str:
    """Where the oracles of a case compute. Its tensors have the same bits on every device, and a small case is a
    thousand tiny operations, which a CPU has done before a GPU has launched them; but for the bound of a matrix unit,
    which adds up every group of its terms."""
    fp32 = arithmetic is not None and arithmetic.unit == FP32.unit
    return "cpu" if is_small(case) and fp32 else device


def forget() -> None:
    """Drops every kept case."""
    for kept in (_small_tensors, _large_tensors, _small_oracles, _large_oracles):
        kept.cache_clear()


def _build(text: str, device: str) -> CaseTensors:
    return build(Case.parse(text), device)


def _compute(text: str, recipe: Recipe, device: str, everything: bool) -> Oracles:
    case = Case.parse(text)
    tensors = tensors_of(case, device)
    tokens = torch.arange(case.tokens, device=device) if everything else judged_tokens(case).to(device)
    return Oracles(tokens, trace_of(tensors, recipe, tokens))


_small_tensors = lru_cache(maxsize=KEPT_CASES)(_build)
_large_tensors = lru_cache(maxsize=1)(_build)
_small_oracles = lru_cache(maxsize=KEPT_CASES)(_compute)
_large_oracles = lru_cache(maxsize=2)(_compute)
