"""Backends that misbehave, one way each, on any device; and what a worker has to say of each."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from conformance.contain import processes
from conformance.contain.jobs import SubjectRef
from conformance.results import Status
from fp8moe.backends.torch_experts import TorchExperts

LONG = 3600.0
SLEEPERS = 100
"""More than a worker may start."""


@dataclass(frozen=True)
class Fault:
    """One way to misbehave.

    Args:
        kind: in words.
        ref: the backend.
        told: what the reason of the result must contain.
        weight: how often it is drawn, against others.
        status: of the result.
    """

    kind: str
    ref: SubjectRef
    told: str
    weight: float = 1.0
    status: Status = Status.FAILED


class Misbehaving(TorchExperts):
    """Honest, but for what `misbehave` does before each call and `spoil` does to its result."""

    def apply(self, hidden_states: Tensor, topk_weights: Tensor, topk_ids: Tensor, **keywords: Any) -> Tensor:
        self.misbehave()
        self.given = hidden_states
        spoiled: Tensor = self.spoil(super().apply(hidden_states, topk_weights, topk_ids, **keywords))
        return spoiled

    def misbehave(self) -> None:
        """Before the result is computed."""

    def spoil(self, result: Tensor) -> Any:
        return result


class RaisesAnew(Exception):
    """An exception without a text: asking for it raises another."""

    def __str__(self) -> str:
        raise ValueError("no text")


class OutOfReach(BaseException):
    """No `Exception`, so that a guard against those does not catch it."""


class Touchy(Tensor):
    """Raises whenever torch is asked something about it."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        raise RuntimeError("hands off")


def _raising(error: BaseException) -> Callable[[], None]:
    def misbehave() -> None:
        raise error

    return misbehave


def _loop() -> None:
    while True:
        pass


def _hold_interpreter() -> None:
    ctypes.PyDLL(None).sleep(int(LONG))  # a PyDLL does not release Python's lock


def _allocate() -> None:
    kept = []
    while True:
        kept.append(b"\1" * (1 << 24))


def _print_on() -> None:
    while True:
        print("still here " * 100)


def _write_on() -> None:
    while True:
        os.write(2, b"still here " * 100)


def _fork_and_return() -> None:
    os.fork()


def _fork_in_c() -> None:
    ctypes.CDLL(None).fork()


def _leave_daemon() -> None:
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            for descriptor in range(3, 64):
                try:
                    os.close(descriptor)
                except OSError:
                    continue
            time.sleep(LONG)
        os._exit(0)
    os.wait()


def _leave_command() -> None:
    subprocess.Popen([sys.executable, "-c", f"import time; time.sleep({LONG})"])


def _start_many() -> None:
    started = [subprocess.Popen(["sleep", str(LONG)]) for _ in range(SLEEPERS)]
    started[0].wait()


def _scribble() -> None:
    """Bytes into every socket that is open."""
    for name in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                os.write(int(name), b"\0\0\0\2{}" + b"scribble")
        except OSError:
            continue


def _kill_server() -> None:
    os.kill(processes.parent(os.getppid()), signal.SIGKILL)


def _replace_code() -> None:
    from conformance.bounds import judge

    judge.__code__ = (lambda *arguments: None).__code__


def _replace_check() -> None:
    from dataclasses import replace

    from conformance import checks

    table: Any = checks.CHECKS
    table[checks.EQUIVALENCE] = replace(checks.CHECKS[checks.EQUIVALENCE], run=lambda trial: None)


def _replaced(path: str, value: object) -> Callable[[], None]:
    module, _, names = path.partition(":")
    *owners, last = names.split(".")

    def misbehave() -> None:
        __import__(module)
        owner: Any = sys.modules[module]
        for name in owners:
            owner = getattr(owner, name)
        setattr(owner, last, value)

    return misbehave


