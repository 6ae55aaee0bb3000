"""One run of the gate: what is gathered, what is compared with what, and what could not be."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path

from conformance.build import config_of
from conformance.cases import Case
from conformance.contain import Worker, WorkerEnded
from conformance.decisions.decided import DecisionsError, decide_grid
from conformance.decisions.kept import FILE
from conformance.decisions.review import review
from conformance.gate.baseline import BadBaseline, Baseline
from conformance.gate.gather import NotGathered, gather
from conformance.gate.numerics import CaseFigures, compare_numerics
from conformance.gate.paired import judge_paired
from conformance.gate.record import Record
from conformance.gate.result import Decisions, GateResult, Status
from conformance.gate.stored import judge_stored
from conformance.gate.verdicts import RunVerdict
from conformance.pinned import is_checkpoints, model_cases
from conformance.plan import Target, default_workers, load_subject, plan, resolve_target
from conformance.planned import BadRequest, reference_to
from conformance.timing.cells import TimedCell, prepared_pair
from conformance.timing.graphs import CaptureFailed
from conformance.timing.recorded import setting
from conformance.timing.samplers import DevicePairs, Make
from conformance.timing.state import STATE, Watch, opened_here, unwatched
from conformance.timing.two_processes import TwoProcessPairs, Version, WorkerFailed, record_apart
from conformance.trial import Ended, beyond_limits, refused
from conformance.versions import versions
from fp8moe.counted import counted
from fp8moe.detection import describe_device
from fp8moe.recipe import Contract
from fp8moe.registry import BackendContractError, BackendUnavailable
from fp8moe.schemes import SCHEMES

Tell = Callable[[str], None]
GATE_ERRORS = (
    BadBaseline,
    NotGathered,
    BadRequest,
    WorkerFailed,
    WorkerEnded,
    CaptureFailed,
    Ended,
    BackendContractError,
    BackendUnavailable,
    ValueError,
    OSError,
)
"""What keeps a run from a verdict, each with a text for whoever asked; anything else is an error of the suite."""
DEFAULT_BACKENDS: Mapping[str, Sequence[str]] = {"cpu": ("TorchExperts",)}
OURS = ("TRITON",)
LARGEST_BYTES = 1 << 28
"""Of the weights of a timed layer: all cells of a stored run are on the device at the same time, each as two layers or
more."""
EVERY = 3
"""Of the published layers, each at several numbers of tokens: 31 cells a backend, all sizes among them."""
NO_DEVICE = "no CUDA device: nothing is timed"
PARTS = ("decisions", "numerics", "speed")


def timed_cells(backends: Sequence[str], target: Target, most: int | None = None) -> list[TimedCell]:
    """What is timed of each backend: published layers in the schemes of their checkpoints that it runs here.

    Args:
        most: so many of each backend, spread over all; None: every one.
    """
    return [TimedCell(name, str(case)) for name in backends for case in _spread(_fitting(name, target), most)]


def _fitting(name: str, target: Target) -> list[Case]:
    """Of the timed layers those that a backend's predicate and declared limits take here."""
    cases = [case for case in model_cases(target) if is_checkpoints(case) and case.weight_bytes <= LARGEST_BYTES]
    cls = load_subject(name).experts_cls
    runs = {cell.scheme: cell.activations for cell in plan([load_subject(name)], target) if cell.status is None}
    return [
        case
        for case in cases[::EVERY]
        if case.activation in runs.get(case.scheme, ())
        and not (isinstance(cls.contract, Contract) and beyond_limits(cls.contract, case))
        and not refused(cls, config_of(case, target.device), SCHEMES[case.scheme], target.platform)
    ]


