"""Crafted dot products, each with one question: which small term survives beside a large one, and how is it rounded?

All are relative to a large product X = 2^top, which a later term cancels exactly, so that what is left is the small
term or nothing: a few bits, which the rounding of an output to 16 bits leaves alone. With s a small term:

group:     X, -X, s at position p. Inside one group s is cut at 2^-F X, whatever the order; in the next group the sum is
           zero again, and s survives. So the sizes of s that survive tell F.
member:    the same with s = 2^-30 X: the positions p at which it is lost share a group with position 0, which tells
           the length of a group, and the order of K where that shows.
terms:     the same with s = 0.75 * 2^-F X: truncated 0, to nearest 2^-F X.
pairs:     X and -X at many places, s in the first group. In fp32 some pair cancels before it meets s, whatever the
           order of summation; in a group none does. This tells fp32, which aligns nothing.
down:      a tiny negative s that meets X in the other lane of a group, or as the prefix: rounded downwards it becomes
           the last bit of X, truncated toward zero it is lost.
carried:   twice 3.0625 X and s in one group, cancelled at the end of K, many groups and chains away: the sum has two
           bits more than a product, so s is lost where the accumulator ends, before it is lost in alignment.
result:    the same with s = 0.75 of the accumulator's last bit, both signs.
prefix:    X in one group, eight equal s in the next, -X at the end. Where the prefix is one of the group's terms each s
           is cut at 2^-F X by itself; where the products are summed first, they reach the prefix as 8 s.
promotion: X, then s = (2^-24 + 2^-33) X at position p, -X at the end. One chain loses s, by truncation, or because it
           keeps no more than 32 bits of the sum and then ties to even; a chain that began anew between X and s is added
           to X in fp32, to nearest, and X + s becomes 2^-23 X more than X.
control:   one term, which every arithmetic gets right.

Factors are powers of two times 1, 1.5 or 1.75, which every FP8 format holds. The left operand has few rows, the
`profiles`, with a large factor where X may be; the right one has a row for each question.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from fp8moe.recipe import KOrder
from fp8moe.scaling import decode, encode, fp8_format

TERMS = 640
"""K: five scale blocks."""
BLOCK = 128
END = 632
"""Where X is cancelled: in a chain of its own if chains are 256 terms or shorter."""
TINY = 30
"""A term of 2^-30 X is lost beside X in every unit that aligns its terms."""
LOUD = 2.0**7
LONG_FACTOR = 1.75
"""Of X in the profiles for the carried width: a product of two is 3.0625 X, whose exponent is that of X."""
SWEEP = (8, 16, 32, 64, 96, 128, 160, 192, 224, 256, 320, 384)
"""Positions at which a new chain is looked for, all k mod 4 = 0, so that the next position is in the same group."""
POWERS = (0, 1, 2, 4, 8, 16, 32, 64, 128)
MEMBERS = range(2, 97)
WITNESSES = (3, 5)
"""Positions of s for `pairs`: one of them shares position 0's group, in the natural order and in "fours_halved"."""
SMALL_AT = (3, 4)
"""Positions of s for `group` and `terms`: the first for groups of four, the second for all others."""
FAR = 316
"""Another position for `carried`, for sums in fp32 whose order nobody knows."""
EIGHTS: Mapping[tuple[KOrder, int], Sequence[int]] = {
    **{("natural", group): range(group, group + 8) for group in (8, 16, 32, 64)},
    ("fours_halved", 8): (16, 17, 20, 21, 24, 25, 28, 29),
    ("fours_halved", 16): (2, 3, 6, 7, 10, 11, 14, 15),
}
"""Eight positions of the second group, by the order of K and the length of a group."""
DOWN: Mapping[str, tuple[int, int]] = {"lane": (0, 4), "8": (8, 16), "16": (16, 32), "64": (64, 128)}
"""X and -X of the questions `down`, where s is at position 5: in one group, and in later groups than s."""


@dataclass(frozen=True)
class Profile:
    """A row of the left operand: `loud` at some positions, `quiet` at the others but for `tiny` ones."""

    loud: frozenset[int]
    quiet: float
    loud_factor: float = LOUD
    tiny: frozenset[int] = frozenset()

    def factor(self, position: int) -> float:
        if position in self.loud:
            return self.loud_factor
        return 2.0**-9 if position in self.tiny else self.quiet


_ENDS = frozenset((0, 1, END))
PROFILES: dict[str, Profile] = {
    "middle": Profile(_ENDS, 1.0),
    "quiet": Profile(_ENDS, 2.0**-6),
    "pairs": Profile(frozenset(POWERS), 2.0**-6),
    "sweep": Profile(_ENDS, 2.0**-6, tiny=frozenset(p + 1 for p in SWEEP)),
    "long high": Profile(_ENDS, 2.0**4, LONG_FACTOR * LOUD),
    "long middle": Profile(_ENDS, 1.0, LONG_FACTOR * LOUD),
    "long quiet": Profile(_ENDS, 2.0**-6, LONG_FACTOR * LOUD),
}
FIRST_MIDDLE, FIRST_QUIET = 7, 13
"""A small term of 2^-n X is in a "quiet" profile from this n on; before, a "middle" or "high" one holds its factor."""


@dataclass(frozen=True)
class Question:
    """One crafted dot product.

    Args:
        family: as in the head of this file; "control" for sums that every arithmetic gets right.
        key: what distinguishes it within the family.
        profile: a key of `PROFILES`.
        terms: products by position, relative to X.
        unit: what the answer is divided by, relative to X.
    """

    family: str
    key: tuple[int | str, ...]
    profile: str
    terms: Mapping[int, float]
    unit: float