def _backend_flag(path: str, value: object) -> Callable[[], None]:
    def misbehave() -> None:
        owner: Any = torch.backends
        *owners, last = path.split(".")
        for name in owners:
            owner = getattr(owner, name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            setattr(owner, last, value)

    return misbehave


def _other_precision() -> None:
    torch.set_float32_matmul_precision("medium" if torch.get_float32_matmul_precision() != "medium" else "high")


_BEFORE: Mapping[str, tuple[str, Callable[[], object], str, float]] = {
    # class name: (kind, what it does before it computes, what the reason must contain, weight)
    "Segfaults": ("segmentation fault", lambda: ctypes.string_at(0), "SIGSEGV", 1),
    "Aborts": ("abort", os.abort, "SIGABRT", 1),
    "KillsItself": ("kills itself", lambda: os.kill(os.getpid(), signal.SIGKILL), "SIGKILL", 1),
    "KillsItsGroup": ("kills its process group", lambda: os.killpg(0, signal.SIGKILL), "SIGKILL", 1),
    "StopsItself": ("stops itself", lambda: os.kill(os.getpid(), signal.SIGSTOP), "did not end within", 0.3),
    "ExitsAsIfWell": ("os._exit(0)", lambda: os._exit(0), "ended the process with status 0", 1),
    "ExitsWith3": ("os._exit(3)", lambda: os._exit(3), "ended the process with status 3", 1),
    "SysExits": ("sys.exit", lambda: sys.exit(0), "SystemExit", 1),
    "Loops": ("endless loop in Python", _loop, "did not end within", 0.3),
    "Sleeps": ("sleeps for ever", lambda: time.sleep(LONG), "did not end within", 0.3),
    "HoldsTheInterpreter": ("waits in C, holding Python's lock", _hold_interpreter, "did not end within", 0.3),
    "Allocates": ("allocates without end", _allocate, "of host memory", 0.5),
    "RaisesMemoryError": ("MemoryError", _raising(MemoryError()), "MemoryError", 1),
    "Prints": ("prints without end", _print_on, "printed more than", 1),
    "Writes": ("writes to stderr without end", _write_on, "printed more than", 1),
    "Forks": ("a forked child that returns too", _fork_and_return, "left a child process", 0.5),
    "ForksInC": ("a child forked by libc that returns too", _fork_in_c, "left a child process", 0.5),
    "LeavesADaemon": ("leaves a daemon", _leave_daemon, "left a child process", 0.5),
    "LeavesACommand": ("leaves a command running", _leave_command, "left a child process", 0.5),
    "StartsMany": ("starts many processes", _start_many, "processes", 0.2),
    "Scribbles": ("writes into the suite's channel", _scribble, "the suite's channel", 1),
    "ClosesDescriptors": (
        "closes every descriptor",
        lambda: os.closerange(3, 1 << 16),
        "closed the suite's channel",
        1,
    ),
    "KillsItsParent": ("kills its parent", lambda: os.kill(os.getppid(), signal.SIGKILL), "watches over", 0.5),
    "StopsItsParent": ("stops its parent", lambda: os.kill(os.getppid(), signal.SIGSTOP), "watches over", 0.2),
    "KillsTheServer": ("kills its parent's parent", _kill_server, "forked from was killed", 0.1),
    "ReplacesJudge": (
        "replaces the judge",
        _replaced("conformance.bounds:judge", lambda *arguments: None),
        "it replaced conformance.bounds.judge",
        1,
    ),
    "ReplacesWatch": (
        "replaces the watch over inputs",
        _replaced("conformance.untouched:Watch.changed", lambda self: ""),
        "it replaced conformance.untouched.Watch.changed",
        1,
    ),
    "ReplacesCode": ("replaces the judge's code", _replace_code, "it replaced conformance.bounds", 1),
    "ReplacesACheck": ("replaces a check", _replace_check, "it replaced conformance.checks.CHECKS", 1),
    "ReplacesTorchEqual": ("replaces torch.equal", _replaced("torch:equal", lambda a, b: True), "torch.equal", 1),
    "ReplacesTensorAbs": ("replaces Tensor.abs", _replaced("torch:Tensor.abs", lambda self: self), "Tensor.abs", 1),
    "Raises": ("an exception", _raising(ValueError("no")), "apply raised ValueError", 1),
    "RaisesWithoutText": ("an exception whose text raises", _raising(RaisesAnew()), "its text raised", 1),
    "RaisesKeyboardInterrupt": ("KeyboardInterrupt", _raising(KeyboardInterrupt()), "KeyboardInterrupt", 1),
    "RaisesGeneratorExit": ("GeneratorExit", _raising(GeneratorExit()), "GeneratorExit", 1),
    "RaisesBaseException": ("a BaseException", _raising(OutOfReach()), "OutOfReach", 1),
    "SetsDtype": ("default dtype", lambda: torch.set_default_dtype(torch.float64), "default dtype", 1),
    "SetsDevice": ("default device", lambda: torch.set_default_device("meta"), "default device", 1),
    "SetsGrad": ("grad mode", lambda: torch.set_grad_enabled(False), "grad mode", 1),
    "SetsAnomaly": ("anomaly mode", lambda: torch.autograd.set_detect_anomaly(True), "anomaly mode", 1),
    "SetsDeterministic": (
        "deterministic algorithms",
        lambda: torch._C._set_deterministic_algorithms(True, warn_only=True),
        "deterministic algorithms",
        1,
    ),
    "SetsTf32": ("TF32", _backend_flag("cuda.matmul.allow_tf32", True), "allow_tf32", 1),
    "SetsReduced": (
        "reduced precision in bf16 products",
        _backend_flag("cuda.matmul.allow_bf16_reduced_precision_reduction", False),
        "allow_bf16_reduced_precision_reduction",
        1,
    ),
    "SetsPrecision": ("float32 matmul precision", _other_precision, "float32 matmul precision", 1),
    "SetsThreads": ("number of threads", lambda: torch.set_num_threads(2), "number of threads", 1),
    "SetsFlush": ("flush denormal", lambda: torch.set_flush_denormal(True), "flushed to zero", 1),
    "SetsBenchmark": ("cuDNN benchmark", _backend_flag("cudnn.benchmark", True), "cudnn.benchmark", 1),
    "SetsEnvironment": (
        "os.environ",
        lambda: os.environ.update(OMP_WAIT_POLICY="active"),
        "os.environ['OMP_WAIT_POLICY']",
        1,
    ),
    "SetsDirectory": ("working directory", lambda: os.chdir("/"), "working directory", 1),
    "SetsHandler": ("signal handler", lambda: signal.signal(signal.SIGTERM, signal.SIG_IGN), "SIGTERM", 1),
    "SetsTrace": ("trace function", lambda: sys.setprofile(lambda *arguments: None), "sys.getprofile", 1),
}

_AFTER: Mapping[str, tuple[str, Callable[[Any, Tensor], object], str]] = {
    # class name: (kind, what it makes of its result, what the reason must contain)
    "WrongDtype": ("wrong dtype", lambda self, result: result.double(), "returned dtype"),
    "WrongShape": ("wrong shape", lambda self, result: result[:-1], "returned shape"),
    "WrongDevice": ("wrong device", lambda self, result: result.to("meta"), "returned device"),
    "ReturnsNone": ("returns None", lambda self, result: None, "NoneType"),
    "ReturnsInput": (
        "returns a view of its input",
        lambda self, result: self.given.view_as(self.given),
        "of its input",
    ),
    "ReturnsTouchy": ("a tensor that raises", lambda self, result: result.as_subclass(Touchy), "Touchy"),
    "ChangesInput": ("changes its input", lambda self, result: (self.given.neg_(), result)[1], "changed its input"),
    "WrongValues": ("wrong values", lambda self, result: result * 2, ""),
}


class ConstructorRaises(TorchExperts):
    def __init__(self, *arguments: Any) -> None:
        raise RuntimeError("not today")


class ConstructorHangs(TorchExperts):
    def __init__(self, *arguments: Any) -> None:
        time.sleep(LONG)


class LeavesAThread(Misbehaving):
    """Not convicted: many an honest library does so. It is noted."""

    def misbehave(self) -> None:
        import threading

        threading.Thread(target=time.sleep, args=(LONG,), daemon=True).start()


def _doing(body: Callable[[], object]) -> Callable[[Misbehaving], None]:
    def misbehave(self: Misbehaving) -> None:
        body()

    return misbehave


def _made(name: str, **members: object) -> SubjectRef:
    globals()[name] = type(name, (Misbehaving,), {"__module__": __name__, **members})
    return ref_of(name)


def ref_of(name: str, module: str = __name__) -> SubjectRef:
    """A class of this file, or of another, by name."""
    return SubjectRef.named(f"{module}:{name}")


FAULTS: tuple[Fault, ...] = (
    *(
        Fault(kind, _made(name, misbehave=_doing(body)), told, weight)
        for name, (kind, body, told, weight) in _BEFORE.items()
    ),
    *(Fault(kind, _made(name, spoil=body), told) for name, (kind, body, told) in _AFTER.items()),
    Fault("constructor raises", ref_of("ConstructorRaises"), "its constructor raised RuntimeError"),
    Fault("constructor hangs", ref_of("ConstructorHangs"), "did not end within", 0.3),
    Fault("its module is not there", ref_of("Anything", "no_such_module"), "there is no module no_such_module"),
    Fault("its class is not there", ref_of("NoSuchClass"), "has no NoSuchClass"),
    Fault("not a backend", ref_of("LONG"), "expected a subclass of"),
    Fault("cannot be unpickled", SubjectRef("Junk", "junk:Junk", pickled=b"junk"), "loading it raised UnpicklingError"),
)
"""Every way to misbehave that needs no GPU."""
