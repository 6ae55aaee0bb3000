"""Workers: how a backend gets into one, what comes back, and how one ends."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from conformance.cases import Case
from conformance.checks import EQUIVALENCE, check_case
from conformance.contain import DeviceLost, Job, Limits, SubjectRef, SuiteError, Worker, WorkerEnded, device, processes
from conformance.contain import worker as worker_module
from conformance.contain.channel import Incoming, NotAMessage, framed
from conformance.contain.faults import ref_of
from conformance.contain.integrity import Judges
from conformance.contain.settings import Settings
from conformance.contain.stress import HONEST, case_of
from conformance.contain.worker import THREADS_LEFT
from conformance.plan import Subject, load_subject, resolve_target
from conformance.planned import Plan
from conformance.results import Evidence, Status
from fp8moe.backends.torch_experts import TorchExperts

ROOT = Path(__file__).parents[2]
GONE_WITHIN = 10.0


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    with Worker("cpu", Limits(seconds=20.0)) as made:
        yield made


ONLY_HERE = """
from fp8moe.backends.torch_experts import TorchExperts
FACTOR = 2
class Doubles(TorchExperts):
    def combine(self, *arguments):
        return super().combine(*arguments) * FACTOR
"""


@pytest.fixture
def doubles(monkeypatch: pytest.MonkeyPatch) -> type[TorchExperts]:
    """A class of a module that no path leads to, as pytest makes them."""
    module = ModuleType("only_here")
    monkeypatch.setitem(sys.modules, "only_here", module)
    exec(ONLY_HERE, vars(module))
    found: type[TorchExperts] = module.Doubles
    return found


def test_an_honest_result_is_that_of_the_check(worker: Worker) -> None:
    """The same result, to the last figure, as in a process that contains nothing."""
    expected = check_case(Case.parse(case_of(1)), load_subject("TorchExperts"), resolve_target("cpu"))
    assert worker.run(Job(EQUIVALENCE, case_of(1), HONEST)) == expected
    assert expected.status is Status.PASSED
    assert expected.evidence is Evidence.HARDWARE


def test_one_worker_serves_many_jobs(worker: Worker) -> None:
    """Jobs that harm nothing share a process, so that faults of sequence show."""
    worker.call(os.getpid)
    starts = worker.starts
    pids = {worker.call(os.getpid) for _ in range(3) if worker.run(Job(EQUIVALENCE, case_of(1), HONEST))}
    assert len(pids) == 1
    assert worker.starts == starts
    worker.restart()
    assert worker.call(os.getpid) not in pids


def test_a_class_without_a_path_travels_by_value(worker: Worker, doubles: type[TorchExperts]) -> None:
    """With what its function or its module holds."""
    pytest.importorskip("cloudpickle", reason="cloudpickle carries classes that no name leads to")
    factor = 3

    class Triples(TorchExperts):
        def combine(self, *arguments: Any) -> torch.Tensor:
            return super().combine(*arguments) * factor

    for cls in (Triples, doubles):
        ref = SubjectRef.of(Subject(cls.__name__, cls, f"here:{cls.__name__}"))
        assert ref.pickled
        result = worker.run(Job(EQUIVALENCE, case_of(1), ref))
        assert result.status is Status.FAILED
        assert "error/bound" in result.reason
        assert f"--backend here:{cls.__name__}" in result.reproduce


def test_a_class_that_can_be_imported_travels_by_name() -> None:
    """And one that only looks like it, since another has its name, by value."""
    pytest.importorskip("cloudpickle", reason="cloudpickle carries classes that no name leads to")
    assert SubjectRef.of(load_subject("TorchExperts")).path == "fp8moe.backends.torch_experts:TorchExperts"
    derived = TorchExperts.with_recipe(TorchExperts.contract.recipe)
    assert SubjectRef.of(Subject("TorchExperts", derived, "TorchExperts")).pickled


def test_a_missing_cloudpickle_is_named(monkeypatch: pytest.MonkeyPatch, doubles: type[TorchExperts]) -> None:
    """With what to do about it."""
    monkeypatch.setitem(sys.modules, "cloudpickle", None)
    with pytest.raises(RuntimeError, match="pip install cloudpickle"):
        SubjectRef.of(Subject("Doubles", doubles, "here:Doubles"))


def test_an_error_of_the_suite_convicts_nobody(worker: Worker) -> None:
    """It is raised here, with the traceback from there."""
    with pytest.raises(SuiteError, match=r"KeyError: 'computes\.nonsense'"):
        worker.run(Job("computes.nonsense", case_of(1), HONEST))
    with pytest.raises(SuiteError, match="ZeroDivisionError"):
        worker.call(divmod, 1, 0)
    assert worker.run(Job(EQUIVALENCE, case_of(1), HONEST)).status is Status.PASSED


def test_a_thread_left_running_is_noted(worker: Worker) -> None:
    """Honest libraries leave some too: no failure."""
    result = worker.run(Job(EQUIVALENCE, case_of(1), ref_of("LeavesAThread")))
    assert result.status is Status.PASSED
    assert result.measured[THREADS_LEFT] == 2.0  # it was called twice
    worker.restart()


class UsesAPool(TorchExperts):
    """A pool for each call, closed after it; Python keeps what it was forked from, by default from 3.14 on."""

    def apply(self, *arguments: Any, **keywords: Any) -> torch.Tensor:
        with multiprocessing.get_context("forkserver").Pool(1) as pool:
            assert pool.map(abs, [-1]) == [1]
        return super().apply(*arguments, **keywords)


class LeavesWhatIsForked(UsesAPool):
    """A process of the same command line, which nobody waits for."""

    def apply(self, *arguments: Any, **keywords: Any) -> torch.Tensor:
        multiprocessing.get_context("forkserver").Process(target=time.sleep, args=(60.0,)).start()
        return super().apply(*arguments, **keywords)


def test_what_python_forks_pools_from_is_kept_and_what_it_forked_is_not() -> None:
    with Worker("cpu", Limits(seconds=60.0)) as made:
        kept = made.run(Job(EQUIVALENCE, case_of(1), SubjectRef.named(f"{__name__}:UsesAPool")))
        assert (kept.status, kept.reason) == (Status.PASSED, "")
        left = made.run(Job(EQUIVALENCE, case_of(1), SubjectRef.named(f"{__name__}:LeavesWhatIsForked")))
        assert left.status is Status.FAILED
        assert left.reason.startswith("it left a child process running")


def test_closed_outputs_are_no_error_of_the_suite(worker: Worker) -> None:
    """A backend may close what it could print to, and is judged all the same, as those after it are."""
    for descriptor in (1, 2):
        worker.call(os.close, descriptor)
    for _ in range(2):
        assert worker.run(Job(EQUIVALENCE, case_of(1), HONEST)).status is Status.PASSED
    worker.restart()


def test_a_call_that_does_not_end(worker: Worker) -> None:
    """It is ended, and says where it was."""
    with pytest.raises(WorkerEnded, match=r"did not end within 0\.2 s, in call at inside.py"):
        worker.call(time.sleep, 100, seconds=0.2)


def test_a_class_is_asked_in_the_worker(worker: Worker) -> None:
    """What a plan says of it; and where its own code raises, that is every cell's result."""
    pytest.importorskip("cloudpickle", reason="cloudpickle carries classes that no name leads to")
    here, there = os.getpid(), []

    class Refuses(TorchExperts):
        @staticmethod
        def is_supported_config(*arguments: Any, **keywords: Any) -> Any:
            if os.getpid() == here:
                there.append("asked in the parent")
            raise RuntimeError("do not ask")

    plan = Plan.of(worker, HONEST, None, "smoke", 0, selects=False)
    assert (plan.settled, "silu" in plan.takes["block"]) == ((), True)
    refused = Plan.of(worker, SubjectRef.of(Subject("Refuses", Refuses, "here:Refuses")), None, "smoke", 0)
    assert any("RuntimeError: do not ask" in result.reason for result in refused.settled)
    assert (refused.items, there) == ((), [])


