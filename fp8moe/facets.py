"""The facets of a configuration that selection looks at, interned so that they serve as a fast key."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fp8moe.config import FusedMoEActivationFormat, FusedMoEConfig, FusedMoEParallelConfig, RoutingMethodType

INTERNED_AT_MOST = 1 << 16


class SelectionFacets:
    """What the support predicates read of a `FusedMoEConfig`; equal configurations share one instance.

    Sizes, expert counts, top-k, bias and dtypes of the activations are not here: no predicate of the
    specification reads them (section 2.0).
    """

    __slots__ = (
        "activation",
        "activation_format",
        "is_act_and_mul",
        "is_lora_enabled",
        "parallel",
        "router_logits_dtype",
        "routing_method",
    )

    activation: str
    activation_format: FusedMoEActivationFormat
    is_act_and_mul: bool
    is_lora_enabled: bool
    parallel: FusedMoEParallelConfig
    router_logits_dtype: Any
    routing_method: RoutingMethodType

    @classmethod
    def of(cls, config: FusedMoEConfig) -> SelectionFacets:
        key = (
            config.is_act_and_mul,
            config.activation,
            config.moe_parallel_config,
            config.routing_method,
            config.router_logits_dtype,
            config.is_lora_enabled,
        )
        found = _INTERNED.get(key)
        if found is None:
            if len(_INTERNED) >= INTERNED_AT_MOST:
                _INTERNED.clear()
            found = cls()
            found.is_act_and_mul = bool(config.is_act_and_mul)
            found.activation = config.activation
            found.parallel = config.moe_parallel_config
            found.routing_method = config.routing_method
            found.router_logits_dtype = config.router_logits_dtype
            found.is_lora_enabled = bool(config.is_lora_enabled)
            found.activation_format = config.moe_parallel_config.activation_format
            _INTERNED[key] = found
        return found


_INTERNED: dict[tuple[Any, ...], SelectionFacets] = {}
