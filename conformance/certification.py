"""`check_backend`: the suite's checks on one backend without pytest, in processes that may die of it."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from queue import SimpleQueue
from typing import Any

from conformance.axes import Space
from conformance.bounds import pooled
from conformance.cases import Case
from conformance.checks import EQUIVALENCE
from conformance.contain import DeviceLost, Job, Limits, SubjectRef, Worker, WorkerEnded
from conformance.levels import LEVELS, Item, coverage_of, items_of, space_of
from conformance.plan import Subject, default_workers, plan, resolve_target, target_name
from conformance.predicate import CONTRACT, predicate_results
from conformance.probe import probe_backend
from conformance.probe.backend import CHECK as FINGERPRINT
from conformance.report import Report
from conformance.results import CheckResult, Status
from conformance.shrink import shrink
from conformance.versions import versions
from fp8moe.detection import describe_device
from fp8moe.experts import FusedMoEPermuteExpertsUnpermute
from fp8moe.platforms import Platform
from fp8moe.registry import Fp8MoeBackend

POOLED = "computes.pooled"
PLAN_SECONDS = 300.0
SHRINK_SECONDS = 90.0
"""For all failures of a run together."""
Backend = Fp8MoeBackend | str | type[FusedMoEPermuteExpertsUnpermute]
Progress = Callable[[int, int, CheckResult], None]
"""(done, planned, the result just come to)."""


@dataclass(frozen=True)
class Plan:
    """What a worker says of a backend before any case: all of it plain data.

    Args:
        name: of the backend.
        device: in words.
        settled: results that there are before any case is run: of its predicate, and of schemes that do not run.
        items: what the level goes through.
        takes: activations by scheme, of those that run.
        fnuz: whether weights may be e4m3fnuz.
    """

    name: str
    device: str
    settled: Sequence[CheckResult]
    items: Sequence[Item]
    takes: Mapping[str, Sequence[str]]
    fnuz: bool

    @classmethod
    def of(
        cls, worker: Worker, ref: SubjectRef, platform: Platform | None, level: str, seed: int, *, selects: bool = True
    ) -> Plan:
        """Asks a worker; `selects`: judge the backend's predicate too.

        Raises:
            ValueError: no such backend.
            conformance.contain.WorkerEnded: the backend's class did not let it come to its end.
        """
        asked = (ref, worker.target_name, platform, level, seed, selects)
        told: dict[str, Any] = worker.call(told_plan, *asked, seconds=PLAN_SECONDS)
        if "unknown" in told:
            raise ValueError(told["unknown"])
        settled = tuple(CheckResult.from_json(text) for text in told.pop("settled"))
        items = tuple(Item(check, Case.parse(case), part) for check, case, part in told.pop("items"))
        return cls(settled=settled, items=items, **told)


def told_plan(
    ref: SubjectRef, device: str, platform: Platform | None, level: str, seed: int, selects: bool
) -> dict[str, Any]:
    """In a worker: what `Plan` holds, as JSON can."""
    target = resolve_target(device)
    if platform is not None:
        target = replace(target, platform=platform)
    try:
        subject = ref.load()
    except ValueError as error:
        return {"unknown": str(error).removeprefix("--fp8moe-backend=")}
    except Exception as error:
        broken = CheckResult(
            "selects", CONTRACT, Status.FAILED, ref.name, reason=f"loading it raised {type(error).__name__}: {error}"
        )
        nothing: dict[str, Any] = {"items": [], "takes": {}, "fnuz": False}
        return {"name": ref.name, "device": describe_device().name, "settled": [broken.to_json()], **nothing}
    settled = predicate_results(subject) if selects else []
    usable = all(result.status is not Status.FAILED for result in settled)
    cells = plan([subject], target) if usable else []
    running = [cell for cell in cells if cell.status is None]
    settled += [
        CheckResult("computes", "computes.scheme", cell.status, subject.name, cell.scheme, reason=cell.reason)
        for cell in cells
        if cell.status is not None
    ]
    items = items_of(level, running, target, seed) if running else []
    return {
        "name": subject.name,
        "device": describe_device().name,
        "settled": [result.to_json() for result in settled],
        "items": [(item.check, str(item.case), item.part) for item in items],
        "takes": {cell.scheme: cell.activations for cell in running},
        "fnuz": bool(running) and True in space_of(running, target).values[-1],
    }


def check_backend(
    backend: Backend,
    *,
    level: str = "smoke",
    platform: Platform | None = None,
    device: str | None = None,
    seed: int = 0,
    budget_s: float | None = None,
    resume: Report | None = None,
    stop_at_first: bool = False,
    workers: int | None = None,
    limits: Limits | None = None,
    progress: Progress | None = None,
) -> Report:
    """Runs a level's checks on one backend. What it does to its process (crash, hang, memory) is its own result.

    Args:
        backend: a member of `Fp8MoeBackend`, a registered name, "module:Class", or a class, also one that is defined
            in a function (which needs cloudpickle).
        level: "smoke", "quick" or "certify"; `conformance.levels` says what each goes through.
        platform: that the backend's predicate is asked about; None: the device's own.
        device: "cpu", "interpreter", "cuda", "rocm", "xpu"; None: the GPU that torch sees, else Triton's interpreter.
        seed: of the cases that are not pinned.
        budget_s: start no further case after so many seconds; what is left is told, and `resume` goes on with it.
        resume: an earlier, unfinished report of the same backend, level, seed and device.
        stop_at_first: end at the first failure; what is left counts as not run.
        workers: processes that run cases at the same time; None: two on a CPU that has two cores, four on a GPU.
        limits: of one case; None: the plain ones.
        progress: called after each check.

    Raises:
        ValueError: an unknown level, device or backend, or a report to resume of another run.
        conformance.contain.SuiteError: an exception of the suite's own, which is no verdict on the backend.
    """
    if level not in LEVELS:
        raise ValueError(f"level={level!r}: expected one of {', '.join(LEVELS)}")
    if budget_s is not None and not budget_s >= 0:
        raise ValueError(f"budget_s={budget_s}: expected seconds, 0 or more")
    return _Run(
        backend, level, platform, device, seed, budget_s, resume, stop_at_first, workers, limits, progress
    ).run()


class _Run:
    def __init__(
        self,
        backend: Backend,
        level: str,
        platform: Platform | None,
        device: str | None,
        seed: int,
        budget_s: float | None,
        resume: Report | None,
        stop_at_first: bool,
        workers: int | None,
        limits: Limits | None,
        progress: Progress | None,
    ) -> None:
        self.ref = reference_to(backend)
        self.level, self.platform, self.device, self.seed = level, platform, device_name(device), seed
        self.budget, self.resume, self.stop_at_first = budget_s, resume, stop_at_first
        self.workers, self.limits, self.progress = workers, limits or Limits(), progress
        self.started = time.monotonic()
        self.results: dict[tuple[str, str], CheckResult] = {}
        self.failed: set[tuple[str, str]] = set()
        """(check, scheme) that failed: their further cases would tell the same."""
        self.stopped = ""
        self.lock = threading.Lock()

    def run(self) -> Report:
        with ExitStack() as opened:
            first = opened.enter_context(Worker(self.device, self.limits))
            try:
                plan = Plan.of(first, self.ref, self.platform, self.level, self.seed)
            except WorkerEnded as ended:
                plan = _no_plan(self.ref, str(ended))
            self._take_over(plan)
            count = self.workers or default_workers(self.device)
            every = [first, *(opened.enter_context(Worker(self.device, self.limits)) for _ in range(count - 1))]
            self._go_through(plan, every)
            settled = [*plan.settled, *self._fingerprint(plan, first), *self._pooled(plan)]
            small, found_as = self._shrunk(first)
        return self._report(plan, settled, small, found_as)

    def _fingerprint(self, plan: Plan, worker: Worker) -> list[CheckResult]:
        """Which arithmetic the backend has, beside the one that it declares."""
        if not plan.items:
            return []
        if self._must_stop():
            reason = f"{self.stopped}: the fingerprint was not taken"
            return [CheckResult("computes", FINGERPRINT, Status.NOT_RUN, plan.name, reason=reason)]
        return [fingerprint_of(worker, self.ref)]

    def _pooled(self, plan: Plan) -> list[CheckResult]:
        """The gain and the bias of cases together that the bound let pass: each alone may hide a small one. One case of
        each seed: those of one seed share what they are drawn from, so that their errors are not independent."""
        by_seed: dict[int, Mapping[str, float]] = {}
        for (check, case), result in self.results.items():
            if check == EQUIVALENCE and result.status is Status.PASSED and "gain.signed" in result.measured:
                by_seed.setdefault(Case.parse(case).seed, result.measured)
        if not by_seed:
            return []
        sums = list(by_seed.values())
        ratios = pooled(sums)
        broken = [f"{name} = {ratio:.3g} > 1" for name, ratio in ratios.items() if not ratio <= 1]
        reason = (
            f"{'; '.join(broken)}: the outputs of {len(sums)} cases are scaled or shifted to one side" if broken else ""
        )
        status = Status.FAILED if broken else Status.PASSED
        scope = f"{len(sums)} cases together"
        return [CheckResult("computes", POOLED, status, plan.name, reason=reason, statistics=ratios, scope=scope)]

    def _take_over(self, plan: Plan) -> None:
        """The results of the report to resume; all but those that were not run, or that the backend failed."""
        before = self.resume
        if before is None:
            return
        asked = {"backend": plan.name, "level": self.level, "seed": self.seed, "target": self.device}
        for name, value in asked.items():
            if getattr(before, name) != value:
                raise ValueError(f"resume: a report with {name}={getattr(before, name)!r}: expected {value!r}")
        if before.versions != versions():
            raise ValueError(f"resume: a report of {before.versions}: here are {versions()}; run it from the start")
        planned = {item.key for item in plan.items}
        kept = {Status.PASSED, Status.NOT_APPLICABLE, Status.FAILED}
        for check in before.checks:
            if (check.check, check.case) in planned and check.status in kept:
                self.results[check.check, check.case] = check
                if check.status is Status.FAILED:
                    self.failed.add((check.check, check.scheme))

    def _go_through(self, plan: Plan, every: Sequence[Worker]) -> None:
        """All items, each by whichever worker is free; in order, so that the most telling come first."""
        free: SimpleQueue[Worker] = SimpleQueue()
        for worker in every:
            free.put(worker)
        waiting = iter([item for item in plan.items if item.key not in self.results])

        def work() -> None:
            worker = free.get()
            while True:
                with self.lock:
                    item = next((item for item in waiting if not self._is_moot(item)), None)
                    if item is None or self._must_stop():
                        return
                try:
                    result = worker.run(Job(item.check, str(item.case), self.ref))
                except DeviceLost as error:
                    self.stopped = str(error)
                    return
                with self.lock:
                    self._take(item, result, len(plan.items))

        with ThreadPoolExecutor(len(every)) as threads:
            for future in [threads.submit(work) for _ in every]:
                future.result()

    def _is_moot(self, item: Item) -> bool:
        return (item.check, item.case.scheme) in self.failed

    def _must_stop(self) -> bool:
        if not self.stopped and self.budget is not None and time.monotonic() - self.started > self.budget:
            self.stopped = f"the budget of {self.budget:g} s was spent"
        return bool(self.stopped)

    def _take(self, item: Item, result: CheckResult, planned: int) -> None:
        self.results[item.key] = result
        if result.status is Status.FAILED:
            self.failed.add((item.check, item.case.scheme))
            if self.stop_at_first and not self.stopped:
                self.stopped = f"{result.check} failed on {result.case}"
        if self.progress is not None:
            self.progress(len(self.results), planned, result)

    def _shrunk(self, worker: Worker) -> tuple[list[CheckResult], dict[str, str]]:
        """The first failures, smaller; and which cases they were found as."""
        small, found_as = [], {}
        failures = [(key, result) for key, result in self.results.items() if result.status is Status.FAILED]
        until = time.monotonic() + SHRINK_SECONDS
        for key, failure in [] if self.stop_at_first else failures:
            last = [failure]

            def fails(case: Case, check: str = failure.check, last: list[CheckResult] = last) -> bool:
                result = worker.run(Job(check, str(case), self.ref))
                if result.status is Status.FAILED:
                    last.append(result)
                return result.status is Status.FAILED

            try:
                left = max(until - time.monotonic(), 0.0)
                shrink(Case.parse(failure.case), fails, keep=("scheme", "activation"), seconds=left)
            except DeviceLost:
                break
            if last[-1] is not failure:
                small.append(last[-1])
                found_as[last[-1].case] = failure.case
                del self.results[key]
        return small, found_as

    def _report(
        self, plan: Plan, settled: Sequence[CheckResult], small: Sequence[CheckResult], found_as: dict[str, str]
    ) -> Report:
        before = self.resume
        shrunk = {(check.check, found_as[check.case]) for check in small}
        space = Space(plan.takes, fnuz=plan.fnuz)
        judged = [Case.parse(case) for (_, case), r in self.results.items() if r.status is Status.PASSED]
        return Report(
            backend=plan.name,
            origin=self.ref.origin,
            level=self.level,
            seed=self.seed,
            target=self.device,
            device=plan.device,
            versions=versions(),
            checks=[
                *settled,
                *small,
                *self.results.values(),
                *self._not_run(plan, shrunk),
                NOT_TIMED,
            ],
            coverage=tuple(str(coverage) for coverage in coverage_of(self.level, space, judged)) if plan.takes else (),
            excluded=_excluded(space) if plan.takes else (),
            seconds=time.monotonic() - self.started + (0.0 if before is None else before.seconds),
            planned=len(plan.items),
            unshrunk=found_as,
        )

    def _not_run(self, plan: Plan, shrunk: Collection[tuple[str, str]]) -> Iterator[CheckResult]:
        """What was declared and not run: one result for each check, scheme and part of the level."""
        left: Counter[tuple[str, str, str]] = Counter()
        for item in plan.items:
            if item.key not in self.results and item.key not in shrunk:
                left[item.check, item.case.scheme, item.part] += 1
        for (check, scheme, part), count in left.items():
            reason = f"it failed before: {count} of the {part} not run"
            if (check, scheme) not in self.failed:
                reason = f"{self.stopped}: {count} of the {part} not run"
            yield CheckResult("computes", f"{check} ({part})", Status.NOT_RUN, plan.name, scheme, reason=reason)


def _excluded(space: Space) -> tuple[str, ...]:
    """Every pair of values that no case has, in words."""
    return tuple(f"{a}={v}, {b}={w}: {reason}" for a, v, b, w, reason in space.excluded_pairs())


NOT_TIMED = CheckResult(
    "performs", "performs.times", Status.NOT_RUN, reason="times are taken by `pytest conformance -m performs`, on a GPU"
)


def fingerprint_of(worker: Worker, ref: SubjectRef) -> CheckResult:
    """The result of `computes.fingerprint`; that the worker did not come to its end is the backend's failure."""
    try:
        return CheckResult.from_json(worker.call(told_fingerprint, ref, worker.target_name))
    except WorkerEnded as ended:
        return CheckResult("computes", FINGERPRINT, Status.FAILED, ref.name, reason=str(ended))