def test_the_parent_keeps_its_environment() -> None:
    """The interpreter is an attribute of the worker."""
    before, threads = dict(os.environ), torch.get_num_threads()
    with Worker("interpreter", Limits(seconds=20.0)) as simulated, Worker("cpu") as plain:
        assert simulated.call(os.getenv, "TRITON_INTERPRET") == "1"
        assert plain.call(os.getenv, "TRITON_INTERPRET") is None
        assert plain.call(torch.get_num_threads) == 1
    assert (dict(os.environ), torch.get_num_threads()) == (before, threads)


def test_names_of_targets() -> None:
    """Which interpreter triton gets has to be known, and the device has to be there."""
    with pytest.raises(ValueError, match="target_name='auto'"):
        Worker("auto")
    with Worker("xpu") as absent, pytest.raises(ValueError, match=r"^xpu: torch "):
        absent.call(os.getpid)


def test_a_device_that_is_ill_in_a_fresh_worker_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two workers are tried, and both are ended."""
    ended = []

    class Ill:
        def __init__(self, *arguments: object) -> None:
            self.send = lambda message, seconds: None
            self.wait = lambda number, seconds: {"ill": "ones times ones is 3"}

        def end(self) -> None:
            ended.append(self)

    monkeypatch.setattr(worker_module, "Handle", Ill)
    with pytest.raises(DeviceLost, match="2 times: ones times ones is 3"):
        Worker("cpu").run(Job(EQUIVALENCE, case_of(1), HONEST))
    assert len(ended) == 2


def test_a_device_is_proven_by_computing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sums come out on a device that computes, and a wrong one or an error is told."""
    assert device._wrong("cpu") == ""
    assert device.ill("cpu") == ""
    assert device.ill("nowhere").startswith("RuntimeError: Expected one of")
    monkeypatch.setattr(torch, "ones", lambda *shape, **keywords: torch.full(shape, 1.5, **keywords))
    assert "is not 64 everywhere" in device._wrong("cpu")


