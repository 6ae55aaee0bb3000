"""`check_backend`: the suite's checks on one backend without pytest, in processes that may die of it."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from queue import SimpleQueue

from conformance.at_work import AtWork
from conformance.axes import Space, excluded
from conformance.backend_code import Code, code_of, difference
from conformance.checks import EQUIVALENCE
from conformance.contain import Cancelled, DeviceLost, Job, Limits, Worker, WorkerEnded
from conformance.contain.jobs import FIRST_SECONDS
from conformance.hangs import Hangs, hung_before
from conformance.left import left_reason
from conformance.levels import LEVELS, Item, coverage_of
from conformance.plan import default_workers
from conformance.planned import (
    Backend,
    BadRequest,
    OtherCode,
    Plan,
    device_name,
    fingerprint_of,
    no_plan,
    reference_here,
)
from conformance.pooling import POOLED, pooled_result
from conformance.probe.backend import CHECK as FINGERPRINT
from conformance.remaining import Remaining
from conformance.report import Report
from conformance.results import CheckResult, Status
from conformance.shards import FAILED_BEFORE, OF_A_CASE, OF_A_CASE_ON_GPU, Shard, cost
from conformance.smaller import smaller
from conformance.so_far import UNENDED, Keep, SoFar
from conformance.versions import versions
from conformance.waivers import WaiverError, Waivers, read_waivers
from conformance.waivers.in_force import InForce
from fp8moe.platforms import Platform

SHRINK_SECONDS = 90.0
"""For all failures of a run together."""
Progress = Callable[[int, int, CheckResult, float | None], None]
"""(done, planned, the result just come to, about how many seconds are left of the checks)."""


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
    waivers: Waivers | str | Path | None = None,
    shard: Shard | None = None,
    interrupted: threading.Event | None = None,
    keep: Keep | None = None,
    at_work: AtWork | None = None,
) -> Report:
    """Runs a level's checks on one backend. What it does to its process (crash, hang, memory) is its own result; one
    that hangs wherever it is called is given up on, as `conformance.hangs` says. Ctrl-C ends it with what was run.

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
        waivers: known failures, or the file that holds them; `conformance.waivers` says what it may say. One that is
            rotten fails the run.
        shard: run this piece of the level alone; `conformance.shards.gathered` makes a report of all pieces, which
            `resume` takes.
        interrupted: once it is set, by a signal's handler say, the run ends as by Ctrl-C; unlike that, it does not cut
            short what makes the report.
        keep: called with the report so far now and then, as `conformance.so_far` says; `resume` takes it.
        at_work: is kept up to date with what is being done.

    Raises:
        BadRequest: (a ValueError) an unknown level, device or backend, a report to resume of another run, or a file of
            waivers that cannot be read or breaks the rules.
        conformance.contain.SuiteError: an exception of the suite's own, which is no verdict on the backend.
        KeyboardInterrupt: it was interrupted before there was anything to report.
    """
    if level not in LEVELS:
        raise BadRequest(f"level={level!r}: expected one of {', '.join(LEVELS)}")
    if budget_s is not None and not budget_s >= 0:
        raise BadRequest(f"budget_s={budget_s}: expected seconds, 0 or more")
    if not isinstance(waivers, Waivers):
        try:
            waivers = Waivers() if waivers is None else read_waivers(waivers)
        except (OSError, WaiverError) as error:
            raise BadRequest(f"waivers: {error}") from None
    given = (level, platform, device, seed, budget_s, resume, stop_at_first, workers, limits, progress, waivers, shard)
    try:
        return _Run(backend, *given, interrupted or threading.Event(), keep, at_work or AtWork()).run()
    except Cancelled:
        raise KeyboardInterrupt from None


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
        waivers: Waivers,
        shard: Shard | None,
        interrupted: threading.Event,
        keep: Keep | None,
        at_work: AtWork,
    ) -> None:
        self.ref = reference_here(backend)
        self.level, self.platform, self.device, self.seed = level, platform, device_name(device), seed
        self.budget, self.resume, self.stop_at_first = budget_s, resume, stop_at_first
        self.workers = workers or default_workers(self.device)
        self.progress, self.waivers, self.shard = progress, waivers, shard
        self.limits = limits or Limits(first_seconds=FIRST_SECONDS)
        self.started = time.monotonic()
        self.results: dict[tuple[str, str], CheckResult] = {}
        self.failed: set[tuple[str, str]] = set()
        """(check, scheme) that failed: their further cases would tell the same."""
        self.shrunk: dict[tuple[str, str], CheckResult] = {}
        """Failures that are as small as they will be, by what they were found as."""
        self.hangs = Hangs(self.workers)
        self.stopped = ""
        self.interrupted = interrupted
        self.so_far, self.at_work = SoFar(keep), at_work
        self.lock = threading.Lock()

    def run(self) -> Report:
        with ExitStack() as opened:
            first = opened.enter_context(self._worker())
            try:
                with self.at_work.on("loading it, and asking what it takes"):
                    plan = Plan.of(first, self.ref, self.platform, self.level, self.seed)
            except WorkerEnded as ended:
                plan = no_plan(self.ref, str(ended))
            self.code = code_of(first, self.ref, plan.modules)
            self.in_force = InForce.of(self.waivers, first, self.ref, plan, self.device)
            self._take_over(plan)
            others = [opened.enter_context(self._worker()) for _ in range(self.workers - 1)]
            settled = list(plan.settled)
            try:
                self._go_through(plan, [first, *others])
                self.so_far.offer(len(self.results), lambda: self._report_so_far(plan), every=0.0)
                settled += [*self._fingerprint(plan, first), *self._pooled(plan), *self._waived(first)]
                self._shrink(first)
            except (KeyboardInterrupt, Cancelled):
                self.stopped = "it was interrupted"
                if all(check.check != FINGERPRINT for check in settled):
                    settled += self._fingerprint(plan, first)  # that it was not taken
        changed = self.code.changed()
        if changed:  # nobody knows which code has passed a case, so that none has, and nothing goes on with it
            self.results = {key: found for key, found in self.results.items() if found.status is Status.FAILED}
            self.stopped = f"{changed} changed while it was run; what passed does not count, run it again"
            self.code = Code()
        return self._report(plan, settled)

    def _worker(self) -> Worker:
        return Worker(self.device, self.limits, self.interrupted)

    def _fingerprint(self, plan: Plan, worker: Worker) -> list[CheckResult]:
        """Which arithmetic the backend has, beside the one that it declares."""
        if not plan.items:
            return []
        if self.shard is not None:
            return [CheckResult("computes", FINGERPRINT, Status.NOT_RUN, plan.name, reason=self.shard.excuse)]
        if self._must_stop():
            reason = f"{self.stopped}: the fingerprint was not taken"
            return [CheckResult("computes", FINGERPRINT, Status.NOT_RUN, plan.name, reason=reason)]
        with self.at_work.on("its fingerprint"):
            return [fingerprint_of(worker, self.ref)]

    def _pooled(self, plan: Plan) -> list[CheckResult]:
        """The cases together, of a whole run."""
        if self.shard is not None:
            return [CheckResult("computes", POOLED, Status.NOT_RUN, plan.name, reason=self.shard.excuse)]
        return pooled_result(plan.name, plan.items, self.results)

    @property
    def _shard(self) -> str:
        return "" if self.shard is None else str(self.shard)

    def _waived(self, worker: Worker) -> list[CheckResult]:
        """Whether each waiver in force is one that there should be."""

        @cache
        def everything() -> Sequence[Item]:
            return Plan.of(worker, self.ref, self.platform, LEVELS[-1], self.seed, selects=False).items

        stopped = self.stopped if self.shard is None else self.shard.excuse
        return self.in_force.result(self.results, stopped, everything)

    def _take_over(self, plan: Plan) -> None:
        """The results of the report to resume, all but those that were not run, and what waivers make of them now:
        every failure stays one, or is covered and run again."""
        before = self.resume
        if before is None:
            return
        differs = difference(before.code, self.code.told)
        if differs:
            raise OtherCode(differs)
        asked = {"backend": plan.name, "origin": self.ref.origin, "level": self.level, "seed": self.seed}
        asked |= {"target": self.device, "device": plan.device, "shard": self._shard}
        for name, value in asked.items():
            if getattr(before, name) != value:
                raise BadRequest(f"resume: a report with {name}={getattr(before, name)!r}: expected {value!r}")
        if before.versions != versions():
            raise BadRequest(f"resume: a report of {before.versions}: here are {versions()}; run it from the start")
        planned = {item.key: item for item in plan.items}
        for check in before.checks:
            key = (check.check, before.unshrunk.get(f"{check.check} {check.case}", check.case))
            if check.status is Status.WAIVED and key in planned:
                if self.in_force.keeps(planned[key], check, before.waivers):
                    self.results[key] = check
            elif check.status is Status.FAILED and check.case:
                if key in planned and self.in_force.covering(planned[key].check, planned[key].case):
                    continue
                if key in planned and hung_before(check, self.limits.seconds):
                    continue
                self.results[key] = self.shrunk[key] = check
                self.failed.add((check.check, check.scheme))
            elif check.status in (Status.PASSED, Status.NOT_APPLICABLE, Status.NOT_SUPPORTED) and key in planned:
                self.results[key] = check

    def _go_through(self, plan: Plan, every: Sequence[Worker]) -> None:
        """All items, each by whichever worker is free; in order, so that the most telling come first."""
        free: SimpleQueue[Worker] = SimpleQueue()
        for worker in every:
            free.put(worker)
        mine = plan.items if self.shard is None else self.shard.of(plan.items)
        to_run = [item for item in mine if item.key not in self.results]
        waiting = iter(to_run)
        remaining = Remaining(((item.check, item.case.scheme), self._cost(item)) for item in to_run)

        def work() -> None:
            worker = free.get()
            while True:
                with self.lock:
                    item = next((item for item in waiting if not self._is_moot(item)), None)
                    if item is None or self._must_stop():
                        return
                try:
                    begun = time.monotonic()
                    with self.at_work.on(f"{item.check.removeprefix('computes.')} {item.case}"):
                        result = worker.run(Job(item.check, str(item.case), self.ref))
                    result = replace(result, seconds=round(time.monotonic() - begun, 3))
                    with self.lock:
                        self._take(item, result, len(mine), remaining)
                        self.so_far.offer(len(self.results), lambda: self._report_so_far(plan))
                except DeviceLost as error:
                    self._stop(str(error))
                    return
                except Cancelled:
                    return
                except BaseException:
                    self._stop("an error ended it")  # the others need not go on before it is told
                    raise

        with ThreadPoolExecutor(len(every)) as threads:
            futures = [threads.submit(work) for _ in every]
            try:
                for future in futures:
                    future.result()
            except BaseException:
                self._stop("it was interrupted")
                self.interrupted.set()  # the cases at work are not waited for
                raise
        if self.interrupted.is_set():
            raise Cancelled

    def _cost(self, item: Item) -> int:
        return cost(item.case, OF_A_CASE if self.device in ("cpu", "interpreter") else OF_A_CASE_ON_GPU)

    def _stop(self, why: str) -> None:
        self.stopped = self.stopped or why

    def _is_moot(self, item: Item) -> bool:
        return (item.check, item.case.scheme) in self.failed

    def _must_stop(self) -> bool:
        if not self.stopped and self.budget is not None and time.monotonic() - self.started > self.budget:
            self.stopped = f"the budget of {self.budget:g} s was spent"
        return bool(self.stopped)

    def _take(self, item: Item, result: CheckResult, planned: int, remaining: Remaining) -> None:
        result = self.in_force.applied(item, result)
        self.results[item.key] = result
        group = (item.check, item.case.scheme)
        remaining.ran(group, self._cost(item))
        if result.status is Status.FAILED:
            self.failed.add(group)
            remaining.drop(group)
            if self.stop_at_first:
                self._stop(f"{result.check} failed on {result.case}")
        self.hangs.take(result)
        if self.hangs.why_not_on:
            self._stop(self.hangs.why_not_on)
        if self.progress is not None:
            self.progress(len(self.results), planned, result, remaining.seconds)

    def _shrink(self, worker: Worker) -> None:
        """The failures, smaller, as far as time allows; each stays under the case that it was found as."""
        until = time.monotonic() + SHRINK_SECONDS
        if self.budget is not None:
            until = min(until, self.started + self.budget)
        if self.hangs.why_not_on or self.stop_at_first:
            return  # smaller cases of what hangs would be waited for as well
        with self.at_work.on("smaller cases of what failed"):
            for key, found in smaller(worker, self.ref, self.results, self.shrunk, until, self.in_force.covering):
                self.results[key] = self.shrunk[key] = found

    def _report_so_far(self, plan: Plan) -> Report:
        untaken = CheckResult("computes", FINGERPRINT, Status.NOT_RUN, plan.name, reason=f"{UNENDED}: not taken")
        return self._report(plan, [*plan.settled, untaken], covered=False)

    def _report(self, plan: Plan, settled: Sequence[CheckResult], covered: bool = True) -> Report:
        before = self.resume
        space = Space(plan.takes, fnuz=plan.fnuz)
        judged = [
            item.case
            for item in plan.items
            if item.check == EQUIVALENCE and item.key in self.results
            if self.results[item.key].status is Status.PASSED
        ]
        return Report(
            backend=plan.name,
            origin=self.ref.origin,
            level=self.level,
            seed=self.seed,
            target=self.device,
            device=plan.device,
            versions=versions(),
            checks=(*settled, *self.results.values(), *self._not_run(plan), NOT_TIMED),
            coverage=tuple(str(coverage) for coverage in coverage_of(self.level, space, judged))
            if covered and plan.takes
            else (),
            excluded=excluded(space) if plan.takes else (),
            seconds=time.monotonic() - self.started + (0.0 if before is None else before.seconds),
            planned=len(plan.items),
            unshrunk={f"{r.check} {r.case}": key[1] for key, r in self.shrunk.items() if r.case != key[1]},
            takes={scheme: tuple(names) for scheme, names in plan.takes.items()},
            fnuz=plan.fnuz,
            date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            waivers=tuple(waiver.told() for waiver in self.in_force.waivers),
            shard=self._shard,
            code=self.code.told,
        )

    def _not_run(self, plan: Plan) -> Iterator[CheckResult]:
        """What was declared and not run: one result for each check, scheme and part of the level."""
        mine = {item.key for item in (plan.items if self.shard is None else self.shard.of(plan.items))}
        left = Counter(
            (item.check, item.case.scheme, item.part, item.key in mine)
            for item in plan.items
            if item.key not in self.results
        )
        for (check, scheme, part, of_shard), count in left.items():
            why = FAILED_BEFORE if (check, scheme) in self.failed else self.stopped or UNENDED
            if self.shard is not None and not of_shard:
                why = self.shard.excuse
            reason = left_reason(why, count, part)
            yield CheckResult("computes", f"{check} ({part})", Status.NOT_RUN, plan.name, scheme, reason=reason)


TIMES = (
    "times are taken on a GPU: by `fp8moe certify`, for the certificate and after the cases (--times), or by "
    "`pytest conformance -m performs`"
)
NOT_TIMED = CheckResult("performs", "performs.times", Status.NOT_RUN, reason=TIMES)
