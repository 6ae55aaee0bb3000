"""`fp8moe repro CASE|FOLDER|FILE`: runs one case again, or a failure that a certificate or report tells of."""

from __future__ import annotations

import re
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from conformance.brief import brief
from conformance.cases import Case
from conformance.certificate.tabled import field
from conformance.checks import EQUIVALENCE
from conformance.contain import DeviceLost, Limits, SubjectRef
from conformance.contain.jobs import FIRST_SECONDS
from conformance.not_here import NoDevice, NotHere, UnknownBackend
from conformance.plan import Target, is_triton, load_subject, resolve_target
from conformance.recorded import Failure, Recorded, known_check, recorded
from conformance.repro import dumped, run_again
from conformance.repro_contained import Shown, run_contained, shown, write_tensors
from conformance.results import CheckResult, Status, place
from fp8moe.commands import tables
from fp8moe.commands.app import EXIT_OWN_ERROR
from fp8moe.commands.files import beside, check_folders
from fp8moe.commands.question import BadInput
from fp8moe.counted import counted
from fp8moe.registry import BackendContractError, seed_backends

DEFAULT_BACKEND = "TRITON"
LISTED = 20
NOT_RUN = 2
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
    seconds: float | None = None
    here: bool = False


@dataclass(frozen=True)
class Asked:
    """What is to be run. `from_file`: the backend's name is a file's, not the command's."""

    case: Case
    origin: str
    target: Target
    check: str
    from_file: bool = False


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
    if given.here and given.seconds is not None:
        raise BadInput(f"--seconds {given.seconds:g}: a limit of the worker's; leave it out with --here")
    if given.dump is not None:
        _check_dump(given.dump, given.overwrite)
    try:
        asked = _asked(out, what, given)
        result, seen = _run(asked, given)
    except (CannotRun, DeviceLost) as error:
        print(f"fp8moe repro: {error}", file=sys.stderr)
        return NOT_RUN
    except (BadInput, BackendContractError):
        raise
    except Exception:
        traceback.print_exc()
        print("fp8moe repro: an error of the suite itself, no verdict on the backend", file=sys.stderr)
        return EXIT_OWN_ERROR
    print_again(out, asked, result, seen)
    if given.dump is not None:
        out.print(Text(f"tensors: {given.dump}"), soft_wrap=True)
        if seen.calls:
            out.print("  NAME is the case's own, and each call's that has no other", markup=False, soft_wrap=True)
        for name, what in seen.calls.items():
            out.print(Text(f"  {name}.NAME is the {name} call's: {what}"), soft_wrap=True)
    return STATUSES.get(result.status, NOT_RUN)


def _run(asked: Asked, given: Given) -> tuple[CheckResult, Shown]:
    """In a worker with the limits of `fp8moe check`, or in this process."""
    if given.dump is None:
        return _run_to(asked, given, None)
    try:
        with beside(given.dump) as made:
            return _run_to(asked, given, made)
    except OSError as error:
        raise BadInput(f"--dump {given.dump}: {error}; nothing is written") from None


def _run_to(asked: Asked, given: Given, dump: Path | None) -> tuple[CheckResult, Shown]:
    try:
        if not given.here:
            limits = Limits(first_seconds=FIRST_SECONDS) if given.seconds is None else Limits(seconds=given.seconds)
            ref = SubjectRef.named(asked.origin)
            return run_contained(ref, asked.case, asked.target, asked.check, limits, dump)
        subject = load_subject(asked.origin)
    except (UnknownBackend, BackendContractError) as error:
        if asked.from_file:
            remedy = "install it, or name another with --backend"
            raise CannotRun(f"its backend is not here ({error}): {remedy}") from None
        raise (_not_here(error) if isinstance(error, NotHere) else error) from None
    again = run_again(asked.case, subject, asked.target, asked.check, keep=dump is not None)
    seen = shown(again)
    if dump is not None:
        write_tensors(dump, dumped(again))
    return again.result, seen


def _asked(out: Console, what: str, given: Given) -> Asked:
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


def _of_case(text: str, given: Given) -> Asked:
    try:
        check = EQUIVALENCE if given.check is None else known_check(given.check)
    except ValueError as error:
        raise BadInput(f"--check={given.check}: {error}") from None
    try:
        case = _seeded(Case.parse(text), given.seed)
        target = resolve_target(given.device or "auto")
        return Asked(case, given.backend or DEFAULT_BACKEND, target, check)
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


def _of_failure(failure: Failure, found: Recorded, given: Given) -> Asked:
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
    target = _target(given.device, found.target)
    if target is None:
        where = f"{field(found.target).text} ({field(found.device).text})"
        raise CannotRun(f"it failed on {where}, and no such device is here; {_elsewhere(origin)}")
    return Asked(case, origin, target, check, from_file=given.backend is None)


def _elsewhere(origin: str) -> str:
    """What runs a backend here, without loading any but ours."""
    ours = {spec.name: spec.experts_cls for spec in seed_backends()}
    if origin in ours and is_triton(ours[origin]):
        return "--device interpreter runs it on this machine"
    return "--device cpu runs it on this machine, and --device interpreter what is derived from TRITON"


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


def print_again(out: Console, asked: Asked, result: CheckResult, seen: Shown) -> None:
    """The verdict, its ratios, the element where it shows most, the stages, and what was raised."""

    def tell(text: str) -> None:
        out.print(Text(text), soft_wrap=True)

    which = "" if result.check == EQUIVALENCE else f", {result.check.removeprefix('computes.')}"
    tell(f"{result.backend} on {place(asked.target.name, [result.evidence])}: {asked.case}{which}")
    tell(f"status: {result.status.value}" + (f": {result.reason}" if result.reason else ""))
    if result.error_over_bound is not None:
        tell(f"largest error/bound: {result.error_over_bound:.4g} (limit 1)")
    for name, value in result.statistics.items():
        tell(f"  {name}: {value:.4g}")
    if result.judged_by:
        tell(f"judged by: {result.judged_by}")
    if seen.mismatch:
        _print_rows(out, "where it fails most", seen.mismatch)
    if not isinstance(seen.stages, str):
        _print_rows(out, "stages, in order, beside the replay", seen.stages)
    elif seen.stages:
        tell(f"stages: {seen.stages}")
    if seen.raised:
        tell(seen.raised)
    if result.evidence is not None:
        tell(f"evidence: {result.evidence.value}")


def _print_rows(out: Console, title: str, rows: Sequence[tuple[str, str]]) -> None:
    out.print(Text(f"{title}:", style="bold"), soft_wrap=True)
    table = Table(box=None, show_header=False, padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(Text(name), Text(value))
    out.print(table)


def _check_dump(path: Path, overwrite: bool) -> None:
    """
    Raises:
        BadInput: it is there already, cannot be written, or safetensors is not installed.
    """
    check_folders({"--dump": path})
    if path.suffix != SUFFIX:
        raise BadInput(f"--dump {path}: name a file that ends in {SUFFIX}")
    if path.exists() and not overwrite:
        raise BadInput(f"--dump {path}: is there already; name another, or give --overwrite")
    try:
        import safetensors.torch  # noqa: F401 (only whether it is there)
    except ImportError as error:
        raise BadInput(f'--dump needs safetensors ({error}): install "fp8moe[report]"') from None