def test_errors_of_a_device() -> None:
    """By their text where torch has no type for them."""
    assert device.is_device_error(RuntimeError("CUDA error: an illegal memory access was encountered"))
    assert not device.is_device_error(RuntimeError("shapes do not match"))
    assert not device.is_device_error(ValueError("CUDA error"))


SLOW_AT_FIRST = """
import time
from fp8moe.backends.torch_experts import TorchExperts
class SlowAtFirst(TorchExperts):
    def combine(self, *arguments):
        import threading  # a module of this process, for a class that arrives by value has no state of its own
        if not hasattr(threading, "ready"):
            time.sleep(2.5)
        threading.ready = True
        return super().combine(*arguments)
"""


def test_a_backends_first_job_in_a_process_has_more_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """For kernels that are compiled or loaded then; a backend that runs out of it has that time once."""
    module = ModuleType("slow_at_first")
    monkeypatch.setitem(sys.modules, "slow_at_first", module)
    exec(SLOW_AT_FIRST, vars(module))
    slow = SubjectRef.of(Subject("SlowAtFirst", module.SlowAtFirst, "here:SlowAtFirst"))
    loops = ref_of("Loops")
    first, again = (f"v1:E=4,H=128,I=128,M={tokens}" for tokens in (3, 5))
    with Worker("cpu", Limits(seconds=1.5, first_seconds=30.0)) as worker:
        for case in (first, again):
            assert worker.run(Job("computes.equivalence", case, slow)).status is Status.PASSED
        worker.restart()
        assert worker.run(Job("computes.equivalence", first, slow)).status is Status.PASSED
    with Worker("cpu", Limits(seconds=1.5)) as worker:
        assert "within 1.5 s" in worker.run(Job("computes.equivalence", first, slow)).reason
    with Worker("cpu", Limits(seconds=0.5, first_seconds=3.0)) as worker:
        told = [worker.run(Job("computes.equivalence", case, loops)).reason for case in (first, again)]
        assert "within 3 s" in told[0]
        assert "within 0.5 s" in told[1]


