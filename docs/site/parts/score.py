"""The kill score: the newest kept run of each kind of mutant on each device, by the family of the fault."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from conformance.zoo.known import KNOWN_SURVIVORS
from conformance.zoo.score import KILLED, NOT_HERE
from parts.markdown import code, fenced, listed, prose, table, text

REPORTS = Path(__file__).parents[3] / "reports"
RUNS = ("*/*-zoo/*.json", "*/*/zoo_*.json")
KINDS = ("backend", "attacker", "kernel", "selector")
FAMILIES = {
    "selector": (
        *("rules:RULES", "demands:DEMANDS", "scan:SCAN", "environment:ENVIRONMENT", "spellings:SPELLINGS"),
        *("devices:DEVICES", "toolkits:TOOLKITS", "schemes:SCHEMES_AND_ACTIVATIONS", "layers:LAYERS"),
        *("explanations:EXPLANATIONS", "errors:ERRORS", "purity:PURITY", "given:GIVEN"),
    ),
    "": (
        *("around:AROUND", "inside:INSIDE", "quantisation:QUANTISATION", "activations:ACTIVATIONS", "limits:LIMITS"),
        *("arithmetic:NUMERICS", "scales:SCALES", "routing:ROUTING", "padding:PADDING", "parallel:PARALLEL"),
        *("aliasing:ALIASING", "state:STATE", "attackers:ATTACKERS", "mutated:MUTATED", "mutated:MUTATED_COMBINE"),
    ),
}
"""Modules of the zoo with their mutants: of the selector, and of backends. A mutant is of the first that has it."""
LEFT = "Faults that the zoo no longer has under this name"
WITHOUT = "A source distribution has no kept runs; in a checkout they are in `reports`."


@dataclass(frozen=True)
class Run:
    """A kept score of one kind of mutant."""

    kind: str
    path: Path
    level: str
    device: str
    versions: Mapping[str, str]
    verdicts: Sequence[Mapping[str, Any]]

    @property
    def date(self) -> str:
        return self.path.parent.name[:10]

    @property
    def counted(self) -> list[Mapping[str, Any]]:
        """Those that this device shows."""
        return [verdict for verdict in self.verdicts if verdict["outcome"] != NOT_HERE]

    @property
    def killed(self) -> int:
        return sum(verdict["outcome"] == KILLED for verdict in self.counted)

    @property
    def command(self) -> str:
        """As the README beside it has it.

        Raises:
            LookupError: it has none.
        """
        readme = self.path.parent / "README.md"
        lines = re.sub(r" \\\n +", " ", readme.read_text(encoding="utf-8")).splitlines()
        for line in lines:
            if line.endswith(f"--report {self.path.name}"):
                return line
        raise LookupError(f"{readme}: no command ends in --report {self.path.name}")


def runs() -> list[Run]:
    """All that are kept."""
    found = []
    for path in sorted({path for pattern in RUNS for path in REPORTS.glob(pattern)}):
        content = json.loads(path.read_text(encoding="utf-8"))
        for kind in dict.fromkeys(verdict["kind"] for verdict in content["verdicts"]):
            of = [verdict for verdict in content["verdicts"] if verdict["kind"] == kind]
            found.append(Run(kind, path, content["level"], path.parts[-3], content["versions"], of))
    return found


def newest() -> list[Run]:
    """Of each kind on each device the runs of the last day, by kind.

    Raises:
        ValueError: of a kind that is not in `KINDS`.
    """
    kept = runs()
    last: dict[tuple[str, str], str] = {}
    for run in kept:
        last[run.kind, run.device] = max(run.date, last.get((run.kind, run.device), ""))
    of = [run for run in kept if run.date == last[run.kind, run.device]]
    return sorted(of, key=lambda run: (KINDS.index(run.kind), run.device, run.level))


def kill_scores() -> str:
    """All in one table."""
    return (
        table(
            ("kind", "level", "run on", "date", "mutants", "killed", "share", "report"),
            (
                (
                    run.kind,
                    run.level,
                    run.device,
                    run.date,
                    str(len(run.counted)),
                    str(run.killed),
                    f"{100 * run.killed / len(run.counted):.1f}%",
                    code(run.path.relative_to(REPORTS.parent).as_posix()),
                )
                for run in newest()
            ),
        )
        if REPORTS.is_dir()
        else WITHOUT
    )


def kill_scores_by_family() -> str:
    """A section for each run."""
    return "\n\n".join(map(_section, newest())) if REPORTS.is_dir() else WITHOUT


def known_survivors() -> str:
    return listed(
        f"{code(name)}, at {', '.join(levels)}: {text(' '.join(dict.fromkeys(levels.values())))}."
        for name, levels in KNOWN_SURVIVORS.items()
    )


def _section(run: Run) -> str:
    of_kind = _families("selector" if run.kind == "selector" else "")
    by_family: dict[str, list[Mapping[str, Any]]] = {family: [] for family in dict.fromkeys(of_kind.values())}
    for verdict in run.verdicts:
        by_family.setdefault(of_kind.get(verdict["mutant"], LEFT), []).append(verdict)
    rows = [_row(family, verdicts) for family, verdicts in by_family.items() if verdicts]
    heading = f"### Mutants of the kind {run.kind}, level {run.level}, {run.device}"
    versions = ", ".join(f"{name} {version}" for name, version in run.versions.items())
    about = f"Kept on {run.date} in {code(run.path.relative_to(REPORTS.parent).as_posix())}; {text(versions)}."
    heads = ("family", "mutants", "killed", "not killed")
    return "\n\n".join((heading, about, fenced([run.command], "sh"), table(heads, rows)))


def _row(family: str, verdicts: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    counted = [verdict for verdict in verdicts if verdict["outcome"] != NOT_HERE]
    rest = [verdict for verdict in verdicts if verdict["outcome"] != KILLED]
    left = ", ".join(f"{code(verdict['mutant'])}: {text(verdict['outcome'])}" for verdict in rest)
    return prose(family), str(len(counted)), str(len(counted) - len(rest) + len(verdicts) - len(counted)), left or "-"


def _families(zoo: str) -> dict[str, str]:
    """By a mutant's name what its module says of its faults."""
    found: dict[str, str] = {}
    for where in FAMILIES[zoo]:
        name, _, attribute = where.partition(":")
        module = import_module(".".join(filter(None, ("conformance.zoo", zoo and "selection", name))))
        about = (inspect.getdoc(module) or "").splitlines()[0].rstrip(".")
        made = getattr(module, attribute)
        for mutant in made if isinstance(made, tuple) else (made,):
            found.setdefault(mutant.name, about)
    return found
