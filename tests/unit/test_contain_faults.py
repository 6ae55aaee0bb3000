"""Every way to misbehave is told for what it is, and the next honest job passes."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest

from conformance.checks import EQUIVALENCE
from conformance.contain import Job, Limits, Worker, processes
from conformance.contain.faults import FAULTS, Fault
from conformance.contain.stress import HONEST, Stress, case_of, drawn
from conformance.results import Status

LEFT_TO_THE_STRESS_RUN = ("kills its parent's parent", "stops itself", "waits in C, holding Python's lock")
"""Seconds each: servers that start anew, and further ways to hang."""
SECONDS = 1.5
SECONDS_OF = {"default device": 15.0}
"""torch imports what honours a default device when one is first set, which takes seconds on a slow disk."""
QUICK = [fault for fault in FAULTS if fault.kind not in LEFT_TO_THE_STRESS_RUN]


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    with Worker("cpu", Limits(seconds=SECONDS, memory_bytes=256 << 20)) as made:
        yield made


@pytest.mark.parametrize("fault", QUICK, ids=[fault.kind.replace(" ", "-") for fault in QUICK])
def test_a_fault_is_its_own_result(worker: Worker, fault: Fault) -> None:
    """Whatever it does, the result is this case's, says what happened, and how to see it again."""
    worker.limits = replace(worker.limits, seconds=SECONDS_OF.get(fault.kind, SECONDS))
    result = worker.run(Job(EQUIVALENCE, case_of(1), fault.ref))
    assert (result.status, result.case, result.backend) == (fault.status, case_of(1), fault.ref.name)
    assert fault.told in result.reason
    assert f"repro {case_of(1)} --backend {fault.ref.origin}" in result.reproduce
    honest = worker.run(Job(EQUIVALENCE, case_of(2), HONEST))
    assert (honest.status, honest.case, honest.backend, honest.reason) == (
        Status.PASSED,
        case_of(2),
        "TorchExperts",
        "",
    )


def test_nothing_is_left(worker: Worker) -> None:
    """After all of these, what a fault started is gone, and nothing waits to be reaped."""
    worker.call(os.getpid)
    (server,) = (pid for pid in processes.children(os.getpid()) if processes.children(pid))
    worker.close()
    until = time.monotonic() + 2.0
    while processes.children(server) and time.monotonic() < until:
        time.sleep(0.01)  # its keeper has ended, and is being waited for
    assert processes.children(server) == []
    assert processes.is_living(server)


def test_every_kind_is_drawn() -> None:
    """A stress run that is long enough has every kind in it, and another seed another order."""
    kinds = [fault.kind for fault in drawn(200, 0, FAULTS)]
    assert set(kinds) == {fault.kind for fault in FAULTS}
    assert kinds != [fault.kind for fault in drawn(200, 1, FAULTS)]
    assert len({fault.kind for fault in FAULTS}) == len(FAULTS)


def test_a_surprise_is_no_clean_run() -> None:
    """What was not told shows in the table and in the exit status."""
    assert Stress().clean
    assert not Stress(surprises=["fault 0"]).clean
    assert "fault 0" in Stress(surprises=["fault 0"]).lines()
