"""The `fp8moe` command: its options. What they do is in `commands/`, imported when a command runs."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from fp8moe.commands.question import Question

EXIT_NOTHING_SELECTED = 2
EXIT_BAD_INPUT = 64
"""As sysexits.h has it, so that it cannot be taken for an answer."""

app = typer.Typer(
    name="fp8moe",
    help="Which FP8 MoE backend is selected on a device, why, and whether it computes the right MoE.",
    epilog=f"Exit status {EXIT_BAD_INPUT}: an option or name is not understood.",
    add_completion=False,
    pretty_exceptions_enable=False,
)

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON with stable keys instead of a table.")]


@contextmanager
def _told() -> Iterator[None]:
    """Bad input ends the command with one line on standard error."""
    try:
        from fp8moe.commands.question import BadInput
        from fp8moe.registry import BackendContractError
    except ValueError as error:  # a variable that is read at import holds nonsense
        raise _bad_input(error) from None
    try:
        yield
    except (BadInput, BackendContractError) as error:
        raise _bad_input(error) from None


def _bad_input(error: Exception) -> typer.Exit:
    typer.echo(f"fp8moe: {error}", err=True)
    return typer.Exit(EXIT_BAD_INPUT)


def _print_json(value: Any) -> None:
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


@app.command("platform")
def platform_command(as_json: JsonOption = False) -> None:
    """What is here: device, driver, libraries, and what each backend lacks."""
    with _told():
        from fp8moe.commands.platform import backend_states, detection_json, print_detection
        from fp8moe.detection import detect

        detection = detect()
        backends = backend_states(detection.platform, os.environ)
        if as_json:
            _print_json(detection_json(detection, backends))
        else:
            print_detection(detection, backends)


@app.command("explain")
def explain_command(
    platform: Annotated[
        str | None, typer.Option(help="A device of the catalogue, such as h100; default: the one that is here.")
    ] = None,
    all_platforms: Annotated[bool, typer.Option("--all-platforms", help="One row for each catalogue device.")] = False,
    model: Annotated[
        str | None, typer.Option(help="A published model, such as deepseek-v3 or deepseek-v3:ep64.")
    ] = None,
    experts: Annotated[int | None, typer.Option(min=1, help="Experts of the layer, over all ranks.")] = None,
    top_k: Annotated[int | None, typer.Option(min=1, help="Experts of a token.")] = None,
    hidden: Annotated[int | None, typer.Option(min=1, help="Hidden size.")] = None,
    intermediate: Annotated[int | None, typer.Option(min=1, help="Intermediate size of an expert, unsplit.")] = None,
    scheme: Annotated[str | None, typer.Option(help="Quantisation scheme, such as block or channel_tok.")] = None,
    activation: Annotated[str | None, typer.Option(help="Activation, such as silu or relu2_no_mul.")] = None,
    routing: Annotated[str | None, typer.Option(help="Routing method, such as DeepSeekV3 or Renormalize.")] = None,
    layout: Annotated[
        str | None,
        typer.Option("--format", help="standard, or batched: alone it means --dp 2 --ep --all2all deepep_low_latency."),
    ] = None,
    all2all: Annotated[str | None, typer.Option(help="Exchange of tokens between data-parallel ranks.")] = None,
    tp: Annotated[int | None, typer.Option(min=1, help="Tensor-parallel ranks.")] = None,
    dp: Annotated[int | None, typer.Option(min=1, help="Data-parallel ranks.")] = None,
    ep: Annotated[bool | None, typer.Option("--ep/--no-ep", help="Expert parallelism over all these ranks.")] = None,
    eplb: Annotated[bool, typer.Option("--eplb", help="Expert load balancing is on.")] = False,
    logits_dtype: Annotated[str | None, typer.Option(help="bfloat16, float16 or float32.")] = None,
    allow_vllm_cutlass: Annotated[
        bool, typer.Option("--allow-vllm-cutlass", help="The caller lets vLLM's CUTLASS backends be chosen.")
    ] = False,
    lora: Annotated[bool, typer.Option("--lora", help="The engine has LoRA on.")] = False,
    env: Annotated[
        list[str] | None, typer.Option("--env", metavar="NAME=VALUE", help="Set a VLLM_* variable; may be given again.")
    ] = None,
    clean_env: Annotated[bool, typer.Option("--clean-env", help="Leave out the variables of this process.")] = False,
    libraries: Annotated[
        str | None, typer.Option(metavar="A,B", help="Kernel libraries that are there, or `none`.")
    ] = None,
    measured: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A table of times: the fastest certified backend is chosen.")
    ] = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="Tokens of the call, with --measured.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Why this backend: every candidate's verdict, in the order in which they are considered.

    Exit status 0: something was selected; 2: the selector raises, with the error on standard error.
    """
    with _told():
        from fp8moe.commands.question import (
            HERE,
            BadInput,
            Question,
            environment,
            layer_config,
            layer_named,
            parallel_config,
        )

        if all_platforms and platform is not None:
            raise BadInput(f"--all-platforms has {platform} among its rows; leave one of the two options out")
        if (measured is None) != (tokens is None):
            given, lacking = ("--tokens", "--measured FILE") if measured is None else ("--measured", "--tokens N")
            raise BadInput(f"{given} goes with {lacking}; add it")
        if all_platforms and measured is not None:
            raise BadInput("--measured is the table of one device; leave --all-platforms out")
        layer = layer_named(
            model,
            experts=experts,
            top_k=top_k,
            hidden=hidden,
            intermediate=intermediate,
            activation=activation,
            routing=routing,
            logits_dtype=logits_dtype,
            scheme=scheme,
        )
        parallel = parallel_config(layer, layout, all2all, tp=tp, dp=dp, ep=ep, eplb=eplb)
        config = layer_config(layer, parallel, lora=lora)
        variables = environment(env or (), None if clean_env else os.environ)
        question = Question(layer, config, allow_vllm_cutlass, variables)
        if all_platforms:
            _explain_everywhere(question, libraries, as_json)
        else:
            _explain_one(question, platform or HERE, libraries, as_json, measured, tokens)


