"""What a backend claims and what a level makes of it, asked in a worker; and what else a worker says of a backend."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from conformance.cases import Case
from conformance.contain import DeviceLost, Job, SubjectRef, SuiteError, Worker, WorkerEnded
from conformance.distributions import modules_of
from conformance.levels import Item, items_of, space_of
from conformance.not_here import NoDevice, UnknownBackend, surely_unknown
from conformance.plan import DEVICES, Cell, Subject, plan, resolve_target, target_name
from conformance.predicate import CONTRACT, predicate_results
from conformance.probe import probe_backend
from conformance.probe.backend import CHECK as FINGERPRINT
from conformance.probe.backend import LAYERS
from conformance.results import CheckResult, Status
from conformance.shrink import shrink
from fp8moe.detection import describe_device
from fp8moe.experts import FusedMoEPermuteExpertsUnpermute
from fp8moe.platforms import Platform
from fp8moe.registry import BackendUnavailable, Fp8MoeBackend
from fp8moe.texts import said, text_of

PLAN_SECONDS = 30.0
"""For the suite's own part of a plan, on top of what a backend has for its first job; it has taken 2 s on two cores."""
ONLY_AFTER_OTHERS = "it fails only after other calls of its process: the case passes in a fresh one"
Backend = Fp8MoeBackend | str | type[FusedMoEPermuteExpertsUnpermute]


class BadRequest(ValueError):
    """What `check_backend` was asked for cannot be: the text names the argument, the value and what is expected.

    Attributes:
        argument: its name, where a front end may have another one for it; "" elsewhere.
        value, told: the two parts of the rest.
    """

    argument = value = told = ""

    @classmethod
    def of(cls, argument: str, value: str, told: str) -> BadRequest:
        error = cls(f"{argument}={value!r}: {told}")
        error.argument, error.value, error.told = argument, value, told
        return error