def told_fingerprint(ref: SubjectRef, device: str) -> str:
    """In a worker: the result as JSON."""
    return probe_backend(ref.load(), resolve_target(device)).to_json()


def _no_plan(ref: SubjectRef, why: str) -> Plan:
    """Of a backend that cannot even be asked."""
    return Plan(ref.name, "", [CheckResult("selects", CONTRACT, Status.FAILED, ref.name, reason=why)], [], {}, False)


def device_name(device: str | None) -> str:
    """The name of a device that workers can be started for; a worker looks which one is here, where none is named.

    Raises:
        ValueError: an unknown name.
    """
    if device not in (None, "auto"):
        return device
    with Worker("cpu") as looking:
        found: str = looking.call(target_name)
    return found


def reference_to(backend: Backend) -> SubjectRef:
    """What a worker finds a backend by.

    Raises:
        ValueError: neither a name nor a class.
    """
    if isinstance(backend, type):
        origin = f"{backend.__module__}:{backend.__qualname__}"
        return SubjectRef.of(Subject(backend.__name__, backend, origin))
    name = backend if isinstance(backend, str) else getattr(backend, "name", None)
    if not isinstance(name, str):
        raise ValueError(f"backend={backend!r}: expected a Fp8MoeBackend, a registered name, module:Class, or a class")
    return SubjectRef.named(name)
