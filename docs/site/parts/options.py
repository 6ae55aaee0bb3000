"""Every option: of the `fp8moe` command from its application, of pytest from the plug-in."""

from __future__ import annotations

from typing import Any

import typer

from conformance import plugin
from fp8moe.cli import app
from fp8moe.commands.app import EXIT_BAD_INPUT
from parts.markdown import code, prose, table, text

STATUSES = "Exit status "


def commands() -> str:
    """A section for each command, in the order of `fp8moe --help`."""
    group: Any = typer.main.get_command(app)
    context = type(group).context_class(group, info_name="fp8moe")
    return "\n\n".join(_section(name, command, context) for name, command in group.commands.items())


def _section(name: str, command: Any, parent: Any) -> str:
    context = type(command).context_class(command, info_name=name, parent=parent)
    about, _, statuses = command.help.partition(STATUSES)
    usage = command.get_usage(context).partition(": ")[2]
    parts = [f"### fp8moe {name}", prose(about), code(usage), _parameters(command, context)]
    if statuses:
        parts.append(f"Exit status: {prose(statuses)}")
    return "\n\n".join(part for part in parts if part)


def _parameters(command: Any, context: Any) -> str:
    rows = []
    for parameter in command.params:
        record = parameter.get_help_record(context)
        if record is None:
            continue
        names, about = record
        rows.append((code(names), prose(about)))
    return table(("argument or option", "what it does"), rows) if rows else ""


def statuses() -> str:
    """Every command's exit statuses, as its own help has them."""
    group: Any = typer.main.get_command(app)
    rows = []
    for name, command in group.commands.items():
        _, found, told = command.help.partition(STATUSES)
        rows.append((code(f"fp8moe {name}"), prose(told) if found else "0"))
    rows.append(("any of them", f"{EXIT_BAD_INPUT}: an option or name is not understood."))
    return table(("command", "exit status"), rows)


class _Recorder:
    """In place of pytest's parser, and of its configuration."""

    def __init__(self) -> None:
        self.options: list[tuple[str, dict[str, Any]]] = []
        self.lines: list[str] = []

    def getgroup(self, *_: str) -> _Recorder:
        return self

    def addoption(self, name: str, **given: Any) -> None:
        self.options.append((name, given))

    def addinivalue_line(self, _name: str, line: str) -> None:
        self.lines.append(line)


def _recorded() -> _Recorder:
    recorder = _Recorder()
    told: Any = recorder
    plugin.pytest_addoption(told)
    plugin.pytest_configure(told)
    return recorder


def pytest_options() -> str:
    return table(
        ("option", "what it does", "default"),
        ((code(_spelled(name, given)), prose(given["help"]), _default(given)) for name, given in _recorded().options),
    )


def pytest_markers() -> str:
    """For `-m`."""
    lines = (line.split(": ", 1) for line in _recorded().lines)
    return table(("marker", "the checks"), ((code(name), text(about)) for name, about in lines))


def _spelled(name: str, given: dict[str, Any]) -> str:
    if given.get("action") in ("store_true", "store_const"):
        return name
    value = given.get("metavar") or "|".join(given.get("choices", ())) or "VALUE"
    return f"{name}={value}"


def _default(given: dict[str, Any]) -> str:
    default = given.get("default")
    return "-" if default in (None, []) else code(default)