def _explain_one(
    question: Question, name: str, libraries: str | None, as_json: bool, measured: Path | None, tokens: int | None
) -> None:
    from fp8moe.commands.explain import measured_answer, print_selection, selection_json
    from fp8moe.commands.question import HERE, one_platform

    key, device = one_platform(name, libraries)
    if measured is None or tokens is None:
        selection = question.on(device)
    else:
        selection = measured_answer(question, device, measured, tokens, here=key == HERE, asked=libraries is not None)
    if as_json:
        _print_json(selection_json(selection, question, key, device))
    else:
        print_selection(selection, question, key, device)
    if selection.error is not None:
        typer.echo(f"{type(selection.error).__name__}: {selection.error}", err=True)
        raise typer.Exit(EXIT_NOTHING_SELECTED)


def _explain_everywhere(question: Question, libraries: str | None, as_json: bool) -> None:
    from fp8moe.commands.explain import print_all_platforms, selection_json
    from fp8moe.commands.question import one_platform
    from fp8moe.platforms import PLATFORMS

    devices = [one_platform(name, libraries) for name in PLATFORMS]
    answers = {key: (device, question.on(device)) for key, device in devices}
    if as_json:
        _print_json([selection_json(answer, question, key, device) for key, (device, answer) in answers.items()])
    else:
        print_all_platforms(answers, question)


