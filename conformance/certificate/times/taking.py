"""Takes a certificate's times, in a process of their own: whatever happens to it, the checks' results stay."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from typing import Any, Protocol

from conformance.cases import Case
from conformance.certificate.times.judged import TARGETS, contradictions, judged
from conformance.certificate.times.kept import FAILED, NOT_TAKEN, TAKEN, TimedCase, Times, planned
from conformance.certificate.times.reading import case_from, device_from
from conformance.editions import target_of
from conformance.rates import Rates, rates_of
from conformance.report import Report
from conformance.timing.recorded import HERE
from conformance.timing.two_processes import Version, WorkerFailed

ASKED_S = 120.0
"""As long as it takes by itself; 0 for no times."""
CLOCK = time.monotonic
MOST_TEXT = 2_000
"""Characters of a reason."""


class Timer(Protocol):
    """A process that times cases."""

    def ask(self, verb: str, seconds: float | None = None, **given: Any) -> dict[str, Any]: ...
    def close(self) -> None: ...


def take(
    report: Report,
    seconds: float = ASKED_S,
    start: Callable[[float], Timer] = lambda left: Version("the process that times", HERE, left),
) -> Times:
    """The backend's times beside those of all that could be selected here, on published layers, as far as the time
    goes; or why there are none. Raises nothing that a backend or the device is the cause of.

    Args:
        report: of the checks.
        seconds: for all of it, but for what is under way then is stopped and not counted.
        start: of a process, which may take so many seconds.
    """
    rates = rates_of(report.device)
    cases = planned(report.takes, target_of(report.target)) if report.target in TARGETS else []
    why_not = {
        "no time was given to them (--times 0)": seconds <= 0,
        f"of a {report.target} device, and only those of CUDA and ROCm are timed": report.target not in TARGETS,
        f"the rates of {report.device} are not known, so that nothing says what is too fast": rates is None,
        "no published layer is of a scheme and activation that the backend takes": not cases,
    }
    for reason, holds in why_not.items():
        if holds:
            return Times(NOT_TAKEN, reason)
    assert rates is not None
    with _Process(report, CLOCK() + seconds, start) as process:
        found = list(process.timed(cases))
    if not any(report.origin in one.us for one in found):
        reasons = dict.fromkeys([*(one.absent.get(report.origin, "") for one in found), process.ended])
        return Times(FAILED, f"{report.origin} has no time: {'; '.join(filter(None, reasons))}"[:MOST_TEXT])
    kept, too_fast = _without_too_fast(found, report.origin, rates)
    if too_fast:
        return Times(FAILED, too_fast)
    times = Times(TAKEN, "", process.device, asdict(rates), kept)
    wrong = list(contradictions(times, report, {**process.device, "name": report.device, "kind": report.target}))
    try:
        times.files(report.versions)
    except ValueError as error:
        wrong.append(str(error))
    return Times(FAILED, "; ".join(wrong)[:MOST_TEXT]) if wrong else times


class _Stopped(Exception):
    """Nothing further can be timed; the text says why."""


class _Process:
    """A process that times cases: started when there is one, and again after it failed.

    Args:
        deadline: of `CLOCK`; what is under way then is stopped.
    """

    def __init__(self, report: Report, deadline: float, start: Callable[[float], Timer]) -> None:
        self.report, self.deadline, self.start = report, deadline, start
        self.device: Mapping[str, str] = {}
        self.ended = ""
        self._timer: Timer | None = None

    def __enter__(self) -> _Process:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def timed(self, cases: Sequence[Case]) -> Iterator[TimedCase]:
        """The first cases; `ended` says why not all of them, then."""
        try:
            yield from map(self._timed, cases)
        except _Stopped as stopped:
            self.ended = str(stopped)

    def _timed(self, case: Case) -> TimedCase:
        """One that failed is timed once more with the backend alone, since another one may have been at fault."""
        first = ""
        for alone in (False, True):
            try:
                answer = self._ask(case, alone)
                return self._read(case, answer, f"with all of them the case failed: {first}")
            except WorkerFailed as error:
                first = f"{first}; and alone: {error}" if alone else str(error)
        return TimedCase(str(case), "", {}, {self.report.origin: first[:MOST_TEXT]})

    def _read(self, case: Case, answer: Mapping[str, Any], why: str) -> TimedCase:
        """What a process answered, which a backend ran in.

        Args:
            why: backends were left out.
        """
        try:
            self.device = device_from("its device", answer["device"])
            absent = {**answer["absent"], **dict.fromkeys(answer["left"], why)}
            told = {name: answer[name] for name in ("selected", "us")}
            absent = {name: absent[name][:MOST_TEXT] for name in absent}
            return case_from("its answer", {"case": str(case), **told, "absent": absent, "state": answer["state"]})
        except (KeyError, TypeError, ValueError) as error:
            self._close()
            raise WorkerFailed(f"the process gave no times: {type(error).__name__}: {error}") from None

    def _ask(self, case: Case, alone: bool) -> dict[str, Any]:
        given = {"case": str(case), "backend": self.report.origin, "target": self.report.target, "alone": alone}
        if self._timer is None:
            try:
                self._timer = self.start(self._left())
            except (WorkerFailed, OSError) as error:
                raise _Stopped(f"no process that could time: {error}") from None
        try:
            return self._timer.ask("beside", self._left(), **given)
        except (WorkerFailed, OSError) as error:
            self._close()
            self._left()
            raise WorkerFailed(str(error)) from None

    def _left(self) -> float:
        left = self.deadline - CLOCK()
        if left <= 0:
            raise _Stopped("the time was over")
        return left

    def _close(self) -> None:
        if self._timer is not None:
            with suppress(OSError):
                self._timer.close()
            self._timer = None


def _without_too_fast(found: Sequence[TimedCase], backend: str, rates: Rates) -> tuple[list[TimedCase], str]:
    """Cases without the times of others that are below the floor, which become absent; and how the backend's own is."""
    kept = []
    for one in found:
        case = judged(one, backend, rates)
        told = {name: text for name in one.us if (text := case.too_fast(name))}
        if backend in told:
            return [], f"{told[backend]}: {one.case}"
        us = {name: rounds for name, rounds in one.us.items() if name not in told}
        kept.append(replace(one, us=us, absent={**one.absent, **told}))
    return kept, ""
