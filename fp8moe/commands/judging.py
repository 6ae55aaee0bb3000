"""Commands that judge: check, waivers, repro, emulate, probe, sanitize, zoo, gate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fp8moe.commands.app import EXIT_NOT_WRITTEN, JsonOption, app, print_json, told
from fp8moe.commands.interrupts import held, interruptible


@app.command("check")
def check_command(
    backend: Annotated[str, typer.Argument(metavar="NAME|MODULE:CLASS", help="The backend to judge.")],
    level: Annotated[str, typer.Option(help="smoke, quick or certify.")] = "smoke",
    device: Annotated[
        str | None, typer.Option(help="cpu, interpreter, cuda, rocm or xpu; default: what is here.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the cases that are not pinned.")] = 0,
    budget: Annotated[
        float | None, typer.Option(metavar="SECONDS", min=0, help="Start no further case after this time.")
    ] = None,
    report: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write every result as JSON; FILE.gz: packed.")
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Go on with the report of a run that its budget, a signal or a hang ended."),
    ] = None,
    seconds: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS",
            min=1,
            help="Of one case, before it counts as hanging; default: 60, and 240 for a process's first. With more, "
            "--resume runs what hung again.",
        ),
    ] = None,
    waivers: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Known failures, in TOML; a waiver that is rotten fails the run."),
    ] = None,
    junit: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write every result as JUnit XML, as CI systems read it.")
    ] = None,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Tell in full also relations that fail where a plain call does.")
    ] = False,
) -> None:
    """Judge one backend: its predicate and, on this device, its numbers; in processes that may die of it.

    Exit status 0: it passed; 1: it failed; 2: not everything was run; 70: an error of the suite itself; 74: a report
    could not be written, and it is told where it is; 143: SIGTERM ended it, and what was run is kept.
    """
    with told(), interruptible(), held() as interrupted:
        from fp8moe.commands.question import refuse_unknown

        refuse_unknown(backend)
        from conformance.contain import SuiteError
        from fp8moe.commands.check import (
            all_written,
            checked,
            print_report,
            status_of,
            tell_hanging,
            tell_interrupted,
            told_error,
        )
        from fp8moe.commands.files import check_folders

        if junit is not None:
            check_folders({"--junit": junit})
        try:
            files = (report, resume)
            found = checked(backend, level, device, seed, budget, *files, seconds, waivers, interrupted=interrupted)
        except SuiteError as error:
            raise typer.Exit(told_error(error)) from None
        whole = all_written(found, report, junit)
        print_report(found, None if verbose else "-v tells each in full, and --report FILE keeps it")
        kept = "--report FILE keeps a run for --resume" if report is None else f"--resume {report} goes on with it"
        tell_hanging(found, f"give it a greater --seconds; {kept}")
        if interrupted.is_set() and whole:
            tell_interrupted(found, report)
        raise typer.Exit(status_of(found) if whole else EXIT_NOT_WRITTEN)


@app.command("waivers")
def waivers_command(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A file of waivers, in TOML.")],
    backend: Annotated[
        str | None, typer.Option(metavar="NAME|MODULE:CLASS", help="Only those for this backend.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Known failures that a vendor answers for, and how many days each has left. Runs nothing.

    Exit status 0: all are in force; 1: one has expired; 2: a backend is not known here, since it is misspelt or not
    installed. What they cover, `fp8moe check --waivers FILE` says.
    """
    with told():
        from fp8moe.commands.waivers import listed, print_waivers, waivers_json

        found = listed(file, backend)
        if as_json:
            print_json(waivers_json(found))
        else:
            print_waivers(found)
        raise typer.Exit(found.exit_status)


