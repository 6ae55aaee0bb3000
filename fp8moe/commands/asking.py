"""Commands that ask what is selected, why, and how fast it is: platform, explain, table, measure."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fp8moe.commands.app import JsonOption, app, print_json, told

if TYPE_CHECKING:
    from fp8moe.commands.question import Question

EXIT_NOTHING_SELECTED = 2


@app.command("platform")
def platform_command(as_json: JsonOption = False) -> None:
    """What is here: device, driver, libraries, and what each backend lacks."""
    with told():
        from fp8moe.commands.platform import backend_states, detection_json, print_detection
        from fp8moe.detection import detect

        detection = detect()
        backends = backend_states(detection.platform, os.environ)
        if as_json:
            print_json(detection_json(detection, backends))
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
    with told():
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
        print_json(selection_json(selection, question, key, device))
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
        print_json([selection_json(answer, question, key, device) for key, (device, answer) in answers.items()])
    else:
        print_all_platforms(answers, question)


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
    with told():
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
                print_json(table.entry_json(entry))
            else:
                table.print_entry(entry, file)
        elif diff:
            found = table.compared(file, lines)
            if as_json:
                print_json(table.review_json(found))
            else:
                typer.echo(str(found))
            raise typer.Exit(1 if found else 0)
        else:
            kept = table.kept_table(file)
            if as_json:
                print_json(table.summary_json(kept, file))
            elif rules:
                table.print_rules(kept)
            else:
                table.print_summary(kept, file)


@app.command("measure")
def measure_command(
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the times as a measured table.")] = None,
    certificate: Annotated[
        list[Path] | None,
        typer.Option(
            "--certificate",
            metavar="REPORT|FOLDER",
            help="Of this device, a certificate or a passed `fp8moe check --level certify --report`: its backend "
            "may be picked.",
        ),
    ] = None,
    backend: Annotated[
        list[str] | None,
        typer.Option("--backend", metavar="NAME|MODULE:CLASS", help="One that is in no order, timed as well."),
    ] = None,
    budget: Annotated[
        float | None, typer.Option(metavar="SECONDS", min=0, help="Start no further case after this time.")
    ] = None,
    tokens: Annotated[
        str | None,
        typer.Option(metavar="N,N,...", help="Tokens of a layer, as the table counts them; default: the suite's."),
    ] = None,
) -> None:
    """Time every backend that could be selected here, side by side on published layers; what the seed's order costs.

    Exit status 0: everything was timed; 1: a backend took less time than this device can, and no table is written; 2:
    the budget ended it.
    """
    with told():
        from fp8moe.commands.measure import (
            certificates_of,
            check_output,
            measured,
            policy_lines,
            print_measured,
            table_of,
            tokens_of,
        )

        check_output(out, certificate or ())
        certificates = certificates_of(certificate or ())
        found, left = measured(backend or (), budget, tokens_of(tokens))
        if not print_measured(found, left):
            raise typer.Exit(1)
        if out is not None:
            made = table_of(found, certificates)
            made.save(out)
            for line in policy_lines(made):
                typer.echo(line)
        raise typer.Exit(2 if left else 0)
