"""A fault written as the one method that it overrides, and what such methods count."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from conformance.cases import Case
from conformance.zoo.plant import ORDINARY, ExpertsClass, Fault


def overriding(
    stage: str,
    does: str,
    *,
    catalogue: str = "",
    subtle: bool = False,
    witness: Case = ORDINARY,
    shows: str = "output",
    format: str = "Standard",
    needs: str = "",
) -> Callable[[Callable[..., Any]], Fault]:
    """Makes a fault of a function, and names it after the function.

    Args:
        stage: the method that a mutant overrides. The function gets the class's own, unbound, then what it takes.
        does, catalogue, subtle, witness, shows, format, needs: as `Fault`.
    """

    def made(wrong: Callable[..., Any]) -> Fault:
        def members(base: ExpertsClass) -> dict[str, Any]:
            right = getattr(base, stage)

            def method(self: Any, *args: Any, **kwargs: Any) -> Any:
                return wrong(right, self, *args, **kwargs)

            return {stage: method}

        name: str = wrong.__name__  # type: ignore[attr-defined, unused-ignore]
        return Fault(name, catalogue, does, subtle, members, witness, shows, format, needs)

    return made


def nth(self: Any, what: str) -> int:
    """How many times this was asked of a backend, this time included."""
    asked: dict[str, int] = vars(self).setdefault("_asked", {})
    asked[what] = asked.get(what, 0) + 1
    return asked[what]
