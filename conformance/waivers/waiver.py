"""One waiver, and the waivers of a file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date, datetime, timezone
from typing import TYPE_CHECKING

from packaging.version import InvalidVersion

from conformance.cases import Case
from conformance.waivers.patterns import CasePattern, matches

if TYPE_CHECKING:
    from packaging.specifiers import SpecifierSet

FIELDS = ("check", "case", "backend", "backend_version", "device", "reason", "tracker", "owner", "expires")
"""Of one waiver; each must be there."""


class WaiverError(ValueError):
    """A file of waivers that breaks the rules; the text names the file, the waiver, the field, the value, a remedy."""


@dataclass(frozen=True)
class Waiver:
    """A known failure: where it is, why, and who answers for it until when.

    Args:
        number: in its file, from 1.
        check: a check's id, with * for any text.
        case: as it was written; `cases` is what it means.
        backend: its name, or "module:Class".
        backend_version: as it was written; `versions` is what it means.
        device: in the driver's words, or a name that `--device` takes, with * for any text.
        expires: the last day on which it is in force, UTC.
    """

    number: int
    check: str
    case: str
    backend: str
    backend_version: str
    device: str
    reason: str
    tracker: str
    owner: str
    expires: date
    cases: CasePattern = field(repr=False, compare=False)
    versions: SpecifierSet = field(repr=False, compare=False)

    def covers(self, check: str, case: Case) -> bool:
        return matches(self.check, check) and self.cases.holds(case)

    def holds_for(self, version: str) -> bool:
        """Whether a backend's version is in its range; "" and what is no version are not."""
        try:
            return bool(version) and self.versions.contains(version, prereleases=True)
        except InvalidVersion:
            return False

    def days_left(self, today: date) -> int:
        """0 on the last day, less than 0 once it has expired."""
        return (self.expires - today).days

    def told(self) -> dict[str, str]:
        """Its fields, for a report."""
        return {name: str(getattr(self, name)) for name in FIELDS}

    @property
    def answered_for(self) -> str:
        """By whom, where, and until when, in words."""
        return f"{self.owner}, {self.tracker}, until {self.expires}"

    def __str__(self) -> str:
        return f"waiver {self.number} ({self.check} on {self.case}; {self.answered_for})"


@dataclass(frozen=True)
class Waivers:
    """Those of one file; `source` names it in errors."""

    source: str = ""
    waivers: Sequence[Waiver] = ()


def utc_today() -> date:
    return datetime.now(timezone.utc).date()
