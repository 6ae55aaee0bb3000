"""What each level goes through, in order: what convicts most and costs least comes first.

smoke    the pinned cases of every scheme and each relation on every scheme: a minute on two CPU cores
quick    on top of that every pair of values of the axes, and published models
certify  on top of that nearly every triple, and each relation on more seeds
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from conformance.axes import Space
from conformance.cases import Case
from conformance.checks import CHECKS, EQUIVALENCE
from conformance.covering import Coverage, Tally, covering_rows
from conformance.pinned import is_checkpoints, model_cases, pinned_cases, simulated_cases
from conformance.plan import Cell, Subject, Target
from conformance.regimes import GROUP
from conformance.relations import RELATIONS, relation_case
from conformance.results import Evidence
from fp8moe.experts import FusedMoEPermuteExpertsUnpermute

LEVELS = ("smoke", "quick", "certify")
STRENGTHS = {"smoke": (), "quick": (2,), "certify": (2, 3)}
"""Combinations of how many axes a level covers."""
SHARES = {2: 1.0, 3: 0.99}
"""How many of them."""
RELATION_SEEDS = {"smoke": 1, "quick": 2, "certify": 4}
MODEL_TOKENS = 64
SIMULATED_SCHEME = "block"


@dataclass(frozen=True)
class Item:
    """One check on one case. `part` is what it belongs to, in words."""

    check: str
    case: Case
    part: str

    @property
    def key(self) -> tuple[str, str]:
        return self.check, str(self.case)


def items_of(level: str, cells: Sequence[Cell], target: Target, seed: int) -> list[Item]:
    """Everything that a level goes through, each item once.

    Args:
        level: of `LEVELS`.
        cells: those of one backend that run, one a scheme.
        seed: of the cases that are not pinned.
    """
    return _once(_items(level, cells, target, seed, space_of(cells, target)))


def items_for(level: str, takes: Mapping[str, Sequence[str]], target: Target, seed: int, *, fnuz: bool) -> list[Item]:
    """As `items_of`, from what a report keeps; nothing of the backend is needed.

    Args:
        takes: activations by scheme.
        target: not the interpreter's, on which a level goes through less.
        fnuz: whether weights may be e4m3fnuz.
    """
    nobody = Subject("", FusedMoEPermuteExpertsUnpermute, "")  # type: ignore[type-abstract]
    cells = [Cell(nobody, scheme, None, "", Evidence.HARDWARE, tuple(names)) for scheme, names in takes.items()]
    return _once(_items(level, cells, target, seed, Space(takes, fnuz=fnuz)))


def _once(items: Iterable[Item]) -> list[Item]:
    found: dict[tuple[str, str], Item] = {}
    for item in items:
        found.setdefault(item.key, item)
    return list(found.values())


def _items(level: str, cells: Sequence[Cell], target: Target, seed: int, space: Space) -> Iterator[Item]:
    simulated = any(cell.evidence is Evidence.SIMULATED for cell in cells)
    for cell in cells:
        pinned = simulated_cases(cell) if simulated else pinned_cases(cell, small=True)
        for case in pinned:
            yield Item(EQUIVALENCE, case, "pinned cases")
        yield from relation_items(cell, range(seed, seed + 1))
        yield from whole_block_items(cell, seed)
    if simulated:
        return
    for strength in STRENGTHS[level]:
        rows = covering_rows(space, strength, seed, share=SHARES[strength])
        for number, row in enumerate(rows):
            yield Item(EQUIVALENCE, space.case(row, _seed(seed, strength, number)), _part(strength))
    if level == "smoke":
        return
    for cell in cells:
        yield from relation_items(cell, range(seed + 1, seed + RELATION_SEEDS[level]))
    takes = {cell.scheme: cell.activations for cell in cells}
    for case in model_cases(target):
        small = target.device != "cpu" or (is_checkpoints(case) and case.tokens <= MODEL_TOKENS)
        if small and case.activation in takes.get(case.scheme, ()):
            yield Item(EQUIVALENCE, case, "published models")


def relation_items(cell: Cell, seeds: range) -> Iterator[Item]:
    """Each relation on a case of its own for each seed; in Triton's interpreter, where one takes seconds, on one
    scheme."""
    if cell.evidence is Evidence.SIMULATED and cell.scheme != SIMULATED_SCHEME:
        return
    for seed in seeds:
        for check in RELATIONS:
            case = relation_case(check, cell.scheme, cell.activations[seed % len(cell.activations)], seed)
            if not check.why_not(case):
                yield Item(check.id, case, "relations")


def whole_block_items(cell: Cell, seed: int) -> Iterator[Item]:
    """The relations whose case has blocks that are cut off, without such: for a backend that takes no other layer."""
    for item in relation_items(cell, range(seed, seed + 1)):
        sizes = {name: -(-getattr(item.case, name) // GROUP) * GROUP for name in ("hidden", "inter")}
        whole = replace(item.case, **sizes)
        if whole != item.case and not CHECKS[item.check].why_not(whole):
            yield Item(item.check, whole, item.part)


def _part(strength: int) -> str:
    return {2: "pairs of values", 3: "triples of values"}[strength]


def _seed(seed: int, strength: int, number: int) -> int:
    return (seed * 10 + strength) * 1_000_000 + number


def space_of(cells: Sequence[Cell], target: Target) -> Space:
    """The axes as far as a backend takes them on this device."""
    from fp8moe.backends.torch_experts import TorchExperts

    plain = all(issubclass(cell.subject.experts_cls, TorchExperts) for cell in cells) and target.device == "cpu"
    return Space({cell.scheme: cell.activations for cell in cells}, fnuz=plain or target.platform.uses_fnuz)


def coverage_of(level: str, space: Space, cases: Sequence[Case]) -> list[Coverage]:
    """What these cases cover, for each strength that the level asks for."""
    rows = [row for row in map(space.row, cases) if row is not None]
    found = []
    for strength in STRENGTHS[level]:
        tally = Tally(space, strength)
        tally.add_all(rows)
        found.append(tally.coverage)
    return found
