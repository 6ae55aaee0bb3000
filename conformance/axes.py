"""The configuration space that coverage is counted over: its axes, what cannot go together, and why.

Values are those of a `Case`'s fields. What is large is left to the published models: here every combination counts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product

import numpy as np
from numpy.typing import NDArray

from conformance.cases import Case
from conformance.vocabulary import DTYPES, LAWS, LAYOUTS, SCHEME_NAMES, VALUES
from fp8moe.config import ACTIVATIONS

Value = str | int | bool | None

AXES: Mapping[str, tuple[Value, ...]] = {
    "scheme": SCHEME_NAMES,
    "activation": ACTIVATIONS,
    "dtype": DTYPES,
    "law": LAWS,
    "values": VALUES,
    "tokens": (16, 0, 1, 2, 15, 17, 33, 64, 65, 130),
    "experts": (8, 1, 2, 5, 16, 36),
    "top_k": (2, 1, 3, 6, 8),
    "hidden": (256, 128, 144, 272, 512),
    "inter": (256, 128, 72, 200, 384),
    "ep": (None, "2:0", "2:1", "4:3"),
    "bias": (False, True),
    "weight_on_input": (False, True),
    "layout": LAYOUTS,
    "fnuz": (False, True),
}
"""Each field that a configuration varies in, and its values, the default of a case first."""


@dataclass(frozen=True)
class Exclusion:
    """Values of some axes that no case has together.

    Args:
        axes: their names, in the order of `AXES`.
        excludes: from their values whether they are excluded.
        reason: why.
    """

    axes: tuple[str, ...]
    excludes: Callable[..., bool]
    reason: str


def _ep_size(ep: str | None) -> int:
    return 1 if ep is None else int(ep.partition(":")[0])


EXCLUSIONS = (
    Exclusion(("experts", "top_k"), lambda experts, top_k: top_k > experts, "a token has at most as many slots"),
    Exclusion(("experts", "ep"), lambda experts, ep: experts % _ep_size(ep) != 0, "experts are split evenly"),
    Exclusion(
        ("top_k", "weight_on_input"),
        lambda top_k, on: on and top_k != 1,
        "only a single slot's weight can be put there",
    ),
    Exclusion(("law", "top_k"), lambda law, top_k: law == "repeated" and top_k < 2, "a single slot repeats nothing"),
    Exclusion(
        ("law", "experts", "top_k"),
        lambda law, experts, top_k: law == "empty" and (experts < 2 or top_k > experts - experts // 2),
        "half of the experts have no token, and the others must fill the slots",
    ),
    Exclusion(("scheme", "fnuz"), lambda scheme, fnuz: fnuz and scheme == "none", "its weights are not FP8"),
)


class Space:
    """The axes as far as one backend takes them, and which of their values go together.

    Args:
        takes: the activations that the backend takes, by scheme.
        fnuz: whether FP8 weights may be e4m3fnuz.

    Attributes:
        names: of the axes, in order.
        values: of each axis.
        constrained: positions of the axes that exclusions speak of.
        possible: for every combination of their values whether some case has it, one dimension an axis.
    """

    def __init__(self, takes: Mapping[str, Sequence[str]], *, fnuz: bool) -> None:
        activations = tuple(name for name in ACTIVATIONS if any(name in taken for taken in takes.values()))
        given: dict[str, tuple[Value, ...]] = {"scheme": tuple(takes), "activation": activations}
        if not fnuz:
            given["fnuz"] = (False,)
        refused = Exclusion(
            ("scheme", "activation"),
            lambda scheme, activation: activation not in takes.get(scheme, activations),
            "the backend does not take it there",
        )
        self.exclusions = (refused, *EXCLUSIONS)
        self.names = tuple(AXES)
        self.values = tuple(given.get(name, AXES[name]) for name in self.names)
        spoken_of = {name for exclusion in self.exclusions for name in exclusion.axes}
        self.constrained = tuple(place for place, name in enumerate(self.names) if name in spoken_of)
        self.possible: NDArray[np.bool_] = np.ones([len(self.values[place]) for place in self.constrained], dtype=bool)
        for exclusion in self.exclusions:
            self.possible &= ~self._excluded(exclusion)

    def _excluded(self, exclusion: Exclusion) -> NDArray[np.bool_]:
        places = [self.names.index(name) for name in exclusion.axes]
        sizes = [len(self.values[place]) if place in places else 1 for place in self.constrained]
        choices = product(*(self.values[place] for place in sorted(places)))
        order = [sorted(places).index(place) for place in places]
        found = [exclusion.excludes(*(choice[index] for index in order)) for choice in choices]
        return np.asarray(found, dtype=bool).reshape(sizes)

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(len(values) for values in self.values)

    def together(self, places: tuple[int, ...]) -> NDArray[np.bool_]:
        """For every combination of the values of these axes (ascending places) whether some case has it."""
        others = tuple(at for at, place in enumerate(self.constrained) if place not in places)
        known = self.possible.any(axis=others)  # of those of `places` that are constrained
        sizes = [len(self.values[place]) if place in self.constrained else 1 for place in places]
        return np.broadcast_to(known.reshape(sizes), [len(self.values[place]) for place in places])

    def case(self, row: Sequence[int], seed: int) -> Case:
        """The case at these places of the axes."""
        fields = {name: values[at] for name, values, at in zip(self.names, self.values, row, strict=True)}
        return Case(seed=seed, **fields)  # type: ignore[arg-type]

    def row(self, case: Case) -> list[int] | None:
        """A case's places of the axes; None where one of its values is on none, as a published model's sizes are."""
        given = [getattr(case, name) for name in self.names]
        if case.model is not None or any(value not in values for value, values in zip(given, self.values, strict=True)):
            return None
        return [values.index(value) for value, values in zip(given, self.values, strict=True)]

    def excluded_pairs(self) -> list[tuple[str, Value, str, Value, str]]:
        """Every pair of values that no case has together: (axis, value, axis, value, reason)."""
        found = []
        for first, second in combinations(range(len(self.names)), 2):
            for a, b in np.argwhere(~self.together((first, second))):
                pair = {self.names[first]: self.values[first][a], self.names[second]: self.values[second][b]}
                (one, value), (other, value_of_other) = pair.items()
                found.append((one, value, other, value_of_other, self._reason(pair)))
        return found

    def _reason(self, pair: Mapping[str, Value]) -> str:
        """Why no case has a pair of values: of the fewest exclusions that leave nothing to the axes between them."""
        taken = dict(zip(self.names, self.values, strict=True))
        near = [e for e in self.exclusions if set(e.axes) & set(pair)]
        for count in range(1, len(near) + 1):
            for some in combinations(near, count):
                names = sorted({name for e in some for name in e.axes} - set(pair))
                rests = product(*(taken[name] for name in names))
                filled = (dict(zip(names, rest, strict=True)) | dict(pair) for rest in rests)
                if all(any(e.excludes(*(values[name] for name in e.axes)) for e in some) for values in filled):
                    return "; ".join(e.reason for e in some)
        return "; ".join(e.reason for e in self.exclusions)  # all of them together


def excluded(space: Space) -> tuple[str, ...]:
    """Every pair of values that no case has, in words."""
    return tuple(f"{a}={v}, {b}={w}: {reason}" for a, v, b, w, reason in space.excluded_pairs())
