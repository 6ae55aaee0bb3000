"""Two certificates side by side, as data: where they differ in surroundings, in the matrix, and in single cases."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from conformance.certificate import figures
from conformance.certificate.reading import Certificate
from conformance.certificate.tabled import field, said
from conformance.results import CheckResult

ABSENT = "not there"


@dataclass(frozen=True)
class Differing:
    """
    Args:
        both: cases that both have.
        alone: cases that only the first has, and only the second.
        statuses, digests: of those that both have, how many differ in their status, and in their digest alone.
        rows: check, case, and what each has of it: all that differ, those in their status first.
    """

    both: int
    alone: tuple[int, int]
    statuses: int
    digests: int
    rows: list[tuple[str, str, str, str]]


def surroundings(first: Certificate, second: Certificate) -> tuple[list[tuple[str, str, str]], int]:
    """Rows that differ, and how many are the same."""
    told = [{name: said(value) for name, value in figures.environment(each)} for each in (first, second)]
    every = list(dict.fromkeys([*told[0], *told[1]]))
    rows = [(name, told[0].get(name, ABSENT), told[1].get(name, ABSENT)) for name in every]
    differing = [row for row in rows if row[1] != row[2]]
    return differing, len(rows) - len(differing)


def cells(first: Certificate, second: Certificate) -> tuple[list[tuple[Any, ...]], int]:
    """Of the matrix: check, scheme and both texts where they differ, and how many cells are the same."""
    told = [figures.cells(each.report) for each in (first, second)]
    every = list(dict.fromkeys([*told[0], *told[1]]))
    rows = [(figures.short(key[0]), key[1], *(figures.counts(of.get(key)) for of in told)) for key in every]
    differing = [row for row in rows if row[2] != row[3]]
    return differing, len(rows) - len(differing)


def cases(first: Certificate, second: Certificate) -> Differing:
    """Cases by check and id."""
    told = [
        {(check.check, check.case): check for check in each.report.checks if check.case} for each in (first, second)
    ]
    both = [key for key in told[0] if key in told[1]]
    alone = [[key for key in told[place] if key not in told[1 - place]] for place in (0, 1)]
    pairs = [(key, told[0][key], told[1][key]) for key in both]
    statuses = [(key, _told(a), _told(b)) for key, a, b in pairs if a.status is not b.status]
    digests = [(key, _told(a), _told(b)) for key, a, b in pairs if a.status is b.status and a.digest != b.digest]
    rows = [*statuses, *digests, *_alone(alone, told)]
    return Differing(
        len(both),
        (len(alone[0]), len(alone[1])),
        len(statuses),
        len(digests),
        [(figures.short(check), case, a, b) for (check, case), a, b in rows],
    )


def _alone(
    alone: list[list[tuple[str, str]]], told: list[dict[tuple[str, str], CheckResult]]
) -> Iterator[tuple[tuple[str, str], str, str]]:
    yield from ((key, _told(told[0][key]), ABSENT) for key in alone[0])
    yield from ((key, ABSENT, _told(told[1][key])) for key in alone[1])


def _told(check: CheckResult) -> str:
    return ", ".join([figures.word(check), *([f"digest {field(check.digest).text}"] if check.digest else [])])
