"""What a run of `check_backend` came to: three verdicts, every check, what was covered, and how to go on."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from conformance.results import CheckResult, Status, finite, place
from conformance.typed import check_object
from conformance.untrusted import Malformed, object_of, shown
from conformance.vocabulary import SCHEME_NAMES
from fp8moe.config import ACTIVATIONS

FORMAT = 1
PASSED, FAILED, INCOMPLETE = "passed", "failed", "incomplete"
NOT_MEASURED = "not_run"
BEYOND = "is beyond the declared"
"""What the reason of a case says that passes a backend's declared limits."""
VERDICTS = ("selects", "computes", "performs")
DERIVED = ("format", "verdict", "verdicts")
"""What the file of a report tells on top of its fields, for whoever does not want to derive it."""
LATER = ("date", "takes", "fnuz", "shard", "waivers", "code")
"""Fields that older reports lack."""


@dataclass(frozen=True)
class Report:
    """The outcome of one run on one backend.

    Args:
        backend: its name.
        origin: what names it again on a command line.
        level: "smoke", "quick" or "certify".
        seed: of the cases that are not pinned.
        target: the device, as `--fp8moe-device` names it.
        device: in words.
        versions: of fp8moe, torch, triton, Python.
        checks: one result for each check and case; what was declared and not run is among them, with the reason.
        coverage: what the cases that were judged cover, in words.
        excluded: pairs of values that no case has together, with the reason.
        seconds: wall time of the run, of earlier pieces too.
        planned: how many (check, case) the level has.
        date: when it ended, ISO 8601; of a resumed run, its last piece.
    """

    backend: str
    origin: str
    level: str
    seed: int
    target: str
    device: str
    versions: Mapping[str, str]
    checks: Sequence[CheckResult]
    coverage: Sequence[str] = ()
    excluded: Sequence[str] = ()
    seconds: float = 0.0
    planned: int = 0
    unshrunk: Mapping[str, str] = field(default_factory=dict)
    """The case that a failure was found as, by "check case" of what it shrank to."""
    date: str = ""
    takes: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Activations by scheme, of those that were run; empty in older reports."""
    fnuz: bool = False
    """Whether cases may have weights of e4m3fnuz."""
    shard: str = ""
    """Which piece of the level was run, "K/N"; "" where it was the whole."""
    waivers: Sequence[Mapping[str, str]] = ()
    """Those that were in force, each with the fields of its file."""
    code: Mapping[str, str] = field(default_factory=dict)
    """Which code the backend had, by `conformance.backend_code`; empty in older reports, where it is in no file, and
    where it changed while it was run."""

    @property
    def verdict(self) -> str:
        """ "failed" where any check failed; "incomplete" where what the level asks of the selection or of the numbers
        was not all run; else "passed", cases that are waived notwithstanding: `waived` has them."""
        if FAILED in self.verdicts.values():
            return FAILED
        return PASSED if self.verdicts["selects"] == self.verdicts["computes"] == PASSED else INCOMPLETE

    @property
    def verdicts(self) -> dict[str, str]:
        """Of each question: "passed", "failed", "incomplete", or "not_run" where no check of it is part of the run."""
        return {name: self._verdict(name) for name in VERDICTS}

    def _verdict(self, name: str) -> str:
        found = {check.status for check in self.checks if check.verdict == name}
        if Status.FAILED in found:
            return FAILED
        if self.unjudged and name == "computes":
            return INCOMPLETE
        if found and found <= {Status.NOT_RUN, Status.NOT_SUPPORTED}:
            return NOT_MEASURED if name == "performs" else INCOMPLETE
        if Status.NOT_RUN in found:
            return INCOMPLETE
        return PASSED if Status.PASSED in found else NOT_MEASURED

    @property
    def unjudged(self) -> list[tuple[str, str]]:
        """(check, scheme) of which no case was judged, since all are beyond what the backend declares or takes."""
        found: dict[tuple[str, str], set[Status]] = {}
        for check in self.checks:
            if check.verdict == "computes" and check.case:
                beyond = check.status is Status.NOT_SUPPORTED or BEYOND in check.reason
                status = Status.NOT_SUPPORTED if beyond else check.status
                found.setdefault((check.check, check.scheme), set()).add(status)
        return [key for key, statuses in found.items() if statuses == {Status.NOT_SUPPORTED}]

    @property
    def failures(self) -> list[CheckResult]:
        """The checks that failed; `reproduce` of each is one command."""
        return [check for check in self.checks if check.status is Status.FAILED]

    @property
    def waived(self) -> list[CheckResult]:
        """The checks that failed and are covered by a waiver, which `reason` names beside what failed."""
        return [check for check in self.checks if check.status is Status.WAIVED]

    @property
    def evidence(self) -> dict[str, int]:
        """How many results there are of each class of evidence."""
        return dict(Counter(check.evidence.value for check in self.checks if check.evidence is not None))

    @property
    def place(self) -> str:
        """Where it was run, as a heading names it."""
        return place(self.target, (check.evidence for check in self.checks))

    @property
    def scope(self) -> str:
        """Which schemes the backend takes, and which it does not, in words: a verdict is of the former alone."""
        taken = [_with_activations(name, self.takes[name]) for name in SCHEME_NAMES if self.takes.get(name)]
        refused = [name for name in SCHEME_NAMES if not self.takes.get(name)]
        told = f"takes {len(taken)} of {len(SCHEME_NAMES)} schemes: {', '.join(taken) or 'none'}"
        return f"{told}; does not take {', '.join(refused)}" if refused else told

    @property
    def counts(self) -> dict[str, int]:
        """How many checks have each status."""
        return dict(Counter(check.status.value for check in self.checks))

    def distribution(self) -> dict[str, float]:
        """error/bound over the cases that passed by the bound: median, p99 and largest; empty where none did."""
        values = sorted(
            check.error_over_bound
            for check in self.checks
            if check.status is Status.PASSED and check.error_over_bound is not None
        )
        if not values:
            return {}
        return {
            "cases": len(values),
            "median": values[len(values) // 2],
            "p99": values[min(len(values) - 1, 99 * len(values) // 100)],
            "largest": values[-1],
        }

    def to_json(self) -> str:
        """Everything, for machines; `from_json` reads it."""
        checks = [
            {name: finite(value) for name, value in asdict(check).items() if value not in (None, "", {})}
            for check in self.checks
        ]
        told: dict[str, Any] = {
            "format": FORMAT,
            "verdict": self.verdict,
            "verdicts": self.verdicts,
            **{name: value for name, value in vars(self).items() if name != "checks"},
            "checks": checks,
        }
        return json.dumps(told, indent=1)

    @classmethod
    def from_json(cls, text: str | bytes) -> Report:
        """A report that `to_json` wrote. It need not be trusted.

        Raises:
            conformance.untrusted.Malformed: (a ValueError) it is none, or of another format.
        """
        data = object_of(text, "report")
        if data.get("format") != FORMAT or "backend" not in data:
            told = f"no report of check_backend in format {FORMAT} (format={shown(data.get('format'))})"
            raise Malformed(f"{told}: name another file, or upgrade fp8moe where a newer one wrote it")
        return cls.from_object(data, "report")

    @classmethod
    def from_object(cls, data: Mapping[str, Any], where: str, may_lack: Collection[str] = LATER) -> Report:
        """The same, of JSON that has been read and is bounded.

        Args:
            where: names it in errors.
            may_lack: fields that need not be there.

        Raises:
            conformance.untrusted.Malformed: (a ValueError) a field is missing, unknown, or of another type.
        """
        known = {name: value for name, value in data.items() if name not in DERIVED}
        check_object(known, cls, where, may_lack)
        known |= {name: tuple(known.get(name, ())) for name in ("coverage", "excluded", "waivers")}
        known["takes"] = {scheme: tuple(names) for scheme, names in known.get("takes", {}).items()}
        known |= {"checks": tuple(map(CheckResult.from_object, known["checks"])), "seconds": float(known["seconds"])}
        return cls(**known)


def _with_activations(scheme: str, activations: Sequence[str]) -> str:
    """Such as "block (silu alone)", "block (5 of 9 activations)"; the bare scheme where every activation is taken."""
    taken = [name for name in ACTIVATIONS if name in activations]
    if len(taken) == len(ACTIVATIONS):
        return scheme
    return f"{scheme} ({f'{taken[0]} alone' if len(taken) == 1 else f'{len(taken)} of {len(ACTIVATIONS)} activations'})"
