"""Commands that prepare a backend: build."""

from __future__ import annotations

from typing import Annotated

import typer

from fp8moe.commands.app import app, told


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
