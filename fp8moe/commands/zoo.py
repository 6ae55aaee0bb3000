"""`fp8moe zoo`: the mutants, and with `--score` how many of them the suite convicts."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from rich.text import Text

from conformance.levels import LEVELS
from conformance.planned import BadRequest
from conformance.versions import versions
from conformance.zoo import ATTACKER_CLASSES, BACKEND_MUTANTS, KERNEL_MUTANTS
from conformance.zoo.known import KNOWN_SURVIVORS
from conformance.zoo.score import ERROR, KILLED, NOT_HERE, SURVIVED, Verdict, rotating, score
from conformance.zoo.selection.mutants import ALL as SELECTOR_MUTANTS
from conformance.zoo.selection.score import Conviction
from conformance.zoo.selection.score import score as score_selectors
from fp8moe.commands import tables
from fp8moe.commands.as_typed import as_typed
from fp8moe.commands.question import BadInput, pick
from fp8moe.counted import counted

PLANTED = {"backend": BACKEND_MUTANTS, "attacker": ATTACKER_CLASSES, "kernel": KERNEL_MUTANTS}
PLAIN = ("TorchExperts", "BatchedTorchExperts")
CONTROLS = {"backend": PLAIN, "attacker": PLAIN, "kernel": ("TRITON", "BATCHED_TRITON")}
"""The honest backends that they are planted in."""
KINDS = ("selector", *PLANTED)
FEW_FIELDS = 3
"""As many as a person can look at."""


def print_zoo() -> None:
    """Every mutant: its name, the real defect it stands for, what it does."""
    out = tables.console()
    table = tables.table("the zoo", "kind", "mutant", "catalogue", "does")
    for kind, faults in _faults().items():
        for name, catalogue, does in faults:
            table.add_row(kind, name, catalogue or "-", Text(does))
    out.print(table)
    out.print(", ".join(f"{counted(len(faults), f'{kind} mutant')}" for kind, faults in _faults().items()))


def _faults() -> dict[str, list[tuple[str, str, str]]]:
    return {
        "selector": [(mutant.name, mutant.catalogue, mutant.does) for mutant in SELECTOR_MUTANTS],
        **{kind: [(f.name, f.catalogue, f.does) for f, _ in mutants] for kind, mutants in PLANTED.items()},
    }


def scored(
    level: str,
    kinds: Sequence[str],
    part: str | None,
    device: str | None,
    seed: int,
    report: Path | None,
    shrinks: bool = False,
) -> list[Verdict]:
    """Runs the mutants, each until its first conviction, and prints a line for each as it comes; those of our kernels
    only where they are asked for, since they need a GPU or, in Triton's interpreter, minutes each.

    Raises:
        BadInput: an unknown level, kind or device, one that is not here, a part that is no "i/n".
    """
    level = pick("--level", level, LEVELS)
    wanted = [pick("--kind", kind, KINDS) for kind in kinds] or [kind for kind in KINDS if kind != "kernel"]
    which, parts = _part(part)

    def tell(verdict: Verdict) -> None:
        by = f"{verdict.check} {verdict.case}".strip()
        print(f"{verdict.outcome:9}{verdict.seconds:6.1f} s  {verdict.mutant}  {by}", file=sys.stderr, flush=True)

    found: list[Verdict] = []
    if "selector" in wanted:
        for verdict in _selectors(level):
            found.append(verdict)
            tell(verdict)
    for kind in (kind for kind in PLANTED if kind in wanted):
        mutants = PLANTED[kind]
        chosen = list(rotating(mutants, which, parts)) if kind != "attacker" else list(mutants)
        controls = CONTROLS[kind]
        options = {"device": device, "seed": seed, "controls": controls, "shrinks": shrinks}
        try:
            found += score(chosen, kind, level, progress=tell, **options)  # type: ignore[arg-type]
        except BadRequest as error:
            raise as_typed(error) from None
    if report is not None:
        report.write_text(_json(found, level, device or "auto", seed, part), encoding="utf-8")
    return found


def _selectors(level: str) -> Iterator[Verdict]:
    """Of the mutants of the selector; their checks are the same at every level, and have no case but a cell."""
    for found in score_selectors(SELECTOR_MUTANTS):
        if isinstance(found, Conviction):
            check, cell = f"selects.{found.killed_by}", found.cell
            yield Verdict(found.mutant, "selector", level, KILLED, check, cell, str(found.violation), found.seconds)
        else:
            outcome = ERROR if found.why else SURVIVED
            yield Verdict(found.mutant, "selector", level, outcome, reason=found.why, seconds=found.seconds)


def _part(text: str | None) -> tuple[int, int]:
    first, _, count = (text or "0/1").partition("/")
    if not (first.isdigit() and count.isdigit() and int(first) < int(count)):
        raise BadInput(f"--part {text}: expected i/n with 0 <= i < n, such as 0/3")
    return int(first), int(count)


def _json(found: Sequence[Verdict], level: str, target: str, seed: int, part: str | None) -> str:
    told = {
        "format": tables.FORMAT,
        "level": level,
        "device": target,
        "seed": seed,
        "part": part or "0/1",
        "versions": versions(),
        "score": {kind: _share(found, kind) for kind in KINDS},
        "verdicts": [asdict(verdict) for verdict in found],
    }
    return json.dumps(told, indent=1)


def _known(verdict: Verdict) -> str:
    """Why a survivor is known to survive; "" where it is not, or is none."""
    return KNOWN_SURVIVORS.get(verdict.mutant, {}).get(verdict.level, "") if verdict.outcome == SURVIVED else ""


def _share(found: Sequence[Verdict], kind: str) -> dict[str, int]:
    outcomes = Counter(v.outcome for v in found if v.kind == kind and v.outcome != NOT_HERE)
    return {"mutants": sum(outcomes.values()), "killed": outcomes[KILLED]}


def print_score(found: Sequence[Verdict]) -> int:
    """The table, and the survivors by name; 1 where one survives that is not known to, else 0."""
    out = tables.console()
    shrunk = [verdict for verdict in found if verdict.smallest]
    last = ("smallest case", "fields") if shrunk else ()
    table = tables.table("killed by", "mutant", "kind", "level", "outcome", "check", "case", "seconds", *last)
    for verdict in found:
        style = "" if verdict.outcome in (KILLED, NOT_HERE) else "bold red"
        outcome = Text(verdict.outcome, style)
        small = (verdict.smallest, str(len(verdict.fields)) if verdict.smallest else "") if shrunk else ()
        told = (verdict.check, verdict.case, f"{verdict.seconds:.1f}", *small)
        table.add_row(verdict.mutant, verdict.kind, verdict.level, outcome, *told)
    out.print(table)
    unknown = 0
    for verdict in found:
        if verdict.outcome == NOT_HERE:
            out.print(Text(f"not here: {verdict.mutant}: {verdict.reason}"), soft_wrap=True)
        elif verdict.outcome != KILLED:
            known = _known(verdict)
            unknown += not known
            out.print(Text(f"{verdict.outcome}: {verdict.mutant}: {known or verdict.reason}"), soft_wrap=True)
    for kind in KINDS:
        share = _share(found, kind)
        if share["mutants"]:
            per_cent = 100 * share["killed"] / share["mutants"]
            out.print(f"{kind}: {share['killed']} of {share['mutants']} killed ({per_cent:.1f}%)")
    if shrunk:
        few = sum(len(verdict.fields) <= FEW_FIELDS for verdict in shrunk)
        slowest = max(verdict.shrink_seconds for verdict in shrunk)
        out.print(
            f"{few} of {len(shrunk)} convictions on a case shrink to at most {FEW_FIELDS} fields that are no default "
            f"({100 * few / len(shrunk):.1f}%), the slowest in {slowest:.0f} s"
        )
    return 1 if unknown else 0
