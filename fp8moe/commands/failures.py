"""Failures on a terminal: each reason once, with its first case in full and the others by name; relations that fail
where a plain call does are named in a line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.text import Text

from conformance.checks import EQUIVALENCE
from conformance.relations.telling import PREFIX
from conformance.results import CheckResult
from conformance.smaller import is_as_plain
from fp8moe.counted import counted

REASONS_SHOWN = 10
ALIKE_SHOWN = 4
"""Names of further cases with one reason, which is a line or two."""


def by_reason(results: Sequence[CheckResult]) -> list[list[CheckResult]]:
    """Those of one reason together, in the order in which the reasons come; first one that can be run again."""
    found: dict[str, list[CheckResult]] = {}
    for result in results:
        found.setdefault(result.reason, []).append(result)
    return [sorted(alike, key=lambda result: not result.reproduce) for alike in found.values()]


def print_failures(
    out: Console, word: str, style: str, results: Sequence[CheckResult], unshrunk: Mapping[str, str]
) -> None:
    """
    Args:
        word: in front of each, such as FAILED.
        unshrunk: as a report has it.
    """
    groups = by_reason(results)
    for first, *alike in groups[:REASONS_SHOWN]:
        out.print(Text(f"{word} {_name(first)}", style=style), soft_wrap=True)
        out.print(Text(f"  {first.reason}"), soft_wrap=True)
        found_as = unshrunk.get(f"{first.check} {first.case}")
        if found_as:
            out.print(Text(f"  found as: {found_as}"), soft_wrap=True)
        if first.reproduce:
            out.print(Text(f"  reproduce: {first.reproduce}"), soft_wrap=True)
        if alike:
            out.print(Text(f"  and {_told(alike)}"), soft_wrap=True)
    left = sum(map(len, groups[REASONS_SHOWN:]))
    if left:
        reasons = counted(len(groups) - REASONS_SHOWN, "other reason")
        out.print(f"and {left} more {word.lower()}, for {reasons}, in the report")


def apart(failures: Sequence[CheckResult]) -> tuple[list[CheckResult], list[CheckResult]]:
    """Those to tell in full, and those of relations to name: on a scheme whose equivalence is among the former."""
    wrong = {failure.scheme for failure in failures if failure.check == EQUIVALENCE}
    named = [failure for failure in failures if failure.scheme in wrong and is_as_plain(failure)]
    return [failure for failure in failures if failure not in named], named


def print_as_plain(out: Console, named: Sequence[CheckResult], each: str) -> None:
    """
    Args:
        named: as `apart` gives them.
        each: where there is more of each, in words.
    """
    names = dict.fromkeys(failure.check.removeprefix(PREFIX) for failure in named)
    if names:
        told = f"FAILED {counted(len(names), 'relation')} too, on cases that a plain call fails on: {', '.join(names)}"
        out.print(Text(told, style="bold red"), soft_wrap=True)
        out.print(Text(f"  {each}"), soft_wrap=True)


def _told(alike: Sequence[CheckResult]) -> str:
    names = ", ".join(_name(result).removeprefix("computes.") for result in alike[:ALIKE_SHOWN])
    more = f" and {len(alike) - ALIKE_SHOWN} more, in the report" if len(alike) > ALIKE_SHOWN else ""
    return f"{len(alike)} more with the same reason: {names}{more}"


def _name(result: CheckResult) -> str:
    return f"{result.check} {result.case or result.scheme}".rstrip()
