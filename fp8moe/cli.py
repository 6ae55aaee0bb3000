"""The `fp8moe` command: where its parts come together. What a command does is imported when it runs."""

from __future__ import annotations

import os
import sys
import traceback

import typer

from fp8moe.commands import asking, certifying, judging, preparing  # each registers its commands
from fp8moe.commands.app import EXIT_BAD_INPUT, EXIT_OWN_ERROR, app

__all__ = ["app", "asking", "certifying", "judging", "main", "preparing"]


def main() -> None:
    """The console script: the exit status of the command, usage errors in one line as well, and no verdict's status
    where our own code raised."""
    _open_closed()
    usage_error = next(cls for cls in typer.BadParameter.__mro__ if cls.__name__ == "ClickException")
    try:
        status = app(prog_name="fp8moe", standalone_mode=False)
    except Exception as error:
        if not isinstance(error, usage_error):
            traceback.print_exc()
            typer.echo("fp8moe: an error of its own, and no answer or verdict", err=True)
            sys.exit(EXIT_OWN_ERROR)
        text = " ".join(str(getattr(error, "format_message", error.__str__)()).split())
        context = getattr(error, "ctx", None)
        command = context.command_path if context is not None else "fp8moe"
        typer.echo(f"{command}: {text} (see {command} --help)", err=True)
        status = EXIT_BAD_INPUT
    sys.exit(status if isinstance(status, int) else 0)


def _open_closed() -> None:
    """Standard streams that the command was started without lead nowhere: files that are opened later would get their
    numbers, and be printed to."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode))