class OtherCode(BadRequest):
    """A report to go on with is of other code of the backend than is here.

    Attributes:
        told: what differs.
    """

    def __init__(self, told: str) -> None:
        super().__init__(f"resume: a report of other code than is here: {told}; run it from the start")
        self.told = told


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
        modules: that the backend's class has its code in; none where it could not be loaded.
    """

    name: str
    device: str
    settled: Sequence[CheckResult]
    items: Sequence[Item]
    takes: Mapping[str, Sequence[str]]
    fnuz: bool
    modules: Sequence[str] = ()

    @classmethod
    def of(
        cls, worker: Worker, ref: SubjectRef, platform: Platform | None, level: str, seed: int, *, selects: bool = True
    ) -> Plan:
        """Asks a worker; `selects`: judge the backend's predicate too.

        Raises:
            BadRequest: no such backend, or the device is not there.
            conformance.contain.WorkerEnded: the backend's class did not let it come to its end.
        """
        asked = (ref, worker.target_name, platform, level, seed, selects)
        try:
            told: dict[str, Any] = worker.call(told_plan, *asked, seconds=PLAN_SECONDS + worker.limits.first)
        except NoDevice as error:
            raise BadRequest.of("device", *error.args) from None
        if "unknown" in told:
            raise BadRequest.of("backend", *told["unknown"])
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
    settled: list[CheckResult] = []
    cells: Sequence[Cell] = ()
    modules: Sequence[str] = ()
    try:
        subject = ref.load()
        modules = modules_of(subject.experts_cls)
        settled = predicate_results(subject) if selects else []
        if all(result.status is not Status.FAILED for result in settled):
            cells = plan([subject], target)
    except UnknownBackend as error:
        return {"unknown": error.args}
    except BackendUnavailable as error:
        settled.append(CheckResult("selects", CONTRACT, Status.NOT_RUN, ref.name, reason=text_of(error)))
    except BaseException as error:  # no Ctrl-C reaches a worker: this is the backend's own
        told = f"loading it, or asking what it takes, raised {said(error)}"
        settled.append(CheckResult("selects", CONTRACT, Status.FAILED, ref.name, reason=told))
    running = [cell for cell in cells if cell.status is None]
    settled += [
        CheckResult("computes", "computes.scheme", cell.status, ref.name, cell.scheme, reason=cell.reason)
        for cell in cells
        if cell.status is not None
    ]
    items = items_of(level, running, target, seed) if running else []
    return {
        "name": ref.name,
        "device": describe_device().name,
        "settled": [result.to_json() for result in settled],
        "items": [(item.check, str(item.case), item.part) for item in items],
        "takes": {cell.scheme: cell.activations for cell in running},
        "fnuz": bool(running) and True in space_of(running, target).values[-1],
        "modules": modules,
    }


def unknown_backend(ref: SubjectRef) -> tuple[str, str] | None:
    """In a worker: what `UnknownBackend` says of it; None where there is one, whatever its own code does."""
    try:
        ref.load()
    except UnknownBackend as error:
        return error.value, error.told
    except BaseException:  # no Ctrl-C reaches a worker: this is the backend's own
        return None
    return None


def fingerprint_of(worker: Worker, ref: SubjectRef) -> CheckResult:
    """The result of `computes.fingerprint`; that the worker did not come to its end is the backend's failure. Each
    layer that is probed has as long as a case, the first as long as a first one."""
    status = Status.NOT_RUN
    seconds = worker.limits.first + (LAYERS - 1) * worker.limits.seconds
    try:
        return CheckResult.from_json(worker.call(told_fingerprint, ref, worker.target_name, seconds=seconds))
    except WorkerEnded as ended:
        status, reason = Status.FAILED, str(ended)
    except DeviceLost as lost:
        reason = str(lost)
    except SuiteError as error:
        reason = f"an error of the suite itself: {error}"
    return CheckResult("computes", FINGERPRINT, status, ref.name, reason=reason)


def told_fingerprint(ref: SubjectRef, device: str) -> str:
    """In a worker: the result as JSON."""
    return probe_backend(ref.load(), resolve_target(device)).to_json()


def smallest(
    worker: Worker,
    ref: SubjectRef,
    failure: CheckResult,
    seconds: float,
    is_waived: Callable[[str, Case], object] = lambda check, case: False,
) -> CheckResult:
    """A failure's result on the smallest case on which the check still fails, as far as that is found in time; cases
    that are waived fail for a reason of their own, and are passed over."""
    last = failure

    def fails(case: Case) -> bool:
        nonlocal last
        if is_waived(failure.check, case):
            return False
        result = worker.run(Job(failure.check, str(case), ref))
        found = result.fails_like(failure)
        if found:
            last = result
        return found

    with suppress(DeviceLost, SuiteError):  # what was found stands, as large as it is
        shrink(Case.parse(failure.case), fails, keep=("scheme", "activation"), seconds=seconds)
    return last


def confirmed(worker: Worker, ref: SubjectRef, found: CheckResult, failure: CheckResult) -> CheckResult:
    """`found`, the small one, if a fresh process fails on it too, as whoever reproduces it will have one; else
    `failure`, which it was made from, and that says where a fresh process passes."""

    def fresh(result: CheckResult) -> Status:
        worker.restart()
        return worker.run(Job(result.check, result.case, ref)).status

    with suppress(DeviceLost, SuiteError):
        if found.case != failure.case:
            if fresh(found) is Status.FAILED:
                return found
            found = failure
        if fresh(failure) is Status.PASSED:
            return replace(failure, reason=f"{failure.reason}; {ONLY_AFTER_OTHERS}")
    return found


def no_plan(ref: SubjectRef, why: str) -> Plan:
    """Of a backend that cannot even be asked."""
    return Plan(ref.name, "", [CheckResult("selects", CONTRACT, Status.FAILED, ref.name, reason=why)], [], {}, False)


def device_name(device: str | None) -> str:
    """The name of a device that workers can be started for; a worker looks which one is here, where none is named.

    Raises:
        BadRequest: an unknown name.
    """
    if device not in (None, *DEVICES):
        raise BadRequest.of("device", str(device), f"expected one of {', '.join(DEVICES)}")
    if device not in (None, "auto"):
        return device
    with Worker("cpu") as looking:
        found: str = looking.call(target_name)
    return found


def reference_to(backend: Backend) -> SubjectRef:
    """What a worker finds a backend by.

    Raises:
        BadRequest: neither a name nor a class.
    """
    if isinstance(backend, type):
        origin = f"{backend.__module__}:{backend.__qualname__}"
        return SubjectRef.of(Subject(backend.__name__, backend, origin))
    name = backend if isinstance(backend, str) else getattr(backend, "name", None)
    if not isinstance(name, str):
        raise BadRequest(f"backend={backend!r}: expected a Fp8MoeBackend, a registered name, module:Class, or a class")
    return SubjectRef.named(name)


def reference_here(backend: Backend) -> SubjectRef:
    """The same, refused at once where no worker is needed to tell that there is no such backend.

    Raises:
        BadRequest: neither a name nor a class, or a name that nothing here has.
    """
    ref = reference_to(backend)
    unknown = surely_unknown(ref.origin)
    if unknown is not None:
        raise BadRequest.of("backend", *unknown.args)
    return ref