@app.command("repro")
def repro_command(
    what: Annotated[
        str,
        typer.Argument(
            metavar="CASE|FOLDER|FILE",
            help="A case's id, as a report prints it; or a certificate or a report (.json, .json.gz) with failures.",
        ),
    ],
    backend: Annotated[
        str | None,
        typer.Option(metavar="NAME|MODULE:CLASS", help="The backend; default: the report's, of a case TRITON."),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(help="cpu, interpreter, cuda, rocm or xpu; default: the report's, of a case what is here."),
    ] = None,
    check: Annotated[
        str | None,
        typer.Option(metavar="ID", help="As a report names it; default: the report's, of a case equivalence."),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Draw the values by this one; default: the case's own.")
    ] = None,
    number: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Which of a report's failures; default: the first."),
    ] = None,
    dump: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write all tensors, expected ones and bounds too, as FILE.safetensors."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="The file of --dump, if it is there.")] = False,
    seconds: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", min=1, help="Before it counts as hanging; default: 240, as a process's first."),
    ] = None,
    here: Annotated[
        bool,
        typer.Option("--here", help="In this process, for a debugger; what ends the backend ends the command, too."),
    ] = False,
) -> None:
    """Run one case again, and show what differs; of a certificate or a report, a failure that it tells of.

    It imports and runs the backend that the certificate or report names, if that is installed here; in a process that
    may die of it, as `fp8moe check` does.

    Exit status 0: it passed; 1: it failed; 2: it could not be run, or no failure is there; 70: an error of the suite.
    """
    with told(), interruptible():
        from fp8moe.commands.repro import Given, reproduced

        given = Given(backend, device, check, seed, number, dump, overwrite, seconds, here)
        raise typer.Exit(reproduced(what, given))


