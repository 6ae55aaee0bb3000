"""`fp8moe repro CASE|FOLDER|FILE`: runs one case again, or a failure that a certificate or report tells of."""

from __future__ import annotations

import os
import re
import sys
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from conformance.brief import brief
from conformance.cases import Case
from conformance.certificate.tabled import field
from conformance.checks import EQUIVALENCE
from conformance.not_here import NoDevice, NotHere
from conformance.plan import Subject, Target, is_triton, load_subject, resolve_target
from conformance.recorded import Failure, Recorded, known_check, recorded
from conformance.repro import Again, dumped, run_again, stages_of, told_mismatch
from conformance.results import Status
from fp8moe.commands import tables
from fp8moe.commands.files import beside, check_folders
from fp8moe.commands.question import BadInput
from fp8moe.counted import counted
from fp8moe.registry import BackendContractError

DEFAULT_BACKEND = "TRITON"
LISTED = 20
NOT_RUN, SUITE_ERROR = 2, 70
STATUSES = {Status.PASSED: 0, Status.FAILED: 1}
SUFFIX = ".safetensors"
MOST_BYTES = 32 << 30
"""Of a case that a file names; those of the suite have a tenth at most."""


@dataclass(frozen=True)
class Given:
    """The command's options, None where one is not given."""

    backend: str | None = None
    device: str | None = None
    check: str | None = None
    seed: int | None = None
    number: int | None = None
    dump: Path | None = None
    overwrite: bool = False


class CannotRun(Exception):
    """Nothing can be run here; the text says why and what to do."""


def reproduced(what: str, given: Given) -> int:
    """Runs it, prints the verdict and where it shows, and writes the tensors where asked to.

    Returns:
        The command's exit status.

    Raises:
        BadInput: what is no case, report or certificate; an option that is none.
    """
    out = tables.console()
    save = None if given.dump is None else _saver(given.dump, given.overwrite)
    try:
        case, subject, target, check = _asked(out, what, given)
    except CannotRun as error:
        print(f"fp8moe repro: {error}", file=sys.stderr)
        return NOT_RUN
    try:
        again = run_again(case, subject, target, check, keep=save is not None)
        print_again(out, again)
        kept = None if save is None else dumped(again)
    except Exception:
        traceback.print_exc()
        print("fp8moe repro: an error of the suite itself, no verdict on the backend", file=sys.stderr)
        return SUITE_ERROR
    if save is not None and kept is not None:
        save(*kept)
        out.print(Text(f"tensors: {given.dump}"), soft_wrap=True)
        if again.calls:
            out.print("  NAME is the case's own, and each call's that has no other", markup=False, soft_wrap=True)
        for name, what in again.calls.items():
            out.print(Text(f"  {name}.NAME is the {name} call's: {what}"), soft_wrap=True)
    return STATUSES.get(again.result.status, NOT_RUN)


def _asked(out: Console, what: str, given: Given) -> tuple[Case, Subject, Target, str]:
    if re.match(r"v\d+:", what) and not Path(what).exists():
        if given.number is not None:
            raise BadInput(f"--number {given.number}: it goes with a report or a certificate; leave it out")
        return _of_case(what, given)
    try:
        found = recorded(Path(what))
    except FileNotFoundError:
        raise BadInput(f"{what}: no such file or folder, and no case's id, which begins with v1:") from None
    except (OSError, ValueError) as error:
        told = str(getattr(error, "strerror", None) or error).removeprefix(f"{Path(what).name}: ")
        raise BadInput(f"{what}: {field(told).text}") from None
    return _of_failure(_chosen(out, found, given.number), found, given)


def _of_case(text: str, given: Given) -> tuple[Case, Subject, Target, str]:
    try:
        check = EQUIVALENCE if given.check is None else known_check(given.check)
    except ValueError as error:
        raise BadInput(f"--check={given.check}: {error}") from None
    try:
        case = _seeded(Case.parse(text), given.seed)
        target = resolve_target(given.device or "auto")
        return case, load_subject(given.backend or DEFAULT_BACKEND), target, check
    except NotHere as error:
        raise _not_here(error) from None
    except ValueError as error:
        raise BadInput(str(error)) from None


def _chosen(out: Console, found: Recorded, number: int | None) -> Failure:
    """The failure to run, after a list of all where there are several."""
    count = len(found.failures)
    if number is not None and number > count:
        raise BadInput(f"--number {number}: it has {counted(count, 'failure')}")
    if not count:
        raise CannotRun(f"no failure is in it, so there is nothing to run again ({field(found.told).text})")
    chosen = number or 1
    if count > 1:
        table = tables.table(
            f"{counted(count, 'failure')}, found on {field(found.device).text}", "", "#", "check", "case", "why"
        )
        for place, each in enumerate(found.failures[:LISTED], 1):
            name = each.result.check.removeprefix("computes.")
            status = "" if each.result.status is Status.FAILED else each.result.status.value
            cells = (name, each.result.case or "none", f"{status} {brief(each.result.reason)}".strip())
            mark = ">" if place == chosen else ""
            table.add_row(mark, str(place), *(Text(field(cell).text) for cell in cells))
        out.print(table)
        more = f"and {count - LISTED} more; " if count > LISTED else ""
        out.print(f"{more}number {chosen} is run; --number N runs another", markup=False)
    return found.failures[chosen - 1]