def _ladder(start: int, long: bool = False) -> Iterator[tuple[int, str]]:
    """Exponents of small terms, as far as three quarters of one are a factor of an FP8 format; and the profile."""
    for n in range(start, TINY - 2):
        name = "quiet" if n >= FIRST_QUIET else "middle" if n >= FIRST_MIDDLE else "high"
        yield n, f"long {name}" if long else name


def _controls() -> Iterator[Question]:
    for name in PROFILES:
        n = 10 if name.endswith(("middle", "high")) else 20
        yield Question("control", (name, 1), name, {12: 2.0**-n}, 2.0**-n)
        yield Question("control", (name, -1), name, {12: -(2.0**-n)}, -(2.0**-n))
    yield Question("control", ("X", 1), "middle", {0: 1.0}, 1.0)
    yield Question("control", ("X", -1), "middle", {END: -1.0}, -1.0)


def _in_a_group() -> Iterator[Question]:
    for p in SMALL_AT:
        for n, name in _ladder(7):
            yield Question("group", (p, n), name, {0: 1.0, 1: -1.0, p: 2.0**-n}, 2.0**-n)
            for sign in (1, -1):
                s = sign * 2.0**-n
                yield Question("terms", (p, n, sign), name, {0: sign, 1: -sign, p: 0.75 * s}, s)
    tiny = 2.0**-TINY
    for p in MEMBERS:
        yield Question("member", (p,), "quiet", {0: 1.0, 1: -1.0, p: tiny}, tiny)
    for p in WITNESSES:
        for i in POWERS:
            for j in POWERS:
                if i < j:
                    yield Question("pairs", (p, i, j), "pairs", {i: 1.0, j: -1.0, p: tiny}, tiny)
    for sign in (1, -1):
        for where, (i, j) in DOWN.items():
            yield Question("down", (where, sign), "pairs", {i: 1.0, j: -1.0, 5: sign * tiny}, sign * tiny)


def _carried() -> Iterator[Question]:
    large = LONG_FACTOR**2
    for p in (4, FAR):
        for n, name in _ladder(2, long=True):
            for sign in (1, -1):
                apart, s = {0: sign * large, 1: sign * large, END: -2 * sign * large}, sign * 2.0**-n
                if sign > 0:
                    yield Question("carried", (p, n), name, {**apart, p: s}, s)
                yield Question("result", (p, n, sign), name, {**apart, p: 0.75 * s}, s)


def _after_a_prefix() -> Iterator[Question]:
    for (order, group), positions in EIGHTS.items():
        for n, name in _ladder(8):
            terms = {0: 1.0, END: -1.0, **dict.fromkeys(positions, 2.0**-n)}
            yield Question("prefix", (order, group, n), name, terms, 2.0 ** (3 - n))
    for p in SWEEP:
        yield Question("promotion", (p,), "sweep", {0: 1.0, END: -1.0, p: 2.0**-24, p + 1: 2.0**-33}, 2.0**-23)


@dataclass(frozen=True, eq=False)
class Sheet:
    """All questions as the two operands of one matrix product.

    Args:
        a: (P, TERMS) FP8, a row for each profile. The last position of every block of 128 has the format's largest
            number, and no question uses it: whatever quantises `a` with dynamic scales finds a power of two.
        b: (Q, TERMS) FP8, a row for each question.
        row: (Q,) the question's profile.
        unit: (Q,) float64, what its answer is divided by.
    """

    questions: tuple[Question, ...]
    a: Tensor
    b: Tensor
    row: Tensor
    unit: Tensor
    place: Mapping[tuple[int | str, ...], int]

    def answers(self, product: Tensor) -> Tensor:
        """(Q,) float64 from a @ b^T (P, Q), in whatever precision it was seen: each answer in its question's unit."""
        picked = product.detach().to("cpu", torch.float64)[self.row, torch.arange(len(self.questions))]
        return picked / self.unit


@lru_cache(maxsize=2)
def sheet(dtype: torch.dtype = torch.float8_e4m3fn) -> Sheet:
    """The questions in an FP8 format, e4m3fn or e4m3fnuz.

    Raises:
        AssertionError: a factor is no number of the format.
    """
    questions = (*_controls(), *_in_a_group(), *_carried(), *_after_a_prefix())
    fmt = fp8_format(dtype)
    rows = {name: row for row, name in enumerate(PROFILES)}
    a = torch.tensor([[profile.factor(k) for k in range(TERMS)] for profile in PROFILES.values()])
    a[:, BLOCK - 1 :: BLOCK] = fmt.largest
    b, unit = torch.zeros(len(questions), TERMS), torch.zeros(len(questions), dtype=torch.float64)
    for q, question in enumerate(questions):
        x = _large(question.profile, fmt.largest)
        for position, value in question.terms.items():
            b[q, position] = value * x / PROFILES[question.profile].factor(position)
        unit[q] = question.unit * x
    codes = encode(a, dtype), encode(b, dtype)
    for name, values, code in zip("ab", (a, b), codes, strict=True):
        assert torch.equal(decode(code), values), f"{name} has values that {dtype} lacks"
    row = torch.tensor([rows[question.profile] for question in questions])
    place = {(question.family, *question.key): q for q, question in enumerate(questions)}
    return Sheet(questions, *codes, row, unit, place)


def _large(profile: str, largest: float) -> float:
    """X: 2^15 in e4m3fn, 2^14 in e4m3fnuz; half of that in the "long" profiles, whose X is 3.0625 times as large."""
    x = LOUD * (256.0 if largest >= 256 else 128.0)
    return x / 2 if profile.startswith("long") else x
