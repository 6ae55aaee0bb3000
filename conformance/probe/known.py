"""The fingerprints of known arithmetics: what a declaration predicts, and which units an answer looks like."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from conformance.probe.fingerprint import NEVER, ORDERS, Dot, Fingerprint, fingerprint
from fp8moe.platforms import Platform
from fp8moe.recipe import ORDERED, Arithmetic, KOrder
from fp8moe.reference.replay import k_order, ordered
from fp8moe.reference.units import UNITS, Unit, promoted

LONGEST = 1 << 14
"""Terms of the longest K that `error` stands for where nothing is promoted."""
_FAMILIES = {"sm89": "ada", "sm90": "hopper", "gfx942": "cdna3"}
_TENS = {8: "ampere", 10: "blackwell", 12: "rtx_blackwell"}


def emulated_dot(arithmetic: Arithmetic) -> Dot:
    """The dot product in a declared arithmetic, replayed: chains from zero, their sums added in fp32 in their order."""

    def dot(a: Tensor, b: Tensor) -> Tensor:
        order = k_order(arithmetic.k_order, a.shape[1], a.device)
        chains = promoted(ordered(a, order), ordered(b, order), arithmetic.unit, arithmetic.promote_every)
        total = chains[0]
        for chain in chains[1:]:
            total = total + chain
        return total

    return dot


@lru_cache(maxsize=256)
def expected(arithmetic: Arithmetic, dtype: torch.dtype = torch.float8_e4m3fn) -> Fingerprint:
    """What the questions tell of a declared arithmetic; of "unknown" units what is declared in numbers.

    Raises:
        ValueError: its unit does not take `dtype`.
    """
    if arithmetic.unit != "unknown":
        return fingerprint(emulated_dot(arithmetic), dtype=dtype)
    if arithmetic.fraction_bits is None:
        return Fingerprint(promote_every=arithmetic.promote_every)
    every = arithmetic.promote_every or NEVER
    return Fingerprint(True, arithmetic.fraction_bits, arithmetic.group, promote_every=every)


def tells_something(arithmetic: Arithmetic | None) -> bool:
    """Whether a declaration says enough to be wrong."""
    return arithmetic is not None and (arithmetic.unit != "unknown" or arithmetic.fraction_bits is not None)


@dataclass(frozen=True)
class Match:
    """Units of the table with one arithmetic.

    Args:
        units: their names, those of the device's own family first.
        arithmetic: of the first, with the promotion and order that were seen.
        differing: the fields of the fingerprint in which it is not what was seen; empty where it is.
    """

    units: tuple[str, ...]
    arithmetic: Arithmetic
    differing: tuple[str, ...] = ()

    @property
    def declaration(self) -> str:
        """As a contract has it."""
        given = self.arithmetic
        options = [repr(given.unit)]
        options += [] if given.promote_every is None else [f"promote_every={given.promote_every}"]
        options += [] if given.k_order == "natural" else [f"k_order={given.k_order!r}"]
        return f"Arithmetic.on({', '.join(options)})"

    def __str__(self) -> str:
        but = f", but for {', '.join(self.differing)}" if self.differing else ""
        return f"{' = '.join(self.units)}{but}"


def nearest(
    measured: Fingerprint, *, dtype: torch.dtype = torch.float8_e4m3fn, platform: Platform | None = None
) -> list[Match]:
    """The known arithmetics that differ from what was seen in the fewest fields; none where nothing could be told."""
    if measured.aligned is None:
        return []
    if not measured.aligned:
        return [Match(("fp32",), Arithmetic(), tuple(measured.differing(expected(Arithmetic(), dtype))))]
    found = [match for units in _alike(dtype) for match in _matches(units, measured, dtype, platform)]
    least = min((len(match.differing) for match in found), default=0)
    return [match for match in found if len(match.differing) == least]


def _matches(units: Sequence[str], measured: Fingerprint, dtype: torch.dtype, platform: Platform | None) -> list[Match]:
    family = family_of(platform)
    names = tuple(sorted(units, key=lambda name: not (family and name.startswith(f"{family}."))))
    unit, every = UNITS[names[0]], measured.promote_every
    made = []
    for order in _orders(unit):
        step = unit.group if order == "natural" else max(unit.group, ORDERED)
        fits = isinstance(every, int) and every % step == 0
        arithmetic = Arithmetic.on(unit.name, promote_every=every if fits else None, k_order=order)  # type: ignore[arg-type]
        differing = measured.differing(expected(arithmetic, dtype))
        made.append(Match(names, arithmetic, tuple(differing)))
    least = min(len(match.differing) for match in made)
    return [match for match in made if len(match.differing) == least][:1]


def _orders(unit: Unit) -> tuple[KOrder, ...]:
    """Both, where the unit's groups are short enough for the order to show."""
    return ORDERS if unit.group < ORDERED else ORDERS[:1]


@lru_cache(maxsize=2)
def _alike(dtype: torch.dtype) -> tuple[tuple[str, ...], ...]:
    """The names of the units that take `dtype` and align terms, those with the same numbers together.

    The smallest exponent of a group is no part of it: it matters below the range of FP8 products.
    """
    found: dict[Unit, list[str]] = {}
    for name, unit in UNITS.items():
        if unit.takes(dtype) and unit.fraction_bits is not None:
            numbers = replace(unit, name="", operands="any", zero_exponent=0)
            found.setdefault(numbers, []).append(name)
    return tuple(map(tuple, found.values()))


def family_of(platform: Platform | None) -> str:
    """How the units of a device are called in the table, before the dot; "" where none are its own."""
    if platform is None:
        return ""
    named = _FAMILIES.get(platform.architecture, "")
    return named or (_TENS.get((platform.cap or 0) // 10, "") if platform.is_cuda else "")


def error(seen: Fingerprint, otherwise: Fingerprint) -> float:
    """How far a chain's sum may be off, over its largest term and the number of terms: to rank two arithmetics by.

    A group of L terms loses up to (L + 1) 2^-F in alignment, the prefix included, and one last bit of the carried sum;
    half of either where it is rounded to nearest. Fields that `seen` does not tell are taken from `otherwise`.
    """
    told = replace(otherwise, **{name: value for name, value in vars(seen).items() if value is not None})
    if told.is_fp32:
        return 0.0
    terms = told.promote_every if isinstance(told.promote_every, int) else LONGEST
    group = told.group if told.aligned and told.group else 1
    lost = 0.0
    if told.aligned and told.fraction_bits is not None:
        lost = (group + 1) / group * _half(told.terms) * 2.0**-told.fraction_bits
    if told.carried_bits is not None:
        lost += _half(told.result) / group * 2.0 ** (1 - told.carried_bits)
    return terms * lost


def _half(rounds: str | None) -> float:
    return 0.5 if rounds == "to nearest" else 1.0
