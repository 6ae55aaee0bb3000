"""Commands that prepare a backend: init-vendor, build."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fp8moe.commands.app import app, told


@app.command("init-vendor")
def init_vendor_command(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Of the package, such as acme-moe.")],
    into: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="The folder to write, new or empty; default: NAME.")
    ] = None,
    backend: Annotated[
        str | None, typer.Option(metavar="BACKEND", help="The backend's name; default: NAME as an identifier.")
    ] = None,
) -> None:
    """Write a package with a backend in it: one class, one entry point, a test, CI, and at most 40 lines to fill in.

    As written it has the reference's arithmetic, so that `fp8moe check` has a verdict from the start.
    """
    with told():
        from fp8moe.commands.init_vendor import print_written, written

        print_written(written(name, into, backend))


@app.command("build")
def build_command(
    backend: Annotated[str, typer.Argument(metavar="NAME", help="The backend; FLASHINFER_CUTLASS alone has a build.")],
    check: Annotated[bool, typer.Option("--check", help="Only say whether they are there, and where.")] = False,
    jobs: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Compilations at a time; default: what cores and free memory allow."),
    ] = None,
    arch: Annotated[
        str | None, typer.Option(metavar="ARCH", help="Build for this one, such as 90a; default: the device's own.")
    ] = None,
) -> None:
    """Build the kernels that a library compiles before its first call, or say where they are.

    Says beforehand how long it takes, and goes on where an earlier run was stopped. Exit status 0: they are there; 1:
    they are not (--check), or the build was stopped; 2: they cannot be built here, or the build failed.
    """
    with told():
        from fp8moe.commands.build import built

        raise typer.Exit(built(backend, check=check, jobs=jobs, arch=arch))