def _of_failure(failure: Failure, found: Recorded, given: Given) -> tuple[Case, Subject, Target, str]:
    result = failure.result
    name = field(result.check).text
    if not failure.has_case:
        again = f": {failure.otherwise}" if failure.otherwise else " with a run of its whole level"
        raise CannotRun(f"{name} failed on no single case; it is run again{again}")
    origin = given.backend or failure.origin
    if not origin:
        raise CannotRun("it names no backend that a command line can name: give --backend NAME|MODULE:CLASS")
    try:
        check = known_check(given.check or result.check)
    except ValueError as error:
        if given.check:
            raise BadInput(f"--check={given.check}: {error}") from None
        raise BadInput(f"check {name}: {error}; written by a newer version of fp8moe? upgrade it") from None
    try:
        case = _seeded(Case.parse(result.case), given.seed)
    except ValueError as error:
        raise BadInput(field(str(error)).text) from None
    activations = 8 * case.tokens * (case.hidden + case.top_k * (2 * case.inter + case.hidden))
    if case.weight_bytes + activations > MOST_BYTES:
        raise CannotRun(f"{case} is larger than {MOST_BYTES >> 30} GiB, and none of the suite's; give its id to run it")
    target = _target(given.device, found.target)  # before a backend is loaded: its kernels may be for the interpreter
    try:
        subject = load_subject(origin)
    except (ValueError, BackendContractError) as error:
        if given.backend is not None:
            raise (_not_here(error) if isinstance(error, NotHere) else BadInput(str(error))) from None
        raise CannotRun(f"its backend is not here ({error}): install it, or name another with --backend") from None
    if target is None:
        elsewhere = "interpreter" if is_triton(subject.experts_cls) else "cpu"
        where = f"{field(found.target).text} ({field(found.device).text})"
        raise CannotRun(
            f"it failed on {where}, and no such device is here; --device {elsewhere} runs it on this machine"
        )
    return case, subject, target, check


def _target(given: str | None, recorded_on: str) -> Target | None:
    """The device that is asked for, or that a file tells of; None where there is none of the latter here."""
    try:
        return resolve_target(given or recorded_on)
    except NoDevice as error:
        if given is not None:
            raise _not_here(error) from None
        return None


def _not_here(error: NotHere) -> BadInput:
    return BadInput(f"{'--device' if isinstance(error, NoDevice) else '--backend'} {error}")


def _seeded(case: Case, seed: int | None) -> Case:
    return case if seed is None else replace(case, seed=seed)


def print_again(out: Console, again: Again) -> None:
    """The verdict, its ratios, the element where it shows most, and the stages."""
    result = again.result

    def tell(text: str) -> None:
        out.print(Text(text), soft_wrap=True)

    which = "" if result.check == EQUIVALENCE else f", {result.check.removeprefix('computes.')}"
    tell(f"{again.subject.name} on {again.target.name}: {again.case}{which}")
    tell(f"status: {result.status.value}" + (f": {result.reason}" if result.reason else ""))
    if result.error_over_bound is not None:
        tell(f"largest error/bound: {result.error_over_bound:.4g} (limit 1)")
    for name, value in result.statistics.items():
        tell(f"  {name}: {value:.4g}")
    if result.judged_by:
        tell(f"judged by: {result.judged_by}")
    rows = list(told_mismatch(again))
    if rows:
        _print_rows(out, "where it fails most", rows)
    stages = stages_of(again)
    if isinstance(stages, str):
        if stages:
            tell(f"stages: {stages}")
    else:
        _print_rows(out, "stages, in order, beside the replay", [(each.stage, _told_stage(each)) for each in stages])
    if result.evidence is not None:
        tell(f"evidence: {result.evidence.value}")


def _told_stage(stage: Any) -> str:
    told = "not shown by the backend" if stage.difference is None else str(stage.difference)
    return told + (f"; {stage.where}" if stage.where else "")


def _print_rows(out: Console, title: str, rows: list[tuple[str, str]]) -> None:
    out.print(Text(f"{title}:", style="bold"), soft_wrap=True)
    table = Table(box=None, show_header=False, padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(Text(name), Text(value))
    out.print(table)


def _saver(path: Path, overwrite: bool) -> Any:
    """What writes tensors and texts to a file, asked about before any work.

    Raises:
        BadInput: it is there already, cannot be written, or safetensors is not installed. What it returns: it could
            not be written after all.
    """
    check_folders({"--dump": path})
    if path.suffix != SUFFIX:
        raise BadInput(f"--dump {path}: name a file that ends in {SUFFIX}")
    if path.exists() and not overwrite:
        raise BadInput(f"--dump {path}: is there already; name another, or give --overwrite")
    try:
        from safetensors import SafetensorError
        from safetensors.torch import save_file
    except ImportError as error:
        raise BadInput(f'--dump needs safetensors ({error}): install "fp8moe[report]"') from None

    def save(tensors: Mapping[str, Any], told: Mapping[str, str]) -> None:
        try:
            with beside(path) as made:
                save_file(dict(tensors), made, dict(told))
                with made.open("rb") as file:
                    os.fsync(file.fileno())
        except (OSError, SafetensorError) as error:
            raise BadInput(f"--dump {path}: {error}; nothing is written") from None

    return save
