"""What a backend declares to support, as data, and the ordered checks that walk over it (specification section 2)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fp8moe.config import FusedMoEActivationFormat, FusedMoEParallelConfig, RoutingMethodType
from fp8moe.envs import Env
from fp8moe.facets import SelectionFacets
from fp8moe.keys import QuantKey
from fp8moe.platforms import Platform
from fp8moe.registry import Reason
from fp8moe.schemes import Scheme, scheme_name


def always(*_: Any) -> bool:
    """A check that every configuration passes."""
    return True


@dataclass(frozen=True)
class Support:
    """A backend's support, one field for each check; all are pure functions of their arguments.

    Args:
        device: of the platform and of the environment's snapshot.
        needs: what `device` asks for, in words, for explanations.
        scheme: of the platform, the weight key and the activation key.
        activations: names of the supported activations.
        activation_format: the layout the class takes.
        parallel: of the parallel configuration.
        non_gated: whether `is_act_and_mul=False` is accepted.
        routing: of the routing method and the two keys.
        logits_dtype: of the routing method and the dtype of the router's logits.
    """

    device: Callable[[Platform, Env], bool]
    needs: str
    scheme: Callable[[Platform, QuantKey | None, QuantKey | None], bool]
    activations: frozenset[str]
    activation_format: FusedMoEActivationFormat
    parallel: Callable[[FusedMoEParallelConfig], bool] = always
    non_gated: bool = False
    routing: Callable[[RoutingMethodType, QuantKey | None, QuantKey | None], bool] = always
    logits_dtype: Callable[[RoutingMethodType, Any], bool] = always

    def first_refusal(
        self,
        platform: Platform,
        env: Env,
        facets: SelectionFacets,
        weight_key: QuantKey | None,
        activation_key: QuantKey | None,
        activation_format: FusedMoEActivationFormat | None = None,
    ) -> Reason | None:
        """The first check that fails, or None; `activation_format` is the layout asked for (default: the facets').

        Raises:
            MalformedVariable: the device check reads a variable that holds nonsense.
        """
        if not self.device(platform, env):
            return Reason.DEVICE
        if not (facets.is_act_and_mul or self.non_gated):
            return Reason.GATING
        if facets.activation not in self.activations:
            return Reason.ACTIVATION
        if not self.scheme(platform, weight_key, activation_key):
            return Reason.SCHEME
        if not self.parallel(facets.parallel):
            return Reason.PARALLEL
        if not self.routing(facets.routing_method, weight_key, activation_key):
            return Reason.ROUTING
        if (activation_format or facets.activation_format) is not self.activation_format:
            return Reason.FORMAT
        if not self.logits_dtype(facets.routing_method, facets.router_logits_dtype):
            return Reason.LOGITS_DTYPE
        return None

    # The same checks, grouped by what they read, so that the selector can keep each group's answer.

    def takes_device_and_scheme(
        self, platform: Platform, env: Env, weight_key: QuantKey | None, activation_key: QuantKey | None
    ) -> bool:
        return self.device(platform, env) and self.scheme(platform, weight_key, activation_key)

    def takes_layer(self, facets: SelectionFacets) -> bool:
        return (
            (facets.is_act_and_mul or self.non_gated)
            and facets.activation in self.activations
            and self.parallel(facets.parallel)
            and facets.activation_format is self.activation_format
            and self.logits_dtype(facets.routing_method, facets.router_logits_dtype)
        )

    def takes_routing(
        self, method: RoutingMethodType, weight_key: QuantKey | None, activation_key: QuantKey | None
    ) -> bool:
        return self.routing(method, weight_key, activation_key)

    def and_fallback(self, fallback: Support) -> Support:
        """A composite that may run either: supported where both are (specification section 2.1, composite rule).

        Raises:
            ValueError: the two take different layouts.
        """
        if self.activation_format is not fallback.activation_format:
            raise ValueError(
                f"a composite of {self.activation_format} and {fallback.activation_format}: expected one layout"
            )
        return Support(
            device=lambda platform, env: self.device(platform, env) and fallback.device(platform, env),
            needs=self.needs,
            scheme=lambda platform, w, a: self.scheme(platform, w, a) and fallback.scheme(platform, w, a),
            activations=self.activations & fallback.activations,
            activation_format=self.activation_format,
            parallel=lambda parallel: self.parallel(parallel) and fallback.parallel(parallel),
            non_gated=self.non_gated and fallback.non_gated,
            routing=lambda method, w, a: self.routing(method, w, a) and fallback.routing(method, w, a),
            logits_dtype=lambda method, dtype: (
                self.logits_dtype(method, dtype) and fallback.logits_dtype(method, dtype)
            ),
        )


def describe(reason: Reason, support: Support, platform: Platform, facets: SelectionFacets, scheme: Scheme) -> str:
    """One sentence for a person: what the backend lacks, and what it would take."""
    method = getattr(facets.routing_method, "name", facets.routing_method)
    match reason:
        case Reason.DEVICE:
            return f"needs {support.needs}; here: {platform}"
        case Reason.GATING:
            return "has no support for an MLP that is not gated (is_act_and_mul=False)"
        case Reason.ACTIVATION:
            return f"has no {facets.activation!r} activation; has {', '.join(sorted(support.activations))}"
        case Reason.SCHEME:
            return f"does not take the quantization scheme {scheme_name(*scheme)} on {platform.architecture}"
        case Reason.PARALLEL:
            parallel = facets.parallel
            return (
                f"does not take this parallel config (all2all_backend={parallel.all2all_backend!r}, "
                f"dp={parallel.dp_size}, ep={parallel.ep_size}, use_ep={parallel.use_ep}, "
                f"sequence parallel={parallel.is_sequence_parallel}, EPLB={parallel.enable_eplb})"
            )
        case Reason.ROUTING:
            return f"does not take the routing method {method}"
        case Reason.FORMAT:
            (takes,), (given,) = support.activation_format.value, facets.activation_format.value
            return f"takes the {takes!r} activation format, not {given!r}"
        case Reason.LOGITS_DTYPE:
            return f"does not take {facets.router_logits_dtype} router logits with {method} routing"
    raise AssertionError(f"{reason} is the selector's own, not a predicate's")
