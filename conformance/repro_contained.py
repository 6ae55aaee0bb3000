"""One case on one backend again in a worker, which the backend may take with it; what is shown of it comes in words."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from conformance.bits import StageResult
from conformance.cases import Case
from conformance.contain import Job, Limits, SubjectRef, Worker, WorkerEnded
from conformance.not_here import UnknownBackend
from conformance.plan import Subject, Target, resolve_target
from conformance.planned import unknown_backend
from conformance.raised import traceback_of
from conformance.repro import Again, dumped, run_again, stages_of, told_mismatch
from conformance.results import CheckResult, Status
from fp8moe.backends.torch_experts import TorchExperts

SECOND = "run a second time in its process: "


@dataclass(frozen=True)
class Shown:
    """What there is to see of a case beside its verdict.

    Args:
        mismatch: name and value of all that is known of the element where it fails most.
        stages: each with what it is beside the replay; or why there is none to compare.
        calls: of a relation, in words, by name.
        raised: the traceback of what the backend raised; "" where it raised nothing.
    """

    mismatch: Sequence[tuple[str, str]] = ()
    stages: Sequence[tuple[str, str]] | str = ""
    calls: Mapping[str, str] = field(default_factory=dict)
    raised: str = ""


def shown(again: Again) -> Shown:
    """Of a case that was run in this process."""
    stages = stages_of(again)
    rows = stages if isinstance(stages, str) else [(each.stage, _told_stage(each)) for each in stages]
    raised = None if again.trial is None else again.trial.raised
    return Shown(list(told_mismatch(again)), rows, again.calls, "" if raised is None else traceback_of(raised))


def _told_stage(stage: StageResult) -> str:
    told = "not shown by the backend" if stage.difference is None else str(stage.difference)
    return told + (f"; {stage.where}" if stage.where else "")


def run_contained(
    ref: SubjectRef,
    case: Case,
    target: Target,
    check: str,
    limits: Limits,
    dump: Path | None = None,
) -> tuple[CheckResult, Shown]:
    """The verdict as a run of a level has it, from a fresh process; then, if that has survived it, what is shown.

    Args:
        dump: the file that all tensors go into; of a backend that ended its process, those of the case alone.

    Raises:
        UnknownBackend: there is none of that name.
        OSError: the tensors cannot be written.
        conformance.contain.SuiteError, conformance.contain.DeviceLost: as `Worker.run`; no verdict.
    """
    with Worker(target.name, limits) as worker:
        result = worker.run(Job(check, str(case), ref))
        if result.status is Status.FAILED and not worker.ended:
            unknown = worker.call(unknown_backend, ref)
            if unknown:
                raise UnknownBackend(*unknown)
        told: dict[str, Any] | None = None
        if not worker.ended:
            asked = (ref, target.name, result.to_json(), None if dump is None else str(dump))
            try:
                told = worker.call(told_again, *asked, seconds=limits.first + 2 * limits.seconds)
            except WorkerEnded as ended:
                if result.status is Status.PASSED:
                    result = replace(result, status=Status.FAILED, reason=f"{SECOND}{ended.reason}")
    if told is None:
        if dump is not None:
            _write(dump, _unmade(ref, case, target, result))
        return result, Shown()
    if told["unwritten"]:
        raise OSError(told["unwritten"])
    return CheckResult.from_json(told["result"]), Shown(**told["shown"])


def told_again(ref: SubjectRef, device: str, verdict: str, dump: str | None) -> dict[str, Any]:
    """In a worker that has come to a verdict on a case: the same once more, with all that is shown of it."""
    result, target = CheckResult.from_json(verdict), resolve_target(device)
    case, raised = Case.parse(result.case), ""
    again = _unmade(ref, case, target, result)
    try:
        again = run_again(case, ref.load(), target, result.check, keep=dump is not None)
    except BaseException as error:  # the backend's, of which the verdict tells: it stands
        raised = traceback_of(error)
    again = replace(again, result=_graver(result, again.result))
    found = Shown(raised=raised) if raised else shown(again)
    unwritten = ""
    if dump is not None:
        try:
            _write(Path(dump), again)
        except OSError as error:
            unwritten = str(error)
    return {"result": again.result.to_json(), "shown": asdict(found), "unwritten": unwritten}


def _graver(first: CheckResult, second: CheckResult) -> CheckResult:
    if first.status is Status.PASSED and second.status is Status.FAILED:
        return replace(second, reason=f"{SECOND}{second.reason}")
    return first


def _unmade(ref: SubjectRef, case: Case, target: Target, result: CheckResult) -> Again:
    """Of a backend that is not here to be shown."""
    return Again(case, Subject(ref.name, TorchExperts, ref.origin), target, result, None)  # only its origin is told


def _write(path: Path, again: Again) -> None:
    write_tensors(path, dumped(again))


def write_tensors(path: Path, kept: tuple[Mapping[str, Any], Mapping[str, str]]) -> None:
    """
    Raises:
        OSError: they cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(dict(kept[0]), path, dict(kept[1]))
        with path.open("rb") as file:
            os.fsync(file.fileno())
    except SafetensorError as error:
        raise OSError(str(error)) from None