@app.command("emulate")
def emulate_command(
    case: Annotated[str | None, typer.Argument(help="A case's id; default: a small one with block scales.")] = None,
    device: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Only this device, such as sm_100 or b200; may be given again."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """What our Triton recipe gives in the arithmetic of GPUs that are not here, and how far apart they are.

    Exit status 0: each output lies within the bound of its device's arithmetic; 1: one does not, or the
    bounds contradict one another.
    """
    with told():
        from fp8moe.commands.emulate import DEFAULT_CASE, emulation_json, emulation_of, failures, print_emulation

        emulation, results = emulation_of(case or DEFAULT_CASE, device or ())
        if as_json:
            print_json(emulation_json(emulation, results))
        else:
            print_emulation(emulation, results)
        raise typer.Exit(1 if failures(emulation, results) else 0)


@app.command("probe")
def probe_command(
    backend: Annotated[
        str | None,
        typer.Argument(metavar="[NAME|MODULE:CLASS]", help="A backend; default: the device's own product, and TRITON."),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, interpreter, cuda, rocm or xpu; default: what is here.")
    ] = None,
    units: Annotated[bool, typer.Option("--units", help="What the probe says of every unit that we emulate.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Which arithmetic an FP8 product has, by crafted dot products, and whether it is the declared one.

    Exit status 0: as declared, better, or not declared; 1: worse than declared (with --units: the probe misreads a
    unit); 2: nothing could be probed.
    """
    with told():
        from fp8moe.commands import probe
        from fp8moe.commands.question import BadInput

        if units:
            if backend is not None or device is not None:
                raise BadInput("--units asks about emulated units, so it goes with neither a backend nor a device")
            rows = probe.units()
            if as_json:
                print_json(probe.units_json(rows))
            else:
                probe.print_units(rows)
            raise typer.Exit(0 if all(row.right for row in rows) else 1)
        found = probe.probe_here(device) if backend is None else [probe.probe_named(backend, device)]
        if as_json:
            readings = [probe.found_json(one) for one in found]
            print_json(readings if backend is None else readings[0])
        else:
            probe.print_found(found)
        raise typer.Exit(probe.exit_status(found))


@app.command("sanitize")
def sanitize_command(
    backend: Annotated[str, typer.Argument(metavar="NAME|MODULE:CLASS", help="The backend whose kernels to watch.")],
    tool: Annotated[
        list[str] | None,
        typer.Option(
            "--tool", metavar="TOOL", help="memcheck, initcheck, racecheck, synccheck; default: the first three."
        ),
    ] = None,
    case: Annotated[
        list[str] | None,
        typer.Option("--case", metavar="CASE", help="A case's id; may be given again; default: pinned ones."),
    ] = None,
    cases: Annotated[int, typer.Option(min=1, help="How many pinned cases of each scheme.")] = 2,
    report: Annotated[Path | None, typer.Option(metavar="FILE", help="Write every result as JSON.")] = None,
) -> None:
    """Run cases under NVIDIA's compute-sanitizer; each finding is its case's result. Needs a CUDA device.

    Exit status 0: nothing was found; 1: something was; 2: not everything could be run.
    """
    with told():
        from fp8moe.commands.sanitize import print_sanitized, sanitized

        raise typer.Exit(print_sanitized(sanitized(backend, tool or (), case or (), cases, report)))


@app.command("zoo")
def zoo_command(
    score: Annotated[bool, typer.Option("--score", help="Run the mutants, and say what convicts each.")] = False,
    level: Annotated[str, typer.Option(help="smoke, quick or certify.")] = "smoke",
    kind: Annotated[
        list[str] | None,
        typer.Option("--kind", metavar="KIND", help="Only selector, backend, attacker or kernel; may be given again."),
    ] = None,
    part: Annotated[str | None, typer.Option(metavar="I/N", help="Every N-th backend mutant, from number I.")] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, interpreter, cuda, rocm or xpu; default: what is here.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the cases that are not pinned.")] = 0,
    shrink: Annotated[bool, typer.Option("--shrink", help="Make each convicting case small, too.")] = False,
    report: Annotated[Path | None, typer.Option(metavar="FILE", help="Write every verdict as JSON.")] = None,
) -> None:
    """List the backends and selectors that are broken on purpose, or measure how many the suite convicts.

    Exit status 0: all convicted, but for survivors that are known and listed; 1: another one survives.
    """
    with told():
        from fp8moe.commands.zoo import print_score, print_zoo, scored

        if not score:
            print_zoo()
            return
        raise typer.Exit(print_score(scored(level, kind or (), part, device, seed, report, shrink)))


@app.command("gate")
def gate_command(
    write: Annotated[Path | None, typer.Option(metavar="FILE", help="Gather a baseline, and write it.")] = None,
    baseline: Annotated[Path | None, typer.Option(metavar="FILE", help="Compare this code with a baseline.")] = None,
    against: Annotated[
        Path | None, typer.Option(metavar="CHECKOUT", help="Time another checkout and this one, in turn.")
    ] = None,
    against_backend: Annotated[
        str | None, typer.Option(metavar="NAME", help="Time another backend and the one of --backend, in turn.")
    ] = None,
    backend: Annotated[
        list[str] | None,
        typer.Option("--backend", metavar="NAME|MODULE:CLASS", help="A backend; may be given again."),
    ] = None,
    part: Annotated[
        list[str] | None,
        typer.Option("--part", metavar="PART", help="Only decisions, numerics or speed; may be given again."),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="Of a baseline to write: cpu, interpreter, cuda; default: what is here.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of a baseline's cases.")] = 0,
    runs: Annotated[int, typer.Option(min=1, help="Of a baseline: how often everything is timed.")] = 1,
    cells: Annotated[int | None, typer.Option(min=1, help="Time no more cells of each backend; default: all.")] = None,
    unwatched: Annotated[
        bool, typer.Option("--unwatched", help="Take a verdict on times though nothing tells the device's state.")
    ] = False,
    history: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Earlier baselines, for the history in --html.")
    ] = None,
    markdown: Annotated[Path | None, typer.Option(metavar="FILE", help="Write it as a pull request's comment.")] = None,
    junit: Annotated[Path | None, typer.Option(metavar="FILE", help="Write it as JUnit XML.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write it as JSON.")] = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write it as a page with plots.")] = None,
) -> None:
    """Whether decisions, numbers or speed changed: beside a baseline, or two versions in turn on one GPU.

    Exit status 0: nothing is worse; 1: something is; 2: inconclusive, or nothing was run; 64: bad input.
    """
    with told():
        from conformance.gate.run import Asked
        from fp8moe.commands import gate
        from fp8moe.commands.question import BadInput

        chosen = {
            "--write": write,
            "--baseline": baseline,
            "--against": against,
            "--against-backend": against_backend,
        }
        given = [name for name, value in chosen.items() if value is not None]
        if len(given) != 1:
            raise BadInput(f"give one of {', '.join(chosen)}, not {' and '.join(given) or 'none'}")
        asked = Asked(backend or (), part or (), cells, unwatched)
        files = {"--json": json_file, "--junit": junit, "--markdown": markdown, "--html": html}
        options: dict[str, object] = {
            "--part": part,
            "--device": device,
            "--seed": seed or None,
            "--runs": runs > 1 or None,
        }
        options |= {"--cells": cells, "--unwatched": unwatched or None, "--history": history, **files}
        gate.check_options(given[0], [name for name, value in options.items() if value is not None])
        gate.check_outputs(files)
        if write is not None:
            gate.print_baseline(write, gate.written(write, asked, device, seed, runs))
            return
        if baseline is not None:
            result, runs_so_far = gate.compared(baseline, asked, history)
            gate.shown(result, files, runs_so_far)
        else:
            result = gate.paired(against, against_backend, asked)
            gate.shown(result, files)
        raise typer.Exit(gate.print_result(result))
