"""What a worker does: it opens the device, takes jobs from its channel, and answers each with a result as JSON."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import pickle
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import torch

from conformance.cases import Case
from conformance.checks import check_case, reproduction
from conformance.contain.channel import Incoming, framed
from conformance.contain.device import ill, is_device_error
from conformance.contain.integrity import Judges
from conformance.contain.jobs import Job, SubjectRef
from conformance.contain.settings import Settings
from conformance.not_here import NoDevice
from conformance.plan import Subject, Target, is_simulated, resolve_target
from conformance.raised import told
from conformance.results import CheckResult, Evidence, Status
from fp8moe.registry import BackendUnavailable
from fp8moe.texts import text_of

CHANNEL_LOST = 113
"""Exit status of a worker that can no longer answer."""
OUT_OF_MEMORY = "out of memory"
"""What the reason of a result begins with where memory ran out, as `conformance.trial.guarded` writes it."""
WHERE = signal.SIGUSR1
"""Makes a worker write where it is to its standard error, whatever it is doing."""

_judges: Judges | None = None


def remember() -> None:
    """Takes the judges down as they are, once for all workers: in the server, before any backend's code has run."""
    global _judges
    _judges = Judges()


def work(channel: int) -> None:
    """Serves until the channel's other end closes. Never returns."""
    faulthandler.enable(file=2, all_threads=False)
    faulthandler.register(WHERE, file=2, all_threads=False)
    _Worker(socket.socket(fileno=channel)).serve()


class _Worker:
    target: Target
    settings: Settings

    def __init__(self, channel: socket.socket) -> None:
        self.pid = os.getpid()
        self.channel = channel
        self.judges = Judges() if _judges is None else _judges
        self.subjects: dict[SubjectRef, Subject] = {}
        self.threads = threading.active_count()

    def serve(self) -> None:
        incoming = Incoming(self.channel)
        while incoming.receive():
            for message in incoming.messages():
                kind, number, *arguments = pickle.loads(message)
                handlers: Mapping[str, Callable[..., dict[str, Any]]] = {
                    "open": self.open,
                    "job": self.job,
                    "call": self.call,
                }
                answer = handlers[kind](number, *arguments)
                self.send({"number": number, "kind": "answer", **answer})
        os._exit(0)

    def send(self, message: dict[str, Any]) -> None:
        """To the parent; a process that a backend has forked comes here too, and stays, to be found."""
        if os.getpid() != self.pid:
            while True:
                signal.pause()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):  # it may be closed, or replaced by anything
                stream.flush()
        try:
            self.channel.sendall(framed(json.dumps({**message, "pid": self.pid}).encode()))
        except OSError:
            os._exit(CHANNEL_LOST)

    def open(self, number: int, target: str, directory: str) -> dict[str, Any]:
        """Opens the device and proves it in order."""
        with contextlib.suppress(OSError):
            os.chdir(directory)
        try:
            self.target = resolve_target(target)
        except NoDevice as error:
            return {"refused": error.args}
        why = ill(self.target.device)
        self.settings = Settings()
        return {"ill": why} if why else {}

    def call(self, number: int, function: Callable[..., object], arguments: tuple[object, ...]) -> dict[str, Any]:
        """A function of the suite's."""
        try:
            return {"value": function(*arguments)}
        except BaseException:
            return {"suite_error": traceback.format_exc()}

    def job(self, number: int, job: Job) -> dict[str, Any]:
        """One check of one case, and what the backend did beside it."""
        case = Case.parse(job.case)
        evidence: Evidence | None = None
        subject: Subject | None = None
        try:
            subject = self.loaded(job.subject)
            simulated = is_simulated(subject.experts_cls, self.target)
            evidence = Evidence.SIMULATED if simulated else Evidence.HARDWARE
        except BackendUnavailable as error:
            result = self.result(job, case, Status.NOT_RUN, text_of(error))
        except BaseException as error:
            result = self.result(job, case, Status.FAILED, f"loading it raised {told(error)}")
        if subject is not None:
            self.send({"number": number, "kind": "began", "evidence": None if evidence is None else evidence.value})
            try:
                result = check_case(case, subject, self.target, job.check)
                evidence = result.evidence or evidence
            except BaseException as error:
                convicting = self.convicting(error, subject)
                if convicting is None:
                    if not self.faults():
                        return {"suite_error": traceback.format_exc()}
                    convicting = Status.FAILED, f"after which the suite's own code raised {told(error)}"
                result = self.result(job, case, *convicting, evidence)
        return self.after(result, job, case, evidence)

    def loaded(self, ref: SubjectRef) -> Subject:
        if ref not in self.subjects:
            self.subjects[ref] = ref.load()
        return self.subjects[ref]

    def convicting(self, error: BaseException, subject: Subject) -> tuple[Status, str] | None:
        """What `check_case` let through, where it is the backend's doing; None where it is the suite's own error."""
        if not isinstance(error, Exception):
            return Status.FAILED, f"it raised {told(error)}"  # the suite never raises what is no Exception
        if isinstance(error, torch.OutOfMemoryError):
            return Status.NOT_RUN, f"{OUT_OF_MEMORY} while it was judged: {text_of(error)}"
        if is_device_error(error) and ill(self.target.device):
            return Status.FAILED, f"the device failed: {told(error)}"
        if _passed_through(error, subject.experts_cls.__module__):
            return Status.FAILED, f"its own code raised {told(error)} while it was judged"
        return None

    def after(self, result: CheckResult, job: Job, case: Case, evidence: Evidence | None) -> dict[str, Any]:
        """The answer: the result, less what the backend did to what it shares with others."""
        faults = self.faults()
        sick = ill(self.target.device) if result.status is not Status.PASSED or faults else self.late_error()
        full = result.status is Status.NOT_RUN and result.reason.startswith(OUT_OF_MEMORY)
        if sick and sick not in result.reason:
            faults.append(f"it left the device unusable: {sick}")
        if faults:
            reason = "; ".join([*faults, *([result.reason] if result.status is Status.FAILED else [])])
            result = self.result(job, case, Status.FAILED, reason, evidence)
        self.judges.extend()
        return {
            "result": result.to_json(),
            "replace": bool(faults or sick or full),
            "threads": max(threading.active_count() - self.threads, 0),
        }

    def faults(self) -> list[str]:
        """What is not as it was: the judges, the settings."""
        replaced = self.judges.replaced()
        return [f"it replaced {replaced}"] * bool(replaced) + self.settings.changes(Settings())

    def late_error(self) -> str:
        """An error that the device tells of only when it is asked."""
        if self.target.device == "cuda":
            try:
                torch.cuda.synchronize()
            except Exception as error:
                return told(error)
        return ""

    def result(
        self, job: Job, case: Case, status: Status, reason: str, evidence: Evidence | None = None
    ) -> CheckResult:
        from fp8moe.backends.torch_experts import TorchExperts

        named = Subject(job.subject.name, TorchExperts, job.subject.origin)  # only its origin is told
        return CheckResult(
            "computes",
            job.check,
            status,
            job.subject.name,
            case.scheme,
            str(case),
            reason,
            evidence=evidence,
            reproduce=reproduction(case, named, self.target, job.check),
        )


def _passed_through(error: BaseException, module: str) -> bool:
    """Whether a frame of a backend's module lies between the suite and where the exception was raised."""
    if module.split(".")[0] in ("conformance", "fp8moe") and not module.startswith("conformance.contain."):
        return False
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_globals.get("__name__") == module:
            return True
        trace = trace.tb_next
    return False
