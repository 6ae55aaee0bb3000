"""A level in pieces, each run by itself wherever there is such a device; and the pieces as one report to go on with."""

from __future__ import annotations

import heapq
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from conformance.backend_code import difference
from conformance.cases import Case
from conformance.levels import Item
from conformance.report import Report
from conformance.results import CheckResult, Status
from fp8moe.counted import counted

MOST = 1000
FAILED_BEFORE = "it failed before"
"""Why further cases of a check and scheme are not run."""
SAME = ("backend", "origin", "level", "seed", "target", "device", "versions", "planned", "takes", "fnuz", "waivers")


class InvalidShard(ValueError):
    """What is no shard, or shards that do not belong together; the text says which and why."""


@dataclass(frozen=True)
class Shard:
    """Piece `number` of `count`, from 1 on, as `dealt` makes them."""

    number: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """
        Raises:
            InvalidShard: no "K/N".
        """
        found = re.fullmatch(r"([0-9]{1,4})/([0-9]{1,4})", text, re.ASCII)
        number, count = map(int, found.groups()) if found else (0, 0)
        if not 1 <= number <= count <= MOST:
            raise InvalidShard(f"{text!r}: expected K/N with 1 <= K <= N <= {MOST}, such as 3/8")
        return cls(number, count)

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    @property
    def excuse(self) -> str:
        """Why a run of this shard leaves something out."""
        return f"not of shard {self}"

    def of(self, items: Sequence[Item]) -> list[Item]:
        return dealt(items, self.count)[self.number - 1]


OF_A_CASE, OF_A_WEIGHT = 10_000_000, 20
"""What a case costs however small it is, and each of its weights, in multiply-adds that take as long: by the durations
in reports/cpu/2026-11-29-shards."""
OF_A_CASE_ON_GPU = 3_000_000_000
"""The first of them on a GPU, by the durations in reports/h200/2026-11-30-order. Shards are not dealt by it: what their
cases wait for a compiler parts them more."""


def cost(case: Case, of_a_case: int = OF_A_CASE) -> int:
    """About what a check of a case takes, in multiply-adds: its weights are made, and each pair of a token and an
    expert is multiplied by those of its expert."""
    weights = case.hidden * case.inter * (3 if case.gated else 2)
    pairs = case.tokens * case.top_k // case.ep_size
    return of_a_case + weights * (OF_A_WEIGHT * case.local_experts + pairs)


def dealt(items: Sequence[Item], count: int) -> list[list[Item]]:
    """All pieces, each in the level's order: the costliest item first, each to the piece that costs the least so far.
    The items alone decide, so that every host comes to the same pieces."""
    order = {item.key: number for number, item in enumerate(items)}
    pieces: list[list[Item]] = [[] for _ in range(count)]
    loads = [(0, number) for number in range(count)]
    for item in sorted(items, key=lambda item: (-cost(item.case), item.key)):
        load, number = loads[0]
        pieces[number].append(item)
        heapq.heapreplace(loads, (load + cost(item.case), number))
    return [sorted(piece, key=lambda item: order[item.key]) for piece in pieces]


def left_over(report: Report) -> list[CheckResult]:
    """What a run, or a run of a shard, should have run, and did not."""
    excuses = (FAILED_BEFORE, *([Shard.parse(report.shard).excuse] if report.shard else ()))
    return [
        check
        for check in report.checks
        if check.status is Status.NOT_RUN and check.verdict == "computes" and not check.reason.startswith(excuses)
    ]


def of_one_run(reports: Sequence[Report]) -> None:
    """
    Raises:
        InvalidShard: one is of another run than the first, or of no shard.
    """
    first = reports[0]
    for report in reports:
        if not report.shard:
            raise InvalidShard(f"a report of {report.backend} that is of no shard: run it with --shard K/N")
        for name in SAME:
            if getattr(report, name) != getattr(first, name):
                told = f"{name}={str(getattr(report, name))[:200]!r}, and shard {first.shard} has"
                raise InvalidShard(f"shard {report.shard}: {told} {str(getattr(first, name))[:200]!r}")
        differs = difference(report.code, first.code)
        if differs:
            beside = "" if report is first else f" beside shard {first.shard}"
            raise InvalidShard(f"shard {report.shard}: other code of the backend{beside}: {differs}; run it again")


def gathered(reports: Sequence[Report]) -> Report:
    """All shards of a run, as a report to go on with: every case's result, and nothing that is of a whole run.

    Raises:
        InvalidShard: one is missing, stands twice, is of another run, or was not run to its end.
    """
    if not reports:
        raise InvalidShard("no shards are given")
    of_one_run(reports)
    first = reports[0]
    for report in reports:
        left = left_over(report)
        if left:
            raise InvalidShard(f"shard {report.shard}: not run to its end ({left[0].reason}): go on with it first")
    count = Shard.parse(first.shard).count
    numbers = [Shard.parse(report.shard) for report in reports]
    if any(shard.count != count for shard in numbers):
        raise InvalidShard(f"shards of different counts: {', '.join(map(str, numbers))}")
    missing = sorted(set(range(1, count + 1)) - {shard.number for shard in numbers})
    if missing or len(numbers) > count:
        named = ", ".join(f"{number}/{count}" for number in missing) or "none"
        raise InvalidShard(f"{counted(len(numbers), 'shard')} of {count}: missing are {named}; each must be there once")
    return replace(
        first,
        shard="",
        checks=tuple(check for report in reports for check in report.checks if check.case),
        seconds=sum(report.seconds for report in reports),
        unshrunk={key: value for report in reports for key, value in report.unshrunk.items()},
    )
