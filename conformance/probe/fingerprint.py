"""The fingerprint of a dot product's arithmetic: what its answers to the crafted questions say of the unit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import torch
from torch import Tensor

from conformance.probe.questions import DOWN, EIGHTS, FAR, MEMBERS, POWERS, SMALL_AT, SWEEP, WITNESSES, Sheet, sheet
from fp8moe.recipe import KOrder
from fp8moe.reference.replay import k_order

Dot = Callable[[Tensor, Tensor], Tensor]
"""(M, K) and (N, K) FP8 to (M, N), of any floating dtype."""
Rounds = Literal["toward zero", "to nearest", "down"]
NEVER: Literal["never"] = "never"
FP32_BITS = 24
GROUPS = (4, 8, 16, 32, 64)
ORDERS: tuple[KOrder, ...] = ("natural", "fours_halved")


@dataclass(frozen=True)
class Fingerprint:
    """What the answers tell; None where they do not.

    Args:
        aligned: the terms of a group are cut at the largest one's exponent; False for sums in fp32, in any order.
        fraction_bits: bits that are kept below that exponent.
        group: terms that are aligned together.
        terms: how a term is cut.
        k_order: the order in which K falls into groups; None also where both orders make the same groups.
        prefix_in_group: the running sum is one of a group's terms; None also where no chain has two groups.
        carried_bits: of the running sum, its leading one included, that outlive the next alignment: never more than
            F + 1 within one chain; at most fp32's 24 are told.
        result: how a group's sum is rounded to them.
        promote_every: terms of K after which a chain begins anew and its sum is added in fp32, "never" where none does
            within a third of K; None for fp32 sums.
    """

    aligned: bool | None = None
    fraction_bits: int | None = None
    group: int | None = None
    terms: Rounds | None = None
    k_order: KOrder | None = None
    prefix_in_group: bool | None = None
    carried_bits: int | None = None
    result: Rounds | None = None
    promote_every: int | Literal["never"] | None = None

    @property
    def is_fp32(self) -> bool:
        """Sums in fp32 to nearest, in an order of their own."""
        return self.aligned is False and self.carried_bits == FP32_BITS and self.result in ("to nearest", None)

    def differing(self, known: Fingerprint) -> list[str]:
        """The fields that `known` tells, and that are not so here; not told is not so: the questions are the same."""
        mine = asdict(self)
        return [name for name, value in asdict(known).items() if value is not None and value != mine[name]]

    def __str__(self) -> str:
        if self.aligned is None:
            return "could not be told"
        if self.is_fp32:
            return "fp32 sums, rounded to nearest, nothing aligned"
        parts = []
        if self.aligned:
            order = f", K in the order {self.k_order}" if self.k_order == "fours_halved" else ""
            cut = "" if self.terms is None else f", cut {self.terms}"
            parts.append(f"groups of {_or_unknown(self.group)} with F={_or_unknown(self.fraction_bits)}{cut}{order}")
            if self.prefix_in_group is not None:
                parts.append(f"the prefix {'one of the terms' if self.prefix_in_group else 'added afterwards'}")
        else:
            parts.append("nothing aligned")
        parts.append(f"{_or_unknown(self.carried_bits)} bits carried, rounded {_or_unknown(self.result)}")
        if self.promote_every is not None:
            parts.append("never promoted" if self.promote_every == NEVER else f"promoted every {self.promote_every}")
        return "; ".join(parts)


def _or_unknown(value: object) -> str:
    return "?" if value is None else str(value)


class Unreadable(ValueError):
    """The product is not the crafted sums, however they may be rounded."""


def fingerprint(dot: Dot, *, dtype: torch.dtype = torch.float8_e4m3fn) -> Fingerprint:
    """Asks all questions in one product and reads the answers.

    Args:
        dot: (M, K) times (N, K) transposed: (M, N) in any floating dtype with 8 bits or more; the operands are FP8.
        dtype: of the operands, e4m3fn or e4m3fnuz.

    Raises:
        Unreadable: the product is not finite, a sum of one term is wrong by more than a sixteenth, or small terms are
            lost in no order of size.
    """
    asked = sheet(dtype)
    return read(asked, dot(asked.a, asked.b))


def read(asked: Sheet, product: Tensor) -> Fingerprint:
    """The fingerprint from a @ b^T of a sheet, (P, Q).

    Raises:
        Unreadable: as `fingerprint`.
    """
    if not bool(product.isfinite().all()):
        raise Unreadable("the product has values that are not finite")
    answers = _Answers(asked, asked.answers(product).tolist())
    for question in asked.questions:
        if question.family == "control" and abs(answers(question.family, *question.key) - 1) > 1 / 16:
            got = answers(question.family, *question.key) * question.unit
            raise Unreadable(f"a sum of the one term {question.unit:g} X came out as {got:g} X")
    aligned = answers.is_aligned()
    group, order = answers.group()
    small_at = SMALL_AT[0] if group == GROUPS[0] else SMALL_AT[1]
    bits = answers.kept("group", small_at) if aligned else None
    carried, result = answers.carried(bits)
    promoted = answers.promoted()
    if not aligned:
        if carried is None:
            raise Unreadable("sums that align nothing lose small terms as no rounding of a running sum does")
        exact = carried == FP32_BITS
        return Fingerprint(False, carried_bits=carried, result=result, promote_every=None if exact else promoted)
    prefix = answers.prefix(bits, carried, group, order, promoted)
    shown = order if group is not None and group < 32 else None
    return Fingerprint(True, bits, group, answers.terms(small_at, bits), shown, prefix, carried, result, promoted)


class _Answers:
    """Answers by family and key, each in its unit: 1 where the small term survived whole, 0 where it was lost."""

    def __init__(self, asked: Sheet, values: Sequence[float]) -> None:
        self.place, self.values = asked.place, values

    def __call__(self, *key: int | str) -> float:
        return self.values[self.place[key]]

    def survives(self, *key: int | str) -> bool:
        return self(*key) >= 0.5

    def kept(self, family: str, *where: int | str) -> int | None:
        """The largest n such that a term of 2^-n X survives, and all larger ones; None where none does.

        None as well where a smaller one survives that should have been lost.
        """
        before = (family, *where)
        ladder = sorted(int(key[-1]) for key in self.place if key[:-1] == before)
        survived = [self.survives(*before, n) for n in ladder]
        count = sum(survived)
        return ladder[count - 1] if count and all(survived[:count]) else None

    def is_aligned(self) -> bool:
        """For some position of s in the first group, no pair cancels before it meets s."""
        pairs = [(i, j) for i in POWERS for j in POWERS if i < j]
        return any(not any(self.survives("pairs", p, i, j) for i, j in pairs) for p in WITNESSES)

    def terms(self, small_at: int, bits: int | None) -> Rounds | None:
        for where in DOWN:  # in units of a tiny s: the last bit of X is many
            if abs(self("down", where, 1)) < 0.5 and self("down", where, -1) >= 16:
                return "down"
        key = ("terms", small_at, bits or 0)
        return _rounds(self(*key, 1), self(*key, -1)) if (*key, 1) in self.place else None

    def group(self) -> tuple[int | None, KOrder | None]:
        """Length and order, from which positions lose a tiny s beside position 0."""
        lost = [p for p in MEMBERS if not self.survives("member", p)]
        for order in ORDERS:
            for size in GROUPS:
                if lost == _members(order, size):
                    return size, order
        return None, None

    def carried(self, bits: int | None) -> tuple[int | None, Rounds | None]:
        """Bits of the running sum and its rounding, where alignment to F `bits` does not cut s before they do.

        6.125 X has its leading bit at 2^2.
        """
        places = (4, FAR) if bits is None else (4,)  # far away, alignment to the sum would cut s
        found = {p: self.kept("carried", p) for p in places}
        known = {p: n for p, n in found.items() if n is not None}
        if len(known) < len(found):
            return None, None
        place, least = min(known.items(), key=lambda item: item[1])
        if bits is not None and least >= bits:
            return None, None
        key = ("result", place, least)
        rounds = _rounds(self(*key, 1), self(*key, -1)) if (*key, 1) in self.place else None
        return min(least + 3, FP32_BITS), rounds

    def promoted(self) -> int | Literal["never"] | None:
        renewed = [self("promotion", p) >= 0.75 for p in SWEEP]
        if not any(renewed):
            return NEVER
        first = renewed.index(True)
        return SWEEP[first] if all(renewed[first:]) else None

    def prefix(
        self,
        bits: int | None,
        carried: int | None,
        group: int | None,
        order: KOrder | None,
        promoted: int | Literal["never"] | None,
    ) -> bool | None:
        """Eight equal terms are cut one by one, or reach the prefix as their sum, which has three bits more."""
        if bits is None or carried is None or group is None or order is None or promoted is None:
            return None
        one_group = promoted != NEVER and promoted <= group
        if one_group or (order, group) not in EIGHTS or bits >= carried + 2:
            return None
        kept = self.kept("prefix", order, group)
        return None if kept is None else kept < carried + 2


def _rounds(positive: float, negative: float) -> Rounds | None:
    """From what three quarters of the last bit come to, of either sign: that bit, which is 1, or nothing."""
    up = (positive >= 0.875, negative >= 0.875)
    known: dict[tuple[bool, bool], Rounds] = {
        (False, False): "toward zero",
        (True, True): "to nearest",
        (False, True): "down",
    }
    lost = all(flag or abs(value) < 0.5 for flag, value in zip(up, (positive, negative), strict=True))
    return known.get(up) if lost else None


def _members(order: KOrder, size: int) -> list[int]:
    """The positions that share a group of `size` with position 0, if position 1 does."""
    padded = -(-max(MEMBERS) // 32) * 32 + 32
    places = k_order(order, padded, torch.device("cpu"))
    first = set(range(size)) if places is None else set(places[:size].tolist())
    return sorted(first & set(MEMBERS)) if {0, 1} <= first else []
