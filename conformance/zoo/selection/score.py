"""Judges mutants of the selector by the checks of selection: who is convicted, by which invariant, where, how fast."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from time import perf_counter

from conformance.selection.smoke import Smoke, smoke
from conformance.selection.violations import Violation
from conformance.zoo.selection.plant import SelectorMutant


@dataclass(frozen=True)
class Conviction:
    """A broken invariant of a mutant."""

    mutant: str
    violation: Violation
    seconds: float

    @property
    def killed_by(self) -> str:
        return self.violation.invariant

    @property
    def cell(self) -> str:
        return self.violation.cell


@dataclass(frozen=True)
class Survival:
    """A mutant that was not convicted; ``why`` is "" where every invariant held, else what broke in the suite."""

    mutant: str
    seconds: float
    why: str = ""


def kill(mutant: SelectorMutant, sample: Smoke | None = None) -> Conviction | None:
    """Runs the checks until the first broken invariant.

    Args:
        mutant: to be judged.
        sample: of the grid; default the one that is made once a process.

    Returns:
        The conviction, or None where every invariant holds.

    Raises:
        Exception: of the suite's own code; it convicts nobody.
    """
    checks = smoke() if sample is None else sample
    start = perf_counter()
    violation = checks.first_violation(*mutant.make())
    return None if violation is None else Conviction(mutant.name, violation, perf_counter() - start)


def score(mutants: Iterable[SelectorMutant], sample: Smoke | None = None) -> Iterator[Conviction | Survival]:
    """Judges one mutant after the other; an exception of the suite's own code counts as survival."""
    for mutant in mutants:
        start = perf_counter()
        try:
            conviction = kill(mutant, sample)
        except Exception as error:
            yield Survival(mutant.name, perf_counter() - start, f"{type(error).__name__}: {error}")
        else:
            yield conviction or Survival(mutant.name, perf_counter() - start)
