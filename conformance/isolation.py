"""Where a run of pytest judges a backend: in pytest's own process, or in a worker, which the backend may end."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping

from conformance.contain import Job, Limits, SubjectRef, Worker
from conformance.contain.hosting import keep_path
from conformance.contain.jobs import FIRST_SECONDS
from conformance.plan import Subject
from conformance.results import CheckResult

OURS = ("conformance", "fp8moe")
"""Packages whose classes are judged in pytest's own process, unless they are to be isolated, too."""
OUTSIDE, ALL, NONE = "outside", "all", "none"
REMEDY = "give it a name at the top of a module on the import path"
IN_A_WORKER = "judged in a worker process, which has run no conftest.py and no fixture: --fp8moe-no-isolate has it here"
LIMITS: Mapping[str, Limits] = {
    OUTSIDE: Limits(seconds=600.0, memory_bytes=None, output_bytes=64 << 20),
    ALL: Limits(first_seconds=FIRST_SECONDS),
}
"""By mode. Of those from outside the tree nobody has asked for limits: what is slow or large passes as it would without
a worker, and a hang ends all the same. Where isolation is asked for, they are those of `fp8moe check`."""


class Isolation:
    """The worker of the backends that have one: of one after the other, since all of them share the device.

    Args:
        mode: which do: `OUTSIDE`, those whose class is none of ours; `ALL`; or `NONE`.
        target: the name of the device that workers open.
        subjects: the backends of the run.

    Attributes:
        here: names of the backends from outside the tree that have none, and why.
        ended: what the backends that have ended a worker did, by name.

    Raises:
        ValueError: every backend is to have one, and a fresh process cannot find this class.
    """

    def __init__(self, mode: str, target: str, subjects: Iterable[Subject]) -> None:
        self.mode = mode
        self.target = target
        self.here: dict[str, str] = {}
        self.ended: dict[str, str] = {}
        self._references: dict[str, SubjectRef] = {}
        self._worker: Worker | None = None
        self._of = ""
        for subject in dict.fromkeys(subjects):
            self._take(subject)
        if self._references:
            keep_path()

    def _take(self, subject: Subject) -> None:
        outside = subject.experts_cls.__module__.partition(".")[0] not in OURS
        if self.mode == ALL:
            try:
                self._references[subject.origin] = SubjectRef.of(subject)
            except RuntimeError as error:
                raise ValueError(f"--fp8moe-isolate: {error}") from error
        elif self.mode == OUTSIDE and outside:
            found = SubjectRef.importable(subject)
            if found is None:
                self.here[subject.name] = f"no other process finds {subject.experts_cls.__qualname__}: {REMEDY}"
            else:
                self._references[subject.origin] = found
        elif outside:
            self.here[subject.name] = "--fp8moe-no-isolate, --pdb or --trace"

    def reference(self, subject: Subject) -> SubjectRef | None:
        """What a worker finds a backend by; None of one that is judged in this process."""
        return self._references.get(subject.origin)

    def hint(self, subject: Subject) -> str:
        """What the report of a failure ends with, where nobody has asked for the worker that it was seen in."""
        if self.mode != OUTSIDE or self.reference(subject) is None:
            return ""
        return f"\n  {IN_A_WORKER}"

    def header(self) -> list[str]:
        """Who is judged where."""
        isolated = [ref.name for ref in self._references.values()]
        lines = [f"in a worker process: {', '.join(isolated)}"] if isolated else []
        return lines + [f"in pytest's own process, which it can end: {name} ({why})" for name, why in self.here.items()]

    def run(self, job: Job) -> CheckResult:
        """As `Worker.run`; what the backend prints is printed here, where pytest captures it."""
        if self._worker is None or self._of != job.subject.origin:
            self.close()
            self._worker, self._of = Worker(self.target, LIMITS[self.mode]), job.subject.origin
        result = self._worker.run(job)
        encoding = sys.stdout.encoding or "utf-8"
        sys.stdout.write(self._worker.printed.encode(encoding, "replace").decode(encoding))
        if self._worker.ended:
            self.ended[job.subject.name] = result.reason
        return result

    def close(self) -> None:
        """Ends the worker, where there is one."""
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.close()
