"""What the commands share when they print: the console, tables, a platform as JSON."""

from __future__ import annotations

import os
import sys
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fp8moe.platforms import Platform
from fp8moe.registry import broken_plug_ins

FORMAT = 1
"""Version of the JSON; a key is added without a new one, and taken away or changed only with one."""

WRAPPED = ("case", "catalogue", "detail", "does", "lacks here", "smallest case", "why")
"""Columns whose texts may run over several lines."""


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Lets the command see it, where rich would end it with 1, which is a verdict."""
        raise  # what rich handles when it calls this


def console(*, stderr: bool = False, width: int = 180) -> Console:
    """Standard output, or error; where it is no terminal `width` wide, so that a file or a pipe gets whole lines."""
    known = (sys.stderr if stderr else sys.stdout).isatty() or "COLUMNS" in os.environ
    return _Console(width=None if known else width, highlight=False, stderr=stderr)


def table(title: str, *columns: str) -> Table:
    made = Table(title=title or None, title_justify="left", title_style="bold")
    for column in columns:
        made.add_column(column, no_wrap=column not in WRAPPED, overflow="fold")
    return made


def yes_or_no(answer: bool, yes: str, no: str) -> Text:
    return Text(yes, style="green") if answer else Text(no, style="yellow")


def broken_json() -> list[dict[str, str]]:
    """Installed packages' backends that are left out, and why."""
    return [
        {"entry_point": each.name, "backend": each.backend, "distribution": each.distribution, "error": each.error}
        for each in broken_plug_ins()
    ]


def print_broken(out: Console) -> None:
    """The same in lines, where there are any."""
    for each in broken_plug_ins():
        out.print(Text(f"plug-in that does not load, left out: {each.error}", style="yellow"), soft_wrap=True)


def platform_json(platform: Platform) -> dict[str, Any]:
    return {
        "kind": platform.kind,
        "architecture": platform.architecture,
        "capability": platform.capability,
        "gcn_arch": platform.gcn_arch,
        "cuda_version": platform.cuda_version,
        "libraries": sorted(platform.libraries),
    }
