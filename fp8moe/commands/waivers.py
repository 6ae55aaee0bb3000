"""`fp8moe waivers FILE`: the waivers of a file, with the days that each has left; nothing is run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from rich.text import Text

from conformance.waivers import Waiver, WaiverError, Waivers, read_waivers
from conformance.waivers.in_force import is_known, known_names
from conformance.waivers.waiver import utc_today
from fp8moe.commands import tables
from fp8moe.commands.question import BadInput, pick
from fp8moe.counted import counted
from fp8moe.near import near

EXPIRED, UNKNOWN = 1, 2
SOON = 30
"""Days left that are few."""


@dataclass(frozen=True)
class Listed:
    """The waivers that were asked for, on one day."""

    waivers: Sequence[Waiver]
    today: date

    @property
    def expired(self) -> list[Waiver]:
        return [waiver for waiver in self.waivers if waiver.days_left(self.today) < 0]

    @property
    def unknown(self) -> list[str]:
        """The backends that are not here, or are misspelt."""
        return sorted({waiver.backend for waiver in self.waivers if not is_known(waiver.backend)})

    @property
    def exit_status(self) -> int:
        return EXPIRED if self.expired else UNKNOWN if self.unknown else 0


def read(option: str, path: Path) -> Waivers:
    """
    Raises:
        BadInput: the file cannot be read, or breaks the rules.
    """
    try:
        return read_waivers(path)
    except (OSError, WaiverError) as error:
        raise BadInput(f"{option} {path}: {str(error).removeprefix(f'{path}: ')}") from None


def listed(path: Path, backend: str | None) -> Listed:
    """Those of a file, or of one backend in it.

    Raises:
        BadInput: the file cannot be read or breaks the rules, or none is for that backend.
    """
    waivers = read("waivers", path).waivers
    if backend is not None:
        name = pick("--backend", backend, dict.fromkeys(waiver.backend for waiver in waivers))
        waivers = [waiver for waiver in waivers if waiver.backend == name]
    return Listed(waivers, utc_today())


def print_waivers(found: Listed) -> None:
    columns = ("#", "backend", "device", "check", "case", "owner, tracker", "expires", "days left", "why")
    table = tables.table("waivers", *columns)
    for waiver in found.waivers:
        left = waiver.days_left(found.today)
        style = "bold red" if left < 0 else "yellow" if left < SOON else "green"
        days = Text(str(left) if left >= 0 else f"expired {counted(-left, 'day')} ago", style)
        backend, owner = f"{waiver.backend}\n{waiver.backend_version}", f"{waiver.owner}\n{waiver.tracker}"
        row = (str(waiver.number), backend, waiver.device, waiver.check, waiver.case, owner, str(waiver.expires))
        table.add_row(*map(Text, row), days, Text(waiver.reason))
    out = tables.console()
    out.print(table)
    expired = f", {len(found.expired)} expired: remove them, or renew them with a reason" if found.expired else ""
    out.print(f"{counted(len(found.waivers), 'waiver')}{expired}", markup=False)
    for name in found.unknown:
        meant = [] if ":" in name else near(name, known_names())
        remedy = f"did you mean {' or '.join(meant)}?" if meant else "correct the name, or install its package"
        out.print(Text(f"backend {name} is not known here: {remedy}", "bold yellow"), soft_wrap=True)


def waivers_json(found: Listed) -> dict[str, Any]:
    return {
        "format": tables.FORMAT,
        "waivers": [
            {
                "number": waiver.number,
                **waiver.told(),
                "days_left": waiver.days_left(found.today),
                "known_here": is_known(waiver.backend),
            }
            for waiver in found.waivers
        ],
    }
