"""A sequence of backends compiled for selection: bit i of every mask is the i-th candidate.

Nothing here decides: the checks are those of each backend's `Support` (or its own `is_supported_config`), asked
once for each group of inputs they read and kept as masks, because inputs are frozen and repeat.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fp8moe.config import FusedMoEConfig
from fp8moe.envs import Env, MalformedVariable
from fp8moe.experts import FusedMoEPermuteExpertsUnpermute
from fp8moe.facets import SelectionFacets
from fp8moe.keys import QuantKey
from fp8moe.platforms import Platform
from fp8moe.registry import AnyBackend, BackendContractError, BackendSpec, Reason
from fp8moe.support import Support, describe
from fp8moe.texts import said

KEPT_AT_MOST = 1 << 17


class Candidates:
    """Backends in the order in which they are considered.

    Raises:
        BackendContractError: two candidates of one name.
    """

    def __init__(self, specs: Sequence[BackendSpec]) -> None:
        self.specs = tuple(specs)
        self.index = {spec.name: position for position, spec in enumerate(self.specs)}
        if len(self.index) != len(self.specs):
            names = [spec.name for spec in self.specs]
            twice = sorted({name for name in names if names.count(name) > 1})
            raise BackendContractError(f"backends={names}: {', '.join(twice)} given more than once")
        self.results: list[tuple[AnyBackend, type[FusedMoEPermuteExpertsUnpermute] | None]] = [
            (spec.backend, spec.experts_cls if spec.returns_class else None) for spec in self.specs
        ]
        self.all = (1 << len(self.specs)) - 1
        self.flashinfer = self.mask("FLASHINFER_TRTLLM", "FLASHINFER_CUTLASS")
        self.deep_gemm = self.mask("DEEPGEMM", "BATCHED_DEEPGEMM")
        self.aiter = self.mask("AITER")
        self.vllm_cutlass = self.mask("VLLM_CUTLASS", "BATCHED_VLLM_CUTLASS")
        self._supports: list[Support | None] = [_declared_support(spec) for spec in self.specs]
        self.opaque = sum(1 << i for i, support in enumerate(self._supports) if support is None)
        """Candidates with a predicate of their own; it is asked when the scan reaches them."""
        self._by_device: dict[Any, int] = {}
        self._by_layer: dict[SelectionFacets, int] = {}
        self._by_routing: dict[Any, int] = {}

    def mask(self, *names: str) -> int:
        """The bits of those of `names` that are candidates."""
        return sum(1 << self.index[name] for name in names if name in self.index)

    def names(self, mask: int) -> list[str]:
        return [spec.name for position, spec in enumerate(self.specs) if mask >> position & 1]

    def supported(
        self,
        platform: Platform,
        env: Env,
        facets: SelectionFacets,
        weight_key: QuantKey | None,
        activation_key: QuantKey | None,
    ) -> int:
        """The candidates whose declared support takes this configuration; opaque ones are left out."""
        device_key = (platform, env.device_bits, weight_key, activation_key)
        device = self._by_device.get(device_key)
        if device is None:
            device = self._ask(
                self._by_device,
                device_key,
                lambda support: _takes(support, platform, env, weight_key, activation_key),
            )
        layer = self._by_layer.get(facets)
        if layer is None:
            layer = self._ask(self._by_layer, facets, lambda support: support.takes_layer(facets))
        method = facets.routing_method
        routing_key = (method, weight_key, activation_key)
        routing = self._by_routing.get(routing_key)
        if routing is None:
            routing = self._ask(
                self._by_routing,
                routing_key,
                lambda support: support.takes_routing(method, weight_key, activation_key),
            )
        return device & layer & routing

    def _ask(self, kept: dict[Any, int], key: Any, takes: Any) -> int:
        if len(kept) >= KEPT_AT_MOST:
            kept.clear()
        found = sum(
            1 << position for position, support in enumerate(self._supports) if support is not None and takes(support)
        )
        kept[key] = found
        return found

    def refusal(
        self,
        position: int,
        platform: Platform,
        env: Env,
        config: FusedMoEConfig,
        weight_key: QuantKey | None,
        activation_key: QuantKey | None,
    ) -> tuple[Reason | None, str]:
        """Why the candidate at `position` is refused, and the sentence for it; (None, "") where it is supported.

        Raises:
            MalformedVariable: the predicate reads a variable that holds nonsense.
            BackendContractError: the candidate's own predicate raised, or answered in another form.
        """
        facets = config.facets
        support = self._supports[position]
        if support is not None:
            reason = support.first_refusal(platform, env, facets, weight_key, activation_key)
            if reason is None:
                return None, ""
            return reason, describe(reason, support, platform, facets, (weight_key, activation_key))
        return _ask_own_predicate(self.specs[position], platform, env, config, weight_key, activation_key)


def _takes(
    support: Support, platform: Platform, env: Env, weight_key: QuantKey | None, activation_key: QuantKey | None
) -> bool:
    """A device check that meets a malformed variable counts as a refusal here: the rules raise before they get to it,
    or never ask for this backend (see `Env.device_bits`)."""
    try:
        return support.takes_device_and_scheme(platform, env, weight_key, activation_key)
    except MalformedVariable:
        return False


def _declared_support(spec: BackendSpec) -> Support | None:
    """The class's `support`, unless the class answers with a predicate of its own."""
    cls = spec.experts_cls
    if cls.is_supported_config is not FusedMoEPermuteExpertsUnpermute.is_supported_config:
        return None
    return cls.support


def _ask_own_predicate(
    spec: BackendSpec,
    platform: Platform,
    env: Env,
    config: FusedMoEConfig,
    weight_key: QuantKey | None,
    activation_key: QuantKey | None,
) -> tuple[Reason | None, str]:
    cls = spec.experts_cls
    where = f"backend {spec.name!r}: {cls.__name__}.is_supported_config"
    layout = config.moe_parallel_config.activation_format
    try:
        answer = cls.is_supported_config(cls, config, weight_key, activation_key, layout, platform=platform, env=env)
        supported, reason = answer
    except MalformedVariable:
        raise
    except (Exception, SystemExit) as error:
        raise BackendContractError(f"{where} raised {said(error)}") from error
    if supported:
        return None, ""
    if not isinstance(reason, Reason):
        raise BackendContractError(f"{where} refused with {reason!r}: expected a fp8moe.Reason")
    return reason, f"its own predicate refuses with {reason.value}"


def compiled(backends: Sequence[BackendSpec]) -> Candidates:
    """The candidates of a sequence; a tuple that comes again is compiled once, and told by its identity."""
    found = _COMPILED.get(id(backends))
    if found is not None and found[0] is backends:
        return found[1]
    candidates = Candidates(backends)
    if type(backends) is tuple:  # immutable, and kept alive by the entry, so that its id stays its own
        if len(_COMPILED) >= 1024:
            _COMPILED.clear()
        _COMPILED[id(backends)] = (backends, candidates)
    return candidates


_COMPILED: dict[int, tuple[tuple[BackendSpec, ...], Candidates]] = {}
