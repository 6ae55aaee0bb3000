"""How many mutants the suite convicts: each is run until its first conviction, in processes of their own.

A conviction counts only where a check about numbers or selection comes to it. A mutant that merely raises, and is not
meant to, is an accident and counts as a survivor; so does whatever makes the suite itself raise.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from queue import SimpleQueue

from conformance.cases import Case
from conformance.contain import DeviceLost, Job, Limits, SubjectRef, SuiteError, Worker, WorkerEnded
from conformance.plan import default_workers
from conformance.planned import Plan, device_name, fingerprint_of, smallest
from conformance.results import CheckResult, Status
from conformance.shrink import non_default_fields
from conformance.zoo.plant import Fault

SHRINK_SECONDS = 120.0
MUTANT_SECONDS = 20.0
"""Of one case, before it counts as hanging."""
RAISED = re.compile(
    r"(apply|its constructor|its contract|the crafted layer|a captured call|the replay of a captured call|loading it"
    r"|it)\b.* raised |it (ended the process|did not end within|was killed)"
)
"""What begins the reason of a result that no check of numbers came to."""
KILLED, SURVIVED, ACCIDENT, ERROR, NOT_HERE = "killed", "survived", "accident", "error", "not here"


@dataclass(frozen=True)
class Verdict:
    """What became of one mutant.

    Args:
        mutant: its name.
        kind: "backend", "attacker" or "selector".
        level: of the run.
        outcome: "killed"; or "survived", "accident" (it raised, and is not meant to), "error" (of the suite), "not
            here" (only another device shows it).
        check, case: what killed it; "" where nothing did.
        reason: of the conviction, the accident or the error.
        seconds: wall time, to the conviction.
        smallest: the case that the convicting one shrinks to; "" where none was asked for.
        fields: of it, those that are no default.
        shrink_seconds: what that took.
    """

    mutant: str
    kind: str
    level: str
    outcome: str
    check: str = ""
    case: str = ""
    reason: str = ""
    seconds: float = 0.0
    smallest: str = ""
    fields: tuple[str, ...] = ()
    shrink_seconds: float = 0.0


class HonestConvicted(Exception):
    """The suite convicts a backend that is right."""


Progress = Callable[[Verdict], None]


def score(
    mutants: Sequence[tuple[Fault, str]],
    kind: str,
    level: str,
    *,
    device: str | None = None,
    seed: int = 0,
    workers: int | None = None,
    progress: Progress | None = None,
    controls: Sequence[str] = (),
    shrinks: bool = False,
) -> list[Verdict]:
    """The verdict on each mutant, in their order.

    Args:
        mutants: each fault with the "module:Class" that it is planted as.
        level: of `conformance.levels.LEVELS`.
        workers: mutants that run at the same time; None: as many as the device bears.
        controls: honest backends, which go through everything first: a conviction of theirs voids the score.
        shrinks: make each convicting case small, as a run that goes on would.

    Raises:
        HonestConvicted: of a control.
    """
    free: SimpleQueue[Worker] = SimpleQueue()

    def one(mutant: tuple[Fault, str]) -> Verdict:
        worker = free.get()
        try:
            found = _verdict(*mutant, kind, level, seed, worker, shrinks)
        finally:
            worker.restart()  # nothing of a mutant is left for the next one
            free.put(worker)
        if progress is not None:
            progress(found)
        return found

    limits = Limits(seconds=MUTANT_SECONDS)
    here = device_name(device)
    with ExitStack() as opened:
        count = workers or default_workers(here)
        for _ in range(count):
            free.put(opened.enter_context(Worker(here, limits)))
        with ThreadPoolExecutor(count) as threads:
            honest = [(Fault(name, "", "nothing", False, lambda base: {}), name) for name in controls]
            for control in threads.map(one, honest):
                if control.outcome != SURVIVED:
                    raise HonestConvicted(
                        f"{control.mutant}, which is honest, was convicted by {control.check} on {control.case}: "
                        f"{control.reason}; a score beside that says nothing"
                    )
            return list(threads.map(one, mutants))


def _verdict(fault: Fault, origin: str, kind: str, level: str, seed: int, worker: Worker, shrinks: bool) -> Verdict:
    started = time.monotonic()

    def told(outcome: str, check: str = "", case: str = "", reason: str = "") -> Verdict:
        return Verdict(fault.name, kind, level, outcome, check, case, reason, time.monotonic() - started)

    if fault.needs and fault.needs != worker.target_name:
        return told(NOT_HERE, reason=f"only a {fault.needs} device shows it")
    ref = SubjectRef.named(origin)
    try:
        plan = Plan.of(worker, ref, None, level, seed, selects=False)
        for item in plan.items:
            result = worker.run(Job(item.check, str(item.case), ref))
            if result.status is Status.FAILED:
                accident = RAISED.match(result.reason) is not None and fault.shows != "raises"
                found = told(ACCIDENT if accident else KILLED, result.check, result.case, result.reason)
                return _shrunk(found, result, ref, worker) if shrinks and found.outcome == KILLED else found
        probed = fingerprint_of(worker, ref)
        if probed.status is Status.FAILED:
            return told(KILLED, probed.check, "", probed.reason)
    except (SuiteError, DeviceLost, WorkerEnded) as error:
        return told(ERROR, reason=str(error).strip().splitlines()[-1])
    return told(SURVIVED, reason=f"{len(plan.items)} checks and the fingerprint passed")


def _shrunk(verdict: Verdict, failure: CheckResult, ref: SubjectRef, worker: Worker) -> Verdict:
    started = time.monotonic()
    case = Case.parse(smallest(worker, ref, failure, SHRINK_SECONDS).case)
    took = time.monotonic() - started
    return replace(verdict, smallest=str(case), fields=tuple(non_default_fields(case)), shrink_seconds=took)


def rotating(mutants: Sequence[tuple[Fault, str]], part: int, parts: int) -> Iterator[tuple[Fault, str]]:
    """Every `parts`-th of the mutants, beginning with number `part`."""
    yield from mutants[part % parts :: parts]
