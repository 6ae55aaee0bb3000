"""The two calls that a check holds against each other: of which a mismatch is told, and which a dump holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from conformance.bounds import allowance_for
from conformance.bounds.statistics import element_bound
from conformance.build import CaseTensors
from fp8moe.recipe import Arithmetic
from fp8moe.reference.recipe import RecipeTrace

Call = tuple[CaseTensors, Tensor]
"""What a call was given, and its output, (M, H)."""


ONLY = "only"


@dataclass(frozen=True, eq=False)
class Compared:
    """What was held against what, last of all.

    Args:
        second: what the second call was given; the only one, where an output is judged by itself.
        what: how the second differs from the first, as the reason of a failure says it.
        got: the second's output, or `rows` of it; None where the call did not come to its end.
        first: what the first call was given.
        first_got: its output, unless it is the case's own call.
        expected: the bits that `got` must have.
        rows: int64, which rows of the call were compared; None: all.
        at_first: the bound convicts the first call itself, and the rows and the trace are of it.
        row: of that call, the one with the mismatch.
        trace, arithmetic: what it was judged by, where it was the bound.
    """

    second: CaseTensors
    what: str = ""
    got: Tensor | None = None
    first: CaseTensors | None = None
    first_got: Tensor | None = None
    expected: Tensor | None = None
    rows: Tensor | None = None
    at_first: bool = False
    row: int | None = None
    trace: RecipeTrace | None = None
    arithmetic: Arithmetic | None = None

    @property
    def last(self) -> str:
        """The second call's name, which is the only one's where there is no first."""
        return ONLY if self.first is None else "second"

    @property
    def shown(self) -> CaseTensors:
        """What the call with the mismatch was given."""
        return self.first if self.at_first and self.first is not None else self.second

    def told(self, own: CaseTensors) -> Mapping[str, str]:
        """Each call in words, by its name."""
        found = {} if self.first is None else {"first": _plain(self.first, own)}
        return found | {self.last: self.what or _plain(self.second, own)}

    def tensors(self) -> Mapping[str, Mapping[str, Tensor]]:
        """All that is known of each call, by its name and the call's."""
        found: dict[str, dict[str, Tensor]] = {}
        for name, given, got in (("first", self.first, self.first_got), (self.last, self.second, self.got)):
            if given is not None:
                found[name] = given.named() | ({} if got is None else {"got": got})
        judged: dict[str, Tensor] = {} if self.rows is None else {"rows": self.rows}
        if self.trace is not None:
            total = allowance_for(self.trace, self.arithmetic).total
            bound = element_bound(self.trace.smooth, total, self.trace.problem.carrier)
            judged |= {"expected": self.trace.smooth.double(), "bound": bound.double()}
        elif self.expected is not None:
            judged["expected"] = self.expected
        found["first" if self.at_first else self.last] |= judged
        return found


def _plain(given: CaseTensors, own: CaseTensors) -> str:
    return "the case's own" if given is own else "a changed one"


class LastCompared:
    """Keeps what was compared last, where that is asked for: it may be large."""

    def __init__(self) -> None:
        self.kept = False
        self.found: Compared | None = None

    def begin(self, second: CaseTensors, what: str = "", got: Tensor | None = None, **others: Any) -> None:
        """What is held against what from here on; `others` as `Compared` has them."""
        if self.kept:
            self.found = Compared(second, what, got, **others)

    def add(self, **known: Any) -> None:
        """What is known besides."""
        if self.found is not None:
            self.found = replace(self.found, **known)

    def differs(self, row: int) -> None:
        """The mismatch is in this one of the rows that were compared."""
        if self.found is not None:
            self.add(row=row if self.found.rows is None else int(self.found.rows[row]))