def _spread(cases: Sequence[Case], most: int | None) -> Sequence[Case]:
    return cases if most is None or len(cases) <= most else cases[:: -(-len(cases) // most)]


@dataclass(frozen=True)
class Asked:
    """What a run is to look at.

    Args:
        backends: names or module:Class.
        parts: of `PARTS`.
        cells: of each backend to time at the most; None: all.
        unwatched: whether times may have a verdict though nothing could tell the device's state.
    """

    backends: Sequence[str]
    parts: Sequence[str] = PARTS
    cells: int | None = None
    unwatched: bool = False


def default_backends(target: str) -> Sequence[str]:
    """Whose figures a baseline holds where none is named."""
    return DEFAULT_BACKENDS.get(target, OURS)


def baseline_of(asked: Asked, device: str, seed: int, runs: int, command: str, tell: Tell) -> Baseline:
    """Gathers a run that later ones are compared with.

    Args:
        device: a name of `conformance.plan.DEVICES`, less "auto".
        runs: how often everything is timed, each in a process of its own: with three or more, the margin follows from
            how far apart they are.

    Raises:
        conformance.gate.gather.NotGathered: a backend failed.
    """
    numerics = _numerics(asked, device, seed, tell) if "numerics" in asked.parts else {}
    timed = []
    if "speed" in asked.parts and device == "cuda":
        cells = timed_cells(asked.backends, resolve_target("cuda"), asked.cells)
        timed = [_timed(cells, tell) for _ in range(runs)]
    speed, states = [record for record, _ in timed], [state for _, state in timed]
    kept = _kept_digest() if "decisions" in asked.parts else ""
    if not (numerics or speed or kept):
        raise BadBaseline(
            f"nothing to write: of {', '.join(asked.parts)}, speed is timed on a CUDA device, not on {device}"
        )
    return Baseline(now(), device, describe_device().name, versions(), seed, command, kept, numerics, speed, states)


def compared_with(baseline: Baseline, path: Path, asked: Asked, tell: Tell) -> tuple[GateResult, Baseline]:
    """This code, on this device, beside a baseline; and this run as a baseline of its own.

    Raises:
        BadBaseline: it is of another device, version or seed, or lacks cases.
        conformance.gate.gather.NotGathered: a backend failed.
    """
    name = describe_device().name
    here = Baseline(now(), baseline.target, name, versions(), baseline.seed, "", "", {})
    baseline.check_comparable(here)
    result = GateResult(f"this code with {path.name} of {baseline.date}", name, here.date, here.versions)
    left: dict[str, str] = {part: "not asked for" for part in PARTS if part not in asked.parts}
    told: dict[str, str] = {}
    if "decisions" in asked.parts:
        result = replace(result, decisions=decisions(tell))
        if baseline.decisions not in ("", _kept_digest()):
            told["decisions"] = "the kept table is another than the baseline's: its log says what was accepted since"
    before = {cell: cases for cell, cases in baseline.numerics.items() if cell.partition(" ")[0] in asked.backends}
    stored = dict.fromkeys(cell for record in baseline.speed for cell in record.cells)
    timed = [cell for cell in map(TimedCell.parse, stored) if cell.backend in asked.backends]
    if "numerics" in asked.parts and not before:
        left["numerics"] = "the baseline has none of these backends: write it with them"
    elif "numerics" in asked.parts:
        here = replace(here, numerics=_numerics(asked, baseline.target, baseline.seed, tell))
        baseline.check_comparable(here)
        result = replace(result, numerics=compare_numerics(before, here.numerics))
    if "speed" in asked.parts and baseline.target != "cuda":
        left["speed"] = NO_DEVICE
    elif "speed" in asked.parts and not timed:
        left["speed"] = "the baseline has no times of these backends: write it with them"
    elif "speed" in asked.parts:
        for record in baseline.speed:
            _check_setting(record.setting, setting(), path)
        record, state = _timed(timed, tell)
        told |= state
        here = replace(here, speed=[record], states=[state])
        try:
            blind = [f"{unwatched(seen)}, in the baseline" for seen in baseline.states if unwatched(seen)]
            told |= {STATE: blind[0]} if blind and not unwatched(state) else {}
            result = replace(result, speed=_as_watched(judge_stored(record, baseline.speed), told, asked))
        except ValueError as error:
            raise BadBaseline(f"{path}: {error}") from None
    return replace(result, left=left, told=told), here


def _as_watched(verdict: RunVerdict, told: Mapping[str, str], asked: Asked) -> RunVerdict:
    return verdict if asked.unwatched or not unwatched(told) else verdict.unwatched()


def _check_setting(before: Mapping[str, str], here: Mapping[str, str], path: Path) -> None:
    """Before anything is timed."""
    differing = [
        f"{name}: {before.get(name)!r} in the baseline, {here.get(name)!r} here"
        for name in {**before, **here}
        if before.get(name) != here.get(name)
    ]
    if differing:
        raise BadBaseline(f"{path}: {'; '.join(differing)}: such times are not compared; write a baseline of this kind")


def _kept_digest() -> str:
    try:
        return hashlib.sha256(FILE.read_bytes()).hexdigest()
    except OSError:
        return ""


def paired_checkouts(checkout: Path, here: Path, asked: Asked, tell: Tell) -> GateResult:
    """Speed of this checkout (B) beside another (A), in two processes that take turns.

    Raises:
        conformance.timing.two_processes.WorkerFailed: one of them cannot be timed.
        ValueError: no CUDA device, or nothing to time.
    """
    target = resolve_target("cuda")
    cells = [cell.name for cell in timed_cells(asked.backends, target, asked.cells)]
    _check_some(cells, asked.backends)
    a, b = Version.pair(checkout, here)
    with (
        Watch(ours=2 + opened_here()) as watch,
        TwoProcessPairs({cell: (cell, cell) for cell in cells}, (a, b), watch) as sampler,
    ):
        verdict = judge_paired(_told(cells, tell), sampler)
    compared = f"{here.name} (B) with {checkout} (A), in turn"
    left = {"decisions": "of one checkout: run `fp8moe table --diff`", "numerics": "needs a baseline"}
    return _paired(compared, verdict, left, watch, asked)


def _paired(compared: str, verdict: RunVerdict, left: Mapping[str, str], watch: Watch, asked: Asked) -> GateResult:
    told = watch.told()
    return GateResult(
        compared,
        describe_device().name,
        now(),
        versions(),
        speed=_as_watched(verdict, told, asked),
        left=left,
        told=told,
    )


def paired_backends(first: str, asked: Asked, tell: Tell) -> GateResult:
    """Speed of one backend (B, the one that is asked for) beside another (A), in one process, on the same weights.

    Raises:
        ValueError: no CUDA device, or nothing that both run.
    """
    target, (second,) = resolve_target("cuda"), asked.backends
    ours = set(_fitting(first, target))
    cases = [str(case) for case in _spread([case for case in _fitting(second, target) if case in ours], asked.cells)]
    _check_some(cases, (first, second))
    cells: Mapping[str, Make] = {
        case: partial(prepared_pair, TimedCell(first, case), TimedCell(second, case)) for case in cases
    }
    with Watch() as watch:
        verdict = judge_paired(_told(cases, tell), DevicePairs(cells, watch))
    compared = f"{second} (B) with {first} (A), in turn, on the same weights"
    left = {"decisions": "two backends are compared", "numerics": "two backends are compared"}
    return _paired(compared, verdict, left, watch, asked)


def decisions(tell: Tell) -> Decisions:
    """Whether the selector decides every cell of the grid as the kept table says."""
    tell("decisions: every cell of the declared grid")
    try:
        found = review(decide_grid())
    except DecisionsError as error:
        return Decisions(Status.FAILED, (str(error),))
    return Decisions(Status.FAILED, found.difference.texts) if found else Decisions(Status.PASSED)


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _numerics(asked: Asked, device: str, seed: int, tell: Tell) -> dict[str, dict[str, CaseFigures]]:
    refs = [reference_to(name) for name in asked.backends]
    with ExitStack() as opened:
        workers = [opened.enter_context(Worker(device)) for _ in range(default_workers(device))]
        return gather(workers, refs, seed, lambda *told: tell(" ".join(told)))


def _timed(cells: Sequence[TimedCell], tell: Tell) -> tuple[Record, Mapping[str, str]]:
    _check_some(cells, [cell.backend for cell in cells])
    return record_apart(_told([cell.name for cell in cells], tell))


def _told(cells: Sequence[str], tell: Tell) -> Sequence[str]:
    tell(f"speed: {counted(len(cells), 'cell')}")
    return cells


def _check_some(cells: Sequence[object], backends: Sequence[str]) -> None:
    if not cells:
        raise ValueError(
            f"{' and '.join(backends) or 'no backend'}: no published layer that runs here, so nothing to time"
        )
