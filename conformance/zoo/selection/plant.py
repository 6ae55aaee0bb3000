"""A defect of the selector, and the ways to plant one: each gives a pair (select, explain) that is honest but for it.

Nothing of fp8moe is changed: a mutant stands around the honest functions, or passes them candidates of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from conformance.selection.explanations import Explain
from conformance.selection.runner import Select
from fp8moe import BackendSpec, FusedMoEConfig, Platform, QuantKey, Selection, Support
from fp8moe import explain_fp8_moe_backend as explain
from fp8moe import select_fp8_moe_backend as select
from fp8moe.registry import seed_backends

Pair = tuple[Select, Explain]
Make = Callable[[], Pair]


@dataclass(frozen=True)
class SelectorMutant:
    """One defect of a selector.

    Args:
        name: of the mutant.
        catalogue: id in the fault catalogue of real defects, or in words the sentence of the specification it breaks.
        does: what goes wrong, one sentence.
        make: a new (select, explain), with a state of its own where it has one.
        witness: id of a cell at which it answers otherwise than the honest selector.
    """

    name: str
    catalogue: str
    does: str
    make: Make
    witness: str


class Call(NamedTuple):
    """The arguments of a call; the candidates are given, never the registry's."""

    config: FusedMoEConfig
    weight_key: QuantKey | None
    activation_key: QuantKey | None
    allow_vllm_cutlass: bool
    platform: Platform
    env: Mapping[str, str]
    backends: Sequence[BackendSpec]

    def names(self) -> list[str]:
        return [spec.name for spec in self.backends]

    def spec(self, name: str) -> BackendSpec:
        """The candidate of this name, or the registry's where it is not among them."""
        return next(spec for spec in (*self.backends, *seed_backends()) if spec.name == name)


Ending = tuple[Any, Any] | Exception
"""How a selection ends: what ``select`` returns or raises."""


def selected(call: Call) -> tuple[Any, Any]:
    """The honest answer."""
    return select(*call[:4], platform=call.platform, env=call.env, backends=call.backends)


def explained(call: Call) -> Selection:
    """The honest explanation."""
    return explain(*call[:4], platform=call.platform, env=call.env, backends=call.backends)


def ending(call: Call) -> Ending:
    """How the honest selection ends."""
    try:
        return selected(call)
    except Exception as error:
        return error


def function(ask: Callable[[Call], Any]) -> Callable[..., Any]:
    """A function with the selector's signature."""

    def ask_with(
        config: FusedMoEConfig,
        weight_key: QuantKey | None,
        activation_key: QuantKey | None,
        allow_vllm_cutlass: bool = False,
        *,
        platform: Platform,
        env: Mapping[str, str],
        backends: Sequence[BackendSpec] | None = None,
    ) -> Any:
        given = seed_backends() if backends is None else backends
        return ask(Call(config, weight_key, activation_key, allow_vllm_cutlass, platform, env, given))

    return ask_with


def seeing(change: Callable[[Call], Call]) -> Make:
    """Both functions see another call than was made."""
    return lambda: (
        function(lambda call: selected(change(call))),
        function(lambda call: explained(change(call))),
    )


def reading(change: Callable[[dict[str, str]], Any]) -> Make:
    """Both functions read another environment: ``change`` edits a copy."""

    def changed(call: Call) -> Call:
        env = dict(call.env)
        change(env)
        return call._replace(env=env)

    return seeing(changed)


def considering(change: Callable[[tuple[BackendSpec, ...]], Sequence[BackendSpec]]) -> Make:
    """Both functions consider other candidates, or the same in another order."""

    def make() -> Pair:
        candidates = _once_each(change)
        return seeing(lambda call: call._replace(backends=candidates(call.backends)))()

    return make


def _once_each(
    change: Callable[[tuple[BackendSpec, ...]], Sequence[BackendSpec]],
) -> Callable[[Sequence[BackendSpec]], tuple[BackendSpec, ...]]:
    """The change of a sequence; of a tuple that comes again it is kept, as the selector compiles each tuple once."""
    known: dict[int, tuple[Sequence[BackendSpec], tuple[BackendSpec, ...]]] = {}

    def changed(given: Sequence[BackendSpec]) -> tuple[BackendSpec, ...]:
        found = known.get(id(given))
        if found is not None and found[0] is given:
            return found[1]
        candidates = tuple(change(tuple(given)))
        if isinstance(given, tuple):
            known[id(given)] = (given, candidates)
        return candidates

    return changed


def either(condition: Callable[[Call], bool], first: Make, second: Make) -> Make:
    """One pair where a condition on the call holds, another where it does not."""

    def make() -> Pair:
        pairs = first(), second()

        def ask(which: int) -> Callable[..., Any]:
            def answer(call: Call) -> Any:
                asked = pairs[0 if condition(call) else 1][which]
                return asked(*call[:4], platform=call.platform, env=call.env, backends=call.backends)

            return function(answer)

        return ask(0), ask(1)

    return make


def answering(change: Callable[[Call, Ending], Ending]) -> Make:
    """Both functions end otherwise; the explanation's verdicts are the honest ones."""

    def answer(call: Call) -> tuple[Any, Any]:
        end = change(call, ending(call))
        if isinstance(end, Exception):
            raise end
        return end

    def explanation(call: Call) -> Selection:
        found = explained(call)
        before: Ending = (found.backend, found.experts_cls) if found.error is None else found.error
        end = change(call, before)
        if end is before:
            return found
        if isinstance(end, Exception):
            return replace(found, backend=None, experts_cls=None, error=end)
        return replace(found, backend=end[0], experts_cls=end[1], error=None)

    return lambda: (function(answer), function(explanation))


def failing(change: Callable[[Call, Exception], Exception]) -> Make:
    """Both functions fail with another error where they fail."""
    return answering(lambda call, end: change(call, end) if isinstance(end, Exception) else end)


def explaining(change: Callable[[Call, Selection], Selection]) -> Make:
    """Only the explanation is wrong."""
    return lambda: (function(selected), function(lambda call: change(call, explained(call))))


def supporting(change: Callable[[str, Support], Support]) -> Make:
    """Both functions ask other predicates: ``change`` gets each backend's name and what it declares to support."""

    def make() -> Pair:
        planted: dict[BackendSpec, BackendSpec] = {}
        honest: dict[type, type] = {}

        def plant(spec: BackendSpec) -> BackendSpec:
            cls = spec.experts_cls
            if cls.support is None:
                return spec
            if spec not in planted:
                mutant = type(cls.__name__, (cls,), {"support": change(spec.name, cls.support)})
                planted[spec] = replace(spec, experts_cls=mutant)
                honest[mutant] = cls
            return planted[spec]

        candidates = _once_each(lambda given: tuple(map(plant, given)))

        def changed(call: Call) -> Call:
            return call._replace(backends=candidates(call.backends))

        def answer(call: Call) -> tuple[Any, Any]:
            backend, cls = selected(changed(call))
            return backend, honest.get(cls, cls)

        def explanation(call: Call) -> Selection:
            found = explained(changed(call))
            cls = found.experts_cls
            return found if cls is None else replace(found, experts_cls=honest.get(cls, cls))

        return function(answer), function(explanation)

    return make


def support_of(*names: str, **changed: Any) -> Make:
    """These backends declare something else: fields of ``Support`` by name, each a value or a function of the field."""

    def change(name: str, support: Support) -> Support:
        if name not in names:
            return support
        return replace(support, **{field: make(getattr(support, field)) for field, make in changed.items()})

    return supporting(change)
