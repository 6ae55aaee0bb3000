"""The `fp8moe` command: where its parts come together. What a command does is imported when it runs."""

from __future__ import annotations

import sys

import typer

from fp8moe.commands import asking, certifying, judging, preparing  # each registers its commands
from fp8moe.commands.app import EXIT_BAD_INPUT, app

__all__ = ["app", "asking", "certifying", "judging", "main", "preparing"]


def main() -> None:
    """The console script: the exit status of the command, and usage errors in one line as well."""
    usage_error = next(cls for cls in typer.BadParameter.__mro__ if cls.__name__ == "ClickException")
    try:
        status = app(prog_name="fp8moe", standalone_mode=False)
    except Exception as error:
        if not isinstance(error, usage_error):
            raise
        text = " ".join(str(getattr(error, "format_message", error.__str__)()).split())
        context = getattr(error, "ctx", None)
        command = context.command_path if context is not None else "fp8moe"
        typer.echo(f"{command}: {text} (see {command} --help)", err=True)
        status = EXIT_BAD_INPUT
    sys.exit(status if isinstance(status, int) else 0)
