"""What a gate run came to: three verdicts, kept apart, and one over all of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Any

from conformance.gate.numerics import CellChange, Change
from conformance.gate.verdicts import Outcome, RunVerdict
from conformance.results import finite

FORMAT = 1


class Status(str, Enum):
    """Of one part of a gate run, and of the whole."""

    PASSED = "passed"
    FAILED = "failed"
    INCONCLUSIVE = "inconclusive"
    NOT_RUN = "not_run"


EXIT = {Status.PASSED: 0, Status.FAILED: 1, Status.INCONCLUSIVE: 2, Status.NOT_RUN: 2}


@dataclass(frozen=True)
class Decisions:
    """Whether the selector decides as it did.

    Args:
        status: failed where it decides otherwise and nobody has accepted it.
        lines: the changes as rules.
        reason: why, where it was not run.
    """

    status: Status
    lines: Sequence[str] = ()
    reason: str = ""


@dataclass(frozen=True)
class GateResult:
    """One run of the gate.

    Args:
        compared: what with what, in words.
        device: its name.
        date: ISO 8601.
        versions: of fp8moe, Python, torch, triton.
        decisions, numerics, speed: the three parts; None where one was not run, and then `left` says why.
        left: what was not run, by part, and why.
        told: of the device's state, by name: clocks, reasons for slower ones.
    """

    compared: str
    device: str
    date: str
    versions: Mapping[str, str]
    decisions: Decisions | None = None
    numerics: Sequence[CellChange] | None = None
    speed: RunVerdict | None = None
    left: Mapping[str, str] = field(default_factory=dict)
    told: Mapping[str, str] = field(default_factory=dict)

    @property
    def parts(self) -> dict[str, Status]:
        """The verdict of each part."""
        found = {"decisions": Status.NOT_RUN, "numerics": Status.NOT_RUN, "speed": Status.NOT_RUN}
        if self.decisions is not None:
            found["decisions"] = self.decisions.status
        if self.numerics:
            worse = any(cell.change in (Change.WORSE, Change.GONE) for cell in self.numerics)
            found["numerics"] = Status.FAILED if worse else Status.PASSED
        if self.speed is not None and self.speed.cells:
            unsure = self.speed.of(Outcome.INCONCLUSIVE)
            found["speed"] = Status.FAILED if self.speed.slower else Status.INCONCLUSIVE if unsure else Status.PASSED
        return found

    @property
    def status(self) -> Status:
        """Failed where a part is; else inconclusive where one is; else passed, if any was run."""
        parts = set(self.parts.values())
        for status in (Status.FAILED, Status.INCONCLUSIVE, Status.PASSED):
            if status in parts:
                return status
        return Status.NOT_RUN

    def to_json(self) -> str:
        """Everything as plain data."""
        content: dict[str, Any] = {
            "format": FORMAT,
            "status": self.status.value,
            "parts": {name: status.value for name, status in self.parts.items()},
            "compared": self.compared,
            "device": self.device,
            "date": self.date,
            "versions": dict(self.versions),
            "decisions": None if self.decisions is None else asdict(self.decisions),
            "numerics": None if self.numerics is None else [asdict(cell) for cell in self.numerics],
            "speed": None if self.speed is None else self.speed.as_json(),
            "left": dict(self.left),
            "told": dict(self.told),
        }
        return json.dumps(finite(content), indent=1)
