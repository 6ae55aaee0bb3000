"""The `fp8moe` command itself: its application, and what all of its commands share."""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Annotated, Any

import typer

EXIT_BAD_INPUT = 64
"""As sysexits.h has it, so that it cannot be taken for an answer."""
EXIT_OWN_ERROR = 70
"""As sysexits.h has it: our own code raised what it should not have."""
EXIT_NOT_WRITTEN = 74
"""As sysexits.h has it: what was asked for was done, and a file that it was to go into could not be written."""
EXIT_NO_READER = 128 + signal.SIGPIPE
"""As a shell has it of a program that its reader has left, such as `head`."""
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)

app = typer.Typer(
    name="fp8moe",
    help="Which FP8 MoE backend is selected on a device, why, and whether it computes the right MoE.",
    epilog=f"Exit status {EXIT_BAD_INPUT}: an option or name is not understood; {EXIT_OWN_ERROR}: an error of "
    f"fp8moe itself; {EXIT_NOT_WRITTEN}: a file could not be written when all was done.",
    add_completion=False,
    pretty_exceptions_enable=False,
)

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON with stable keys instead of a table.")]


@contextmanager
def told() -> Iterator[None]:
    """Bad input ends the command with one line on standard error; so does standard output that takes no more."""
    try:
        from fp8moe.commands.files import NotWritten
        from fp8moe.commands.question import BadInput
        from fp8moe.registry import BackendContractError
    except ValueError as error:  # a variable that is read at import holds nonsense
        raise _bad_input(error) from None
    try:
        with _printed():
            yield
    except (BadInput, BackendContractError) as error:
        raise _bad_input(error) from None
    except NotWritten as error:
        typer.echo(f"fp8moe: {error}", err=True)
        raise typer.Exit(EXIT_NOT_WRITTEN) from None


@contextmanager
def _printed() -> Iterator[None]:
    """All that is printed is written at the end, so that no status is told of an answer that nobody got."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        _print_no_more()
        raise typer.Exit(EXIT_NO_READER) from None
    except OSError as error:
        if error.errno not in UNWRITABLE or error.filename is not None:
            raise
        _print_no_more()
        typer.echo(
            f"fp8moe: standard output could not be written ({error.strerror}); the answer is not whole", err=True
        )
        raise typer.Exit(EXIT_NOT_WRITTEN) from None


def _print_no_more() -> None:
    """Python writes what it still has when it ends, and would fail again."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


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