SCRIPT = textwrap.dedent("""
    import os
    import signal
    from conformance.contain import Job, Limits, Worker, processes
    from conformance.contain.faults import ref_of
    if __name__ == "__main__":
        signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background job begins without
        with Worker("cpu", Limits(seconds=100.0)) as worker:
            worker.call(os.getpid)
            print(*processes.descendants(os.getpid()), flush=True)
            worker.run(Job("computes.equivalence", "v1:E=4,H=128,I=128,M=3", ref_of("Loops")))
""")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=lambda number: number.name)
def test_all_ends_with_the_parent(number: signal.Signals, tmp_path: Path) -> None:
    """However the parent ends, in the middle of a job: server, keeper and worker are gone soon after."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment, text=True
    ) as parent:
        assert parent.stdout is not None
        pids = [int(text) for text in parent.stdout.readline().split()]
        assert len(pids) == 3
        time.sleep(0.3)
        assert all(processes.is_living(pid) for pid in pids)
        parent.send_signal(number)
        parent.wait(GONE_WITHIN)
    until = time.monotonic() + GONE_WITHIN
    while any(processes.is_living(pid) for pid in pids) and time.monotonic() < until:
        time.sleep(0.02)
    assert [processes.command(pid) for pid in pids if processes.is_living(pid)] == []


def test_messages_arrive_whole() -> None:
    """In whatever pieces; and what is no message is told from one."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        incoming, sent, found = Incoming(ours), framed(b"one") + framed(b"") + framed(b"three" * 100), []
        assert incoming.receive()
        for start in range(0, len(sent), 7):
            theirs.sendall(sent[start : start + 7])
            assert incoming.receive()
            found += incoming.messages()
        assert found == [b"one", b"", b"three" * 100]
        theirs.sendall(b"\xff" * 8)
        assert incoming.receive()
        with pytest.raises(NotAMessage):
            list(incoming.messages())
        theirs.close()
        assert not incoming.receive()


def test_settings_that_may_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch sets itself, and what is added to search paths."""
    monkeypatch.setenv("LD_LIBRARY_PATH", os.pathsep.join(["/one", "/two"]))
    before = Settings()
    monkeypatch.setenv("LD_LIBRARY_PATH", os.pathsep.join(["/library", "/one", "/two"]))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/somewhere")
    monkeypatch.syspath_prepend("/somewhere")
    assert before.changes(Settings()) == []
    monkeypatch.setenv("FP8MOE_SOMETHING", "1")
    assert before.changes(Settings()) == ["it changed os.environ['FP8MOE_SOMETHING'] from absent to '1'"]
    monkeypatch.delenv("FP8MOE_SOMETHING")
    for fewer in ("/one", os.pathsep.join(["/two", "/one"])):
        monkeypatch.setenv("LD_LIBRARY_PATH", fewer)
        (told,) = before.changes(Settings())
        assert (
            told == f"it changed os.environ['LD_LIBRARY_PATH'] from '{os.pathsep.join(['/one', '/two'])}' to '{fewer}'"
        )


def test_judges_that_nobody_touched() -> None:
    """They are what they were, and there are many."""
    judges = Judges()
    assert judges.replaced() == ""
    assert {"conformance.trial.Trial.call", "fp8moe.reference.recipe.recipe_moe", "conformance.bounds.judge"} <= {
        label for *_, label in judges._attributes
    }
