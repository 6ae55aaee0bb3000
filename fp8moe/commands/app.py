"""The `fp8moe` command itself: its application, and what all of its commands share."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

EXIT_BAD_INPUT = 64
"""As sysexits.h has it, so that it cannot be taken for an answer."""
EXIT_NOT_WRITTEN = 74
"""As sysexits.h has it: what was asked for was done, and a file that it was to go into could not be written."""

app = typer.Typer(
    name="fp8moe",
    help="Which FP8 MoE backend is selected on a device, why, and whether it computes the right MoE.",
    epilog=f"Exit status {EXIT_BAD_INPUT}: an option or name is not understood; {EXIT_NOT_WRITTEN}: a file could not "
    "be written when all was done.",
    add_completion=False,
    pretty_exceptions_enable=False,
)

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON with stable keys instead of a table.")]


@contextmanager
def told() -> Iterator[None]:
    """Bad input ends the command with one line on standard error."""
    try:
        from fp8moe.commands.files import NotWritten
        from fp8moe.commands.question import BadInput
        from fp8moe.registry import BackendContractError
    except ValueError as error:  # a variable that is read at import holds nonsense
        raise _bad_input(error) from None
    try:
        yield
    except (BadInput, BackendContractError) as error:
        raise _bad_input(error) from None
    except NotWritten as error:
        typer.echo(f"fp8moe: {error}", err=True)
        raise typer.Exit(EXIT_NOT_WRITTEN) from None


def _bad_input(error: Exception) -> typer.Exit:
    typer.echo(f"fp8moe: {error}", err=True)
    return typer.Exit(EXIT_BAD_INPUT)


def print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2))


def _version(asked: bool) -> None:
    if asked:
        from fp8moe import __version__

        typer.echo(f"fp8moe {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _top(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
