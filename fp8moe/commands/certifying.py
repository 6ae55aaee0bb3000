"""Commands about certificates, and the forms of files: certify, verify, show, schema."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fp8moe.commands.app import app, print_json, told
from fp8moe.commands.interrupts import interruptible
from fp8moe.counted import counted


@app.command("certify")
def certify_command(
    backend: Annotated[str, typer.Argument(metavar="NAME|MODULE:CLASS", help="The backend to certify.")],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Of the certificate; not there yet.")],
    edition: Annotated[str | None, typer.Option(metavar="NAME", help="Of the suite; default: the newest.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, rocm or xpu; default: what is here.")] = None,
    budget: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", min=0, help="Start no further case after this time; called again, it goes on."),
    ] = None,
    seconds: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS",
            min=1,
            help="Of one case, before it counts as hanging; default: 60, and 240 for a process's first.",
        ),
    ] = None,
    sign: Annotated[
        Path | None, typer.Option(metavar="KEY", help="An OpenSSH ed25519 private key; without one it is not signed.")
    ] = None,
    waivers: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Known failures, in TOML; the certificate tells them.")
    ] = None,
    shard: Annotated[
        str | None, typer.Option(metavar="K/N", help="Run this piece of N alone; its report goes beside FOLDER.")
    ] = None,
    shards: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="A report of a piece, once for each of all N; then the certificate is made."),
    ] = None,
    times: Annotated[
        float,
        typer.Option(metavar="SECONDS", min=0, help="Time it beside the other backends so long, on a GPU; 0: not."),
    ] = 120,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Run the pieces on a Ray cluster, one a GPU or CPU core: auto, local, host:port. Needs fp8moe\\[ray].",
        ),
    ] = None,
    ray_shards: Annotated[
        int | None, typer.Option(metavar="N", help="How many pieces; default: as many as the cluster has GPUs.")
    ] = None,
    ray_accelerator: Annotated[
        str | None, typer.Option(metavar="TYPE", help="Of the GPUs, as Ray names it, where there are several types.")
    ] = None,
) -> None:
    """Run an edition of the suite on a backend, and write a certificate that others can verify.

    Exit status 0: it passed; 1: it failed, which the certificate says, if it was run to its end; 2: there is none yet,
    since not everything was run; 70: an error of the suite itself; 74: it could not be written, and it is told where
    the run is; 143: SIGTERM ended it, and what was run is kept.
    """
    with told(), interruptible():
        from fp8moe.commands.question import BadInput, refuse_unknown

        refuse_unknown(backend)
        from conformance.contain import SuiteError
        from fp8moe.commands.certify import certify, status_of_certify
        from fp8moe.commands.check import told_error

        if ray is not None and (shard is not None or shards or budget is not None):
            raise BadInput("--ray: without --shard, --shards and --budget; interrupted, it keeps what it has")
        if ray is None and (ray_shards is not None or ray_accelerator is not None):
            raise BadInput("--ray-shards, --ray-accelerator: with --ray ADDRESS alone")
        try:
            if ray is None:
                pieces = (shard, shards or ())
                found = certify(backend, out, edition, device, budget, sign, waivers, *pieces, times, seconds)
                raise typer.Exit(status_of_certify(found))
            from fp8moe.commands.certify_on_ray import certify_on_ray

            placed = (ray, ray_shards, ray_accelerator)
            whole = certify_on_ray(backend, out, edition, device, sign, waivers, *placed, seconds)
            raise typer.Exit(2 if whole is None else status_of_certify(whole))
        except SuiteError as error:
            raise typer.Exit(told_error(error)) from None


@app.command("verify")
def verify_command(
    folder: Annotated[Path, typer.Argument(help="A certificate.")],
    key: Annotated[
        Path | None, typer.Option(metavar="KEY", help="The OpenSSH ed25519 public key that it must be signed with.")
    ] = None,
    sample: Annotated[
        int,
        typer.Option("--spot-check", metavar="N", min=0, help="Run so many of its cases again on such a device, too."),
    ] = 0,
) -> None:
    """Derive a certificate's verdict again from its evidence; no device is needed but for a sample.

    Exit status 0: it holds, whether the backend passed or failed; 1: it does not; 64: there is no such folder.
    """
    with told():
        from fp8moe.commands.certify import print_verified, verified

        found = verified(folder, key, sample)
        print_verified(found)
        raise typer.Exit(0 if found.holds else 1)


@app.command("show")
def show_command(
    folder: Annotated[Path, typer.Argument(help="A certificate.")],
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="The page to write; it needs nothing else.")] = None,
    other: Annotated[
        Path | None, typer.Argument(metavar="[OTHER]", help="Another one: the page shows the two side by side.")
    ] = None,
    key: Annotated[
        Path | None, typer.Option(metavar="KEY", help="The OpenSSH ed25519 public key that FOLDER must be signed with.")
    ] = None,
    junit: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write FOLDER's results as JUnit XML, as CI systems read it.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="The file of --html, if it is there and no such page.")
    ] = False,
) -> None:
    """Verify a certificate, and write it as a page for people, or as JUnit XML for CI systems.

    Exit status 0: it is written, and each certificate holds; 1: it is written, and says what speaks against one.
    """
    with told():
        from fp8moe.commands.show import show

        found = show(folder, other, html, key, junit, overwrite)
        for each in found:
            typer.echo(each.verdict if each.holds else f"does not hold: {counted(len(each.findings), 'finding')}")
        for name, path in (("page", html), ("JUnit XML", junit)):
            if path is not None:
                typer.echo(f"{name}: {path}")
        raise typer.Exit(0 if all(each.holds for each in found) else 1)


@app.command("schema")
def schema_command(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="Of the file's form, such as report; default: list them.")
    ] = None,
) -> None:
    """Print the JSON Schema (draft 2020-12) of a report, a certificate's parts, a measured table, or waivers."""
    with told():
        from fp8moe.commands.schema import named, print_names

        if name is None:
            print_names()
        else:
            print_json(named(name))
