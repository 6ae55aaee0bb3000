"""Faults of every kind, mixed with honest jobs: is every fault told for what it is, and no honest job convicted?"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from conformance.cases import Case
from conformance.checks import EQUIVALENCE
from conformance.contain.faults import FAULTS, Fault
from conformance.contain.jobs import DeviceLost, Job, Limits, SubjectRef, SuiteError
from conformance.contain.worker import Worker
from conformance.results import CheckResult, Status

HONEST = SubjectRef.named("TorchExperts")
SEEDS = 4
LIMITS = {"cpu": Limits(seconds=2.0, memory_bytes=128 << 20), "cuda": Limits(seconds=6.0, memory_bytes=3 << 30)}
ALIKE_ON_EVERY_DEVICE = (
    "kills its parent's parent",
    "stops itself",
    "sleeps for ever",
    "waits in C, holding Python's lock",
    "constructor hangs",
)
"""Kinds that take seconds and have nothing to do with a device: left out on a GPU, whose time is dear."""
PREPARES_IN = 60.0
FIRST_SECONDS = 60.0


@dataclass
class Row:
    """One kind: how often it was injected, how often told for what it is, and how long that took."""

    kind: str
    injected: int = 0
    expected: int = 0
    seconds: float = 0.0


@dataclass
class Stress:
    """What a run came to."""

    rows: dict[str, Row] = field(default_factory=dict)
    honest: Row = field(default_factory=lambda: Row("honest jobs between them"))
    surprises: list[str] = field(default_factory=list)
    acquitted: int = 0
    workers: int = 0
    seconds: float = 0.0

    @property
    def clean(self) -> bool:
        return not self.surprises

    def lines(self) -> list[str]:
        rows = [*self.rows.values(), self.honest]
        width = max(len(row.kind) for row in rows)
        found = [f"{'kind':{width}}  injected  as expected  seconds each"]
        found += [
            f"{row.kind:{width}}  {row.injected:8}  {row.expected:11}  {row.seconds / max(row.injected, 1):12.3f}"
            for row in rows
        ]
        faults = sum(row.injected for row in self.rows.values())
        told = sum(row.expected for row in self.rows.values())
        found.append(f"{told} of {faults} faults told for what they are, {self.acquitted} acquitted")
        found.append(f"{self.honest.expected} of {self.honest.injected} honest jobs passed")
        found.append(f"{self.workers} workers, {self.seconds:.0f} s")
        return found + self.surprises


def case_of(seed: int) -> str:
    """A small case, as its id is printed."""
    return str(Case.parse(f"v1:E=4,H=128,I=128,M=3,seed={seed}"))


def drawn(count: int, seed: int, faults: tuple[Fault, ...]) -> list[Fault]:
    """So many faults in a random order: every kind once, as far as they go, then by weight."""
    rng = random.Random(seed)
    found = [*faults[:count], *rng.choices(faults, [fault.weight for fault in faults], k=max(count - len(faults), 0))]
    rng.shuffle(found)
    return found


def faults_on(device: str) -> tuple[Fault, ...]:
    """The kinds that are injected on a device; a GPU's own first."""
    if device != "cuda":
        return FAULTS
    from conformance.contain.faults_device import DEVICE_FAULTS

    return (*DEVICE_FAULTS, *(fault for fault in FAULTS if fault.kind not in ALIKE_ON_EVERY_DEVICE))


def stress(count: int, seed: int, device: str = "cpu", progress: Callable[[str], None] = lambda line: None) -> Stress:
    """Injects faults, each followed by an honest job in the same worker or what replaces it."""
    run = Stress()
    began = time.monotonic()
    limits = LIMITS.get(device, LIMITS["cpu"])
    if device == "cuda":
        _prepare(device)
    rng = random.Random(seed + 1)
    with Worker(device, limits) as worker:
        worker.call(time.time, seconds=FIRST_SECONDS)
        for index, fault in enumerate(drawn(count, seed, faults_on(device))):
            row = run.rows.setdefault(fault.kind, Row(fault.kind))
            case = case_of(rng.randrange(SEEDS))
            result = _timed(worker, Job(EQUIVALENCE, case, fault.ref), row)
            if isinstance(result, CheckResult) and _is_told(fault, result, case):
                row.expected += 1
            else:
                run.acquitted += isinstance(result, CheckResult) and result.status is Status.PASSED
                run.surprises.append(f"fault {index}, {fault.kind}: {_text(result)}; expected {fault.told!r}")
            case = case_of(rng.randrange(SEEDS))
            result = _timed(worker, Job(EQUIVALENCE, case, HONEST), run.honest)
            if isinstance(result, CheckResult) and result.status is Status.PASSED and result.case == case:
                run.honest.expected += 1
            else:
                run.surprises.append(f"honest job after fault {index}, {fault.kind}: {_text(result)}")
            progress(f"{index + 1} {fault.kind}")
            if isinstance(result, DeviceLost):
                break
        run.workers = worker.starts
    run.seconds = time.monotonic() - began
    return run


def _prepare(device: str) -> None:
    from conformance.contain.faults_device import prepare

    with Worker(device, Limits(seconds=PREPARES_IN)) as worker:
        worker.call(prepare)
        worker.run(Job(EQUIVALENCE, case_of(0), HONEST))


def _timed(worker: Worker, job: Job, row: Row) -> CheckResult | SuiteError | DeviceLost:
    began = time.monotonic()
    row.injected += 1
    try:
        return worker.run(job)
    except (SuiteError, DeviceLost) as error:
        return error
    finally:
        row.seconds += time.monotonic() - began


def _is_told(fault: Fault, result: CheckResult, case: str) -> bool:
    return (
        result.status is fault.status
        and fault.told in result.reason
        and result.case == case
        and result.backend == fault.ref.name
    )


def _text(result: CheckResult | SuiteError | DeviceLost) -> str:
    if isinstance(result, CheckResult):
        return f"{result.status.value} {result.backend} {result.case}: {result.reason}"
    return f"{type(result).__name__}: {result}"
