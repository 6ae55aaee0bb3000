"""A worker as its user sees it: jobs go in, results come out, whatever the backend does."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import TracebackType
from typing import Any

from conformance.cases import Case
from conformance.checks import reproduction
from conformance.contain.handle import Handle
from conformance.contain.inside import OUT_OF_MEMORY
from conformance.contain.jobs import DeviceLost, Job, Limits, SuiteError, WorkerEnded
from conformance.not_here import NoDevice
from conformance.plan import DEVICES, Subject, Target
from conformance.results import CheckResult, Evidence, Status
from fp8moe.backends.torch_experts import TorchExperts
from fp8moe.platforms import PLATFORMS

ATTEMPTS = 2
"""Once more in a fresh worker, where what went wrong may come from earlier jobs, or from outside."""
THREADS_LEFT = "threads left running"
HUNG = "seconds that it did not end in"
"""Among what is measured of a failure: the limit that the case ran out of."""


class Worker:
    """Runs jobs in a process of its own, which is replaced after whatever may have harmed it.

    The process is forked when the first job comes. One worker is for one thread.

    Args:
        target_name: a name of `conformance.plan.DEVICES`, less "auto": what triton does has to be known before it is
            imported.
        limits: what a job may use.
        cancelled: once it is set, by another thread, whatever is asked ends with `Cancelled`, and the process with it.

    Raises:
        ValueError: an unknown name.
    """

    def __init__(
        self,
        target_name: str,
        limits: Limits = Limits(),  # noqa: B008 (frozen)
        cancelled: threading.Event | None = None,
    ) -> None:
        if target_name not in DEVICES or target_name == "auto":
            raise ValueError(f"target_name={target_name!r}: expected one of {', '.join(DEVICES[1:])}")
        self.target_name = target_name
        self.limits = limits
        self._cancelled = cancelled or threading.Event()
        self._handle: Handle | None = None
        self._numbers = itertools.count(1)
        self._served = 0
        self._restarts = 0
        self.ended = False
        """Whether the last job ended its process, or had to be ended with it."""
        self.printed = ""
        """The end of what the last job printed."""
        self._answered: set[str] = set()
        """Backends that have answered in the process at hand."""
        self._slow: set[str] = set()
        """Backends whose first job has run out of time."""

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def starts(self) -> int:
        """Processes started so far."""
        return self._restarts

    def close(self) -> None:
        """Ends the process and all that it has started."""
        handle, self._handle, self._served = self._handle, None, 0
        self._answered.clear()
        if handle is not None:
            handle.end()

    restart = close
    """The next job gets a fresh process."""

    def run(self, job: Job) -> CheckResult:
        """The verdict of one check on one case. Crash, hang and whatever else ends a worker are the case's own result.

        Raises:
            SuiteError: the suite's own code raised, in a fresh worker too.
            DeviceLost: the device is not in order in a fresh worker either; the job was not judged.
            NoDevice: (a ValueError) the device is not there.
            InvalidCase: the job's case is none.
            Cancelled: before there was a verdict.
        """
        case = Case.parse(job.case)
        self.ended, self.printed = False, ""
        for attempt in range(1, ATTEMPTS + 1):
            last = attempt == ATTEMPTS
            handle = self._ready()
            used = self._served > 0
            self._served += 1
            evidence: Evidence | None = None
            number, seconds = next(self._numbers), self._seconds_for(job.subject.name)
            try:
                handle.send(("job", number, job), self.limits.seconds)
                answer = handle.wait(number, seconds)
                if answer["kind"] == "began":
                    evidence = None if answer["evidence"] is None else Evidence(answer["evidence"])
                    answer = handle.wait(number, seconds)
                handle.check_watchers()
                self.printed = handle.printed()
            except WorkerEnded as ended:
                self.printed = handle.printed()
                self.close()
                if ended.hung:
                    self._slow.add(job.subject.name)
                if ended.outside and not last:
                    continue
                self.ended = True
                return self._failed(job, case, ended.reason, evidence, {HUNG: seconds} if ended.hung else {})
            except BaseException:  # Ctrl-C among them: a job without a reader is none
                self.close()
                raise
            self._answered.add(job.subject.name)
            result = self._settle(job, case, answer, handle, evidence)
            if result is None:
                if used and not last:
                    continue
                raise SuiteError(f"{job.check} on {job.case}, {job.subject.name}:\n{answer['suite_error']}")
            full = result.status is Status.NOT_RUN and result.reason.startswith(OUT_OF_MEMORY)
            if full and used and not last:
                continue  # what an earlier job kept is gone now
            return result
        raise AssertionError("unreachable")

    def _seconds_for(self, name: str) -> float:
        return self.limits.first if name not in self._answered | self._slow else self.limits.seconds

    def _settle(
        self, job: Job, case: Case, answer: dict[str, Any], handle: Handle, evidence: Evidence | None
    ) -> CheckResult | None:
        """The result that an answer holds; None where the suite's own code raised."""
        if "suite_error" in answer:
            self.close()
            return None
        result = CheckResult.from_json(answer["result"])
        left = handle.left_running()
        reason = f"it left a child process running ({left[0][:80]})" if left else ""
        if reason:
            if result.status is Status.FAILED:
                reason = f"{result.reason}; {reason}"
            result = self._failed(job, case, reason, evidence)
        elif answer["threads"]:
            result = replace(result, measured={**result.measured, THREADS_LEFT: float(answer["threads"])})
        if reason or answer["replace"]:
            self.close()
        return result

    def call(self, function: Callable[..., Any], *arguments: object, seconds: float | None = None) -> Any:
        """What a function of the suite returns, called in the worker.

        Args:
            function: at the top of a module on the import path.
            arguments: anything that pickles.
            seconds: for this call; None: a job's.

        Returns:
            the value, as it comes out of JSON.

        Raises:
            SuiteError: the function raised.
            WorkerEnded: the worker did not come to its end.
            DeviceLost, ValueError, Cancelled: as `run`.
        """
        seconds = self.limits.seconds if seconds is None else seconds
        handle = self._ready()
        self._served += 1
        number = next(self._numbers)
        try:
            handle.send(("call", number, function, arguments), seconds)
            answer = handle.wait(number, seconds)
        except BaseException:
            self.close()
            raise
        if "suite_error" in answer:
            self.close()
            raise SuiteError(
                f"{function.__module__}.{function.__qualname__} raised in a worker\n{answer['suite_error']}"
            )
        return answer["value"]

    def _ready(self) -> Handle:
        """A worker whose device is proven healthy: the one at hand, or a fresh one."""
        if self._handle is not None and not self._handle.is_alive:
            self.close()
        if self._handle is None:
            self._handle = self._started()
            self._served = 0
        return self._handle

    def _started(self) -> Handle:
        interpreter = self.target_name == "interpreter"
        why = ""
        for _ in range(ATTEMPTS):
            handle: Handle | None = None
            try:
                handle = Handle(interpreter, self.limits, self._cancelled)
                self._restarts += 1
                number = next(self._numbers)
                handle.send(("open", number, self.target_name, os.getcwd()), self.limits.start_seconds)
                answer = handle.wait(number, self.limits.start_seconds)
            except WorkerEnded as ended:
                why = ended.reason
            except BaseException:
                if handle is not None:
                    handle.end()
                raise
            else:
                if "refused" in answer:
                    handle.end()
                    raise NoDevice(*answer["refused"])
                if "ill" not in answer:
                    handle.note_baseline()
                    return handle
                why = answer["ill"]
            if handle is not None:
                handle.end()
        raise DeviceLost(f"{self.target_name}: a fresh worker could not be made ready, {ATTEMPTS} times: {why}")

    def _failed(
        self, job: Job, case: Case, reason: str, evidence: Evidence | None, measured: Mapping[str, float] | None = None
    ) -> CheckResult:
        named = Subject(job.subject.name, TorchExperts, job.subject.origin)  # only its origin is told
        target = Target(self.target_name, PLATFORMS["cpu"], "cpu")  # and only this one's name
        return CheckResult(
            "computes",
            job.check,
            Status.FAILED,
            job.subject.name,
            case.scheme,
            str(case),
            reason,
            evidence=evidence,
            reproduce=reproduction(case, named, target, job.check),
            measured=dict(measured or {}),
        )
