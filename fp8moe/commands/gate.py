"""`fp8moe gate`: decisions, numbers and speed beside a baseline, or the speed of two versions in turn."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch
from rich.text import Text

from conformance.gate.baseline import BadBaseline, Baseline
from conformance.gate.result import EXIT, GateResult, Status
from conformance.gate.run import (
    GATE_ERRORS,
    OURS,
    PARTS,
    Asked,
    baseline_of,
    compared_with,
    default_backends,
    paired_backends,
    paired_checkouts,
)
from conformance.gate.shown.history import dated
from conformance.gate.shown.junit import junit
from conformance.gate.shown.markdown import markdown
from conformance.gate.shown.page import page
from conformance.gate.verdicts import Reason
from conformance.not_here import NoDevice
from conformance.pages import PageUnavailable
from conformance.planned import BadRequest, device_name
from fp8moe.commands import tables
from fp8moe.commands.as_typed import as_typed
from fp8moe.commands.files import check_folders, write_whole
from fp8moe.commands.question import BadInput, pick
from fp8moe.counted import counted

Found = TypeVar("Found")
OUTPUTS = ("--json", "--junit", "--markdown", "--html")
GOES_WITH = {
    "--write": ("--part", "--device", "--seed", "--runs", "--cells"),
    "--baseline": ("--part", "--history", "--unwatched", *OUTPUTS),
    "--against": ("--cells", "--unwatched", *OUTPUTS),
    "--against-backend": ("--cells", "--unwatched", *OUTPUTS),
}
"""The options that each mode looks at, beside --backend."""

HERE = Path(__file__).parents[2]
STYLES = {Status.PASSED: "green", Status.FAILED: "bold red", Status.INCONCLUSIVE: "yellow", Status.NOT_RUN: "yellow"}


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def written(path: Path, asked: Asked, device: str | None, seed: int, runs: int) -> Baseline:
    """Gathers a baseline and writes it.

    Raises:
        BadInput: a backend, device or part that is not there, a folder that is not.
    """
    check_folders({"--write": path})
    target = _device(device)
    command = shlex.join(["fp8moe", *sys.argv[1:]])
    wanted = replace(_checked(asked), backends=tuple(asked.backends) or tuple(default_backends(target)))
    found = _asked(lambda: baseline_of(wanted, target, seed, runs, command, tell))
    write_whole(path, found.to_json())
    return found


def compared(path: Path, asked: Asked, history: Path | None) -> tuple[GateResult, list[Baseline]]:
    """This code beside a baseline; of its backends, unless some are named. And earlier runs, this one the last.

    Args:
        history: a folder of baselines, ours or of pytest-benchmark; those of other devices are passed over.

    Raises:
        BadInput: the baseline cannot be compared with; a backend that fails.
    """
    wanted = _checked(asked)

    def both() -> tuple[GateResult, list[Baseline]]:
        baseline = Baseline.load(path)
        before = [baseline] if history is None else earlier(history, baseline)
        backends = tuple(asked.backends) or baseline.backends
        result, here = compared_with(baseline, path, replace(wanted, backends=backends), tell)
        return result, [*before, here]

    return _asked(both)


def earlier(folder: Path, like: Baseline) -> list[Baseline]:
    """The baselines in a folder, and in those below it, that are of the same device; the oldest first.

    Raises:
        BadBaseline: the folder is none.
    """
    if not folder.is_dir():
        raise BadBaseline(f"--history {folder}: expected a folder of baselines")
    found = [like]
    for path in sorted(folder.rglob("*.json")):
        with suppress(BadBaseline):  # whatever else lies there
            one = Baseline.load(path)
            if (one.target, one.device) == (like.target, like.device) and one != like:
                found.append(one)
    return sorted(found, key=lambda one: one.date)


def paired(against: Path | None, against_backend: str | None, asked: Asked) -> GateResult:
    """Speed of this checkout beside another, or of one backend beside another.

    Raises:
        BadInput: what is to be compared is not there, or no CUDA device is.
    """
    if against is not None:
        wanted = replace(asked, backends=tuple(asked.backends) or OURS)
        return _asked(lambda: paired_checkouts(against, HERE, wanted, tell))
    assert against_backend is not None
    if len(asked.backends) != 1:
        raise BadInput(f"--against-backend compares one backend with {against_backend}: give --backend once")
    return _asked(lambda: paired_backends(against_backend, asked, tell))


def shown(result: GateResult, files: Mapping[str, Path | None], history: Sequence[Baseline] = ()) -> None:
    """Writes the files that were asked for: "--json", "--junit", "--markdown", "--html"; the last with a history.

    Raises:
        BadInput: jinja2 is missing.
    """
    made: dict[str, Callable[[], str]] = {
        "--json": result.to_json,
        "--junit": lambda: junit(result),
        "--markdown": lambda: markdown(result),
        "--html": lambda: page(result, dated(history)),
    }
    for option, path in files.items():
        if path is not None:
            try:
                write_whole(path, made[option]())
            except PageUnavailable as error:
                raise BadInput(f"--html: {error}") from None


def check_options(mode: str, given: Sequence[str]) -> None:
    """Whether each option has a meaning beside the mode.

    Raises:
        BadInput: one has none, and would be passed over.
    """
    for option in given:
        if option not in GOES_WITH[mode]:
            fitting = " and ".join(name for name, options in GOES_WITH.items() if option in options)
            raise BadInput(f"{option} has no meaning with {mode}: it goes with {fitting}; leave it out")


def check_outputs(files: Mapping[str, Path | None]) -> None:
    """Before any work.

    Raises:
        BadInput: a folder that is not there.
    """
    check_folders({option: path for option, path in files.items() if path is not None})


def print_baseline(path: Path, baseline: Baseline) -> None:
    out = tables.console()
    cases = sum(len(of) for of in baseline.numerics.values())
    timed = sum(len(record.cells) for record in baseline.speed)
    runs = counted(len(baseline.speed), "run")
    cells = f"{counted(len(baseline.numerics), 'cell')} of {counted(cases, 'case')}"
    told = f"{path}: {cells}, {counted(timed, 'timed cell')} in {runs}"
    out.print(Text(f"{told}, {baseline.device}"), soft_wrap=True)


def print_result(result: GateResult) -> int:
    """The three verdicts, whatever is not the same, what was not run; the exit status."""
    out = tables.console()
    out.print(Text(f"{result.compared}; on {result.device}"), soft_wrap=True)
    for cell in result.numerics or ():
        out.print(Text(str(cell)), soft_wrap=True)
    for line in () if result.decisions is None else result.decisions.lines:
        out.print(Text(f"decided otherwise: {line}"), soft_wrap=True)
    for line in () if result.speed is None else result.speed.lines():
        out.print(Text(line), soft_wrap=True)
    for name, text in result.told.items():
        out.print(Text(f"{name}: {text}"), soft_wrap=True)
    if result.speed is not None and any(cell.reason is Reason.UNWATCHED for cell in result.speed.cells):
        out.print(Text("no verdict on times: remedy what the device state says, or give --unwatched"), soft_wrap=True)
    for part, reason in result.left.items():
        out.print(Text(f"not run: {part}: {reason}"), soft_wrap=True)
    parts = ", ".join(f"{name} {status.value}" for name, status in result.parts.items())
    out.print(Text(f"{result.status.value}: {parts}", STYLES[result.status]))
    return EXIT[result.status]


def _asked(work: Callable[[], Found]) -> Found:
    try:
        return work()
    except BadRequest as error:
        raise as_typed(error, "--backend") from None
    except NoDevice as error:
        raise BadInput(f"this needs a {error.value.upper()} device: {error.told}") from None
    except GATE_ERRORS as error:
        raise BadInput(str(error)) from None
    except torch.OutOfMemoryError as error:
        raise BadInput(f"out of memory: {str(error).splitlines()[0]}; --cells N times fewer layers") from None


def _checked(asked: Asked) -> Asked:
    return replace(asked, parts=tuple(pick("--part", part, PARTS) for part in asked.parts) or PARTS)


def _device(device: str | None) -> str:
    try:
        return device_name(device)
    except BadRequest as error:
        raise as_typed(error) from None