@app.command("repro")
def repro_command(
    case: Annotated[str, typer.Argument(help="A case's id, as a report prints it.")],
    backend: Annotated[str, typer.Option(metavar="NAME|MODULE:CLASS", help="The backend to run it on.")] = "TRITON",
    device: Annotated[
        str | None, typer.Option(help="cpu, interpreter, cuda, rocm or xpu; default: what is here.")
    ] = None,
    check: Annotated[
        str | None, typer.Option(metavar="ID", help="The check, as a report names it; default: equivalence.")
    ] = None,
) -> None:
    """Run one case of a report again, and show what differs.

    Exit status 0: it passed; 1: it failed; 2: it could not be run.
    """
    with _told():
        from conformance.repro import run_case

        raise typer.Exit(run_case(case, backend, device, check))


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
    with _told():
        from fp8moe.commands.emulate import DEFAULT_CASE, emulation_json, emulation_of, failures, print_emulation

        emulation, results = emulation_of(case or DEFAULT_CASE, device or ())
        if as_json:
            _print_json(emulation_json(emulation, results))
        else:
            print_emulation(emulation, results)
        raise typer.Exit(1 if failures(emulation, results) else 0)


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
    report: Annotated[Path | None, typer.Option(metavar="FILE", help="Write every result as JSON.")] = None,
    resume: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Go on with the report of a run that its budget ended.")
    ] = None,
    seconds: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS",
            min=1,
            help="Of one case, before it counts as hanging; default: 60. More where a kernel library compiles first.",
        ),
    ] = None,
) -> None:
    """Judge one backend: its predicate and, on this device, its numbers; in processes that may die of it.

    Exit status 0: it passed; 1: it failed; 2: not everything was run; 70: an error of the suite itself.
    """
    with _told():
        from conformance.contain import SuiteError
        from fp8moe.commands.check import checked, print_report, status_of, told_error

        try:
            found = checked(backend, level, device, seed, budget, report, resume, seconds)
        except SuiteError as error:
            raise typer.Exit(told_error(error)) from None
        print_report(found)
        raise typer.Exit(status_of(found))


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
    with _told():
        from fp8moe.commands.zoo import print_score, print_zoo, scored

        if not score:
            print_zoo()
            return
        raise typer.Exit(print_score(scored(level, kind or (), part, device, seed, report, shrink)))


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
    with _told():
        from fp8moe.commands.sanitize import print_sanitized, sanitized

        raise typer.Exit(print_sanitized(sanitized(backend, tool or (), case or (), cases, report)))


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
    with _told():
        from fp8moe.commands import probe
        from fp8moe.commands.question import BadInput

        if units:
            if backend is not None or device is not None:
                raise BadInput("--units asks about emulated units, so it goes with neither a backend nor a device")
            rows = probe.units()
            if as_json:
                _print_json(probe.units_json(rows))
            else:
                probe.print_units(rows)
            raise typer.Exit(0 if all(row.right for row in rows) else 1)
        found = probe.probe_here(device) if backend is None else [probe.probe_named(backend, device)]
        if as_json:
            told = [probe.found_json(one) for one in found]
            _print_json(told if backend is None else told[0])
        else:
            probe.print_found(found)
        raise typer.Exit(probe.exit_status(found))


@app.command("table")
def table_command(
    file: Annotated[
        Path | None, typer.Argument(metavar="[FILE]", help="A decision table; default: the one kept in conformance.")
    ] = None,
    diff: Annotated[bool, typer.Option("--diff", help="What the code decides otherwise; a minute's work.")] = False,
    lines: Annotated[int, typer.Option(metavar="N", min=1, help="With --diff: at most so many lines.")] = 20,
    write: Annotated[bool, typer.Option("--write", help="Accept what the code decides: rewrite the file.")] = False,
    reason: Annotated[
        str | None, typer.Option(metavar="TEXT", help="With --write: why; it goes into the file's log.")
    ] = None,
    rules: Annotated[bool, typer.Option("--rules", help="Every rule of the table, in words.")] = False,
    as_json: JsonOption = False,
) -> None:
    """What the selector decides over the whole declared grid: the kept table, by device; or what differs from it.

    Exit status 0: as asked, and with --diff the code decides as the table says; 1: it does not.
    """
    with _told():
        from fp8moe.commands import table
        from fp8moe.commands.question import BadInput

        if diff + write + rules > 1:
            raise BadInput("--diff, --write and --rules ask for different things; give one of them")
        if write != (reason is not None):
            missing = "--write needs --reason TEXT, why the decisions change" if write else "--reason goes with --write"
            raise BadInput(missing)
        if reason is not None:
            entry = table.accepted(file, reason)
            if as_json:
                _print_json(table.entry_json(entry))
            else:
                table.print_entry(entry, file)
        elif diff:
            found = table.compared(file, lines)
            if as_json:
                _print_json(table.review_json(found))
            else:
                typer.echo(str(found))
            raise typer.Exit(1 if found else 0)
        else:
            kept = table.kept_table(file)
            if as_json:
                _print_json(table.summary_json(kept, file))
            elif rules:
                table.print_rules(kept)
            else:
                table.print_summary(kept, file)


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
