"""What the probe says of every unit of the table, emulated, and whether it is right: the probe's own test."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from conformance.probe.fingerprint import Dot, Fingerprint, fingerprint
from conformance.probe.known import Match, emulated_dot, nearest
from fp8moe.recipe import ORDERED, Arithmetic
from fp8moe.reference.units import UNITS

PROMOTIONS = (None, 32, 128)


@dataclass(frozen=True)
class Identified:
    """One arithmetic, and what the probe says of it.

    Args:
        given: the arithmetic that was emulated.
        seen: its fingerprint, through an output in bf16.
        looks_like: the nearest known units.
    """

    given: Arithmetic
    seen: Fingerprint
    looks_like: tuple[Match, ...]

    @property
    def right(self) -> bool:
        """Its unit, promotion and order are found, and no other than those that have the same arithmetic."""
        if len(self.looks_like) != 1 or self.looks_like[0].differing:
            return False
        found = self.looks_like[0]
        if self.given.unit == "fp32":
            return found.units == ("fp32",)
        same = (self.given.promote_every, self.given.k_order)
        return self.given.unit in found.units and same == (found.arithmetic.promote_every, found.arithmetic.k_order)


def arithmetics() -> Iterator[Arithmetic]:
    """Every unit, promoted or not; those with short groups also in the order that Triton gives K on widened FP8."""
    for name, unit in UNITS.items():
        for every in PROMOTIONS:
            yield Arithmetic.on(name, promote_every=every)
        if unit.operands == "16-bit" and unit.group < ORDERED:
            yield Arithmetic.on(name, promote_every=128, k_order="fours_halved")


def dtype_of(arithmetic: Arithmetic) -> torch.dtype:
    """The FP8 format that its unit takes."""
    fn = torch.float8_e4m3fn
    return fn if UNITS[arithmetic.unit].takes(fn) else torch.float8_e4m3fnuz


def rounded(dot: Dot) -> Dot:
    """The same product as an output in bf16 shows it."""

    def as_output(a: Tensor, b: Tensor) -> Tensor:
        return dot(a, b).to(torch.bfloat16)

    return as_output


def identify_units() -> list[Identified]:
    """The self-test: each arithmetic is emulated, asked and looked up."""
    found = []
    for given in arithmetics():
        dtype = dtype_of(given)
        seen = fingerprint(rounded(emulated_dot(given)), dtype=dtype)
        found.append(Identified(given, seen, tuple(nearest(seen, dtype=dtype))))
    return found
