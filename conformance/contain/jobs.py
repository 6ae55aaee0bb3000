"""What is asked of a worker: the job, the backend it names, the limits; and what can be raised instead of a result."""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import pickle
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import entry_points
from types import ModuleType

from conformance.class_at import class_at
from conformance.plan import Subject, load_subject
from fp8moe.experts import FusedMoEPermuteExpertsUnpermute, contract_violations
from fp8moe.registry import ENTRY_POINT_GROUP, BackendContractError


class SuiteError(Exception):
    """The suite's own code raised inside a worker; carries the worker's traceback. No verdict on any backend."""


class DeviceLost(Exception):
    """The device computes wrongly, or not at all, in a fresh worker too: nothing more can be judged on it."""


class Cancelled(Exception):
    """The run is being ended: what was asked is not waited for."""


class WorkerEnded(Exception):
    """A worker ended, or had to be ended, while it did what it was asked.

    Args:
        reason: what happened, as a result's reason says it.
        outside: it was a process of the suite's own that ended, whoever ended it.
        hung: it was ended because its time was up.
    """

    def __init__(self, reason: str, *, outside: bool = False, hung: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.outside = outside
        self.hung = hung


FIRST_SECONDS = 240.0
"""Of `Limits.first_seconds` in a run of a level: MARLIN's PTX, compiled by the driver, has taken 45 s on 16 cores."""


@dataclass(frozen=True)
class Limits:
    """What a worker may use.

    Args:
        seconds: for one job.
        first_seconds: for jobs of a backend that has answered none in this process, where a library may load or compile
            its kernels; not once a backend has run out of it. None: as any other.
        start_seconds: until a fresh worker has opened the device and proven it healthy.
        memory_bytes: host memory of the worker, or of any process below it, above what the worker had at its start;
            None: no limit.
        output_bytes: what one job may print.
    """

    seconds: float = 60.0
    first_seconds: float | None = None
    start_seconds: float = 120.0
    memory_bytes: int | None = 8 << 30
    output_bytes: int = 1 << 20

    @property
    def first(self) -> float:
        """Seconds for a job of a backend that has answered none."""
        return max(self.first_seconds or 0.0, self.seconds)


@dataclass(frozen=True)
class SubjectRef:
    """A backend that this process need not have imported.

    Args:
        name, origin: as `conformance.plan.Subject` has them.
        path: "module:Class" that leads to the class itself in a fresh process; "" where there is none.
        pickled: the class by value, where nothing else leads to it.
    """

    name: str
    origin: str
    path: str = ""
    pickled: bytes = b""

    @classmethod
    def of(cls, subject: Subject) -> SubjectRef:
        """Of a backend that is there.

        Raises:
            RuntimeError: the class can only travel by value, and cloudpickle, which does that, is not installed or
                cannot do it.
        """
        by_name = cls.importable(subject)
        return by_name or cls(subject.name, subject.origin, pickled=_by_value(subject.experts_cls))

    @classmethod
    def importable(cls, subject: Subject) -> SubjectRef | None:
        """Of a backend whose class a fresh process imports by its name; None where there is no such name."""
        found = subject.experts_cls
        own = f"{found.__module__}:{found.__qualname__}"  # a class that a function made has another name than this
        for path in (own, subject.origin, *_entry_points(subject.name)):
            if _leads_to(path, found):
                return cls(subject.name, subject.origin, path)
        return None

    @classmethod
    def named(cls, origin: str) -> SubjectRef:
        """By what `--fp8moe-backend` takes, without an import of it here."""
        path = origin if ":" in origin else ""
        return cls(origin.partition(":")[2] or origin, origin, path)

    def load(self) -> Subject:
        """The backend; only a worker calls this, since it runs the backend's code.

        Raises:
            UnknownBackend: there is none.
            BackendContractError: the class breaks the contract.
            Exception: whatever the backend's module raises.
        """
        if not self.path and not self.pickled:
            return load_subject(self.origin)
        found: object = pickle.loads(self.pickled) if self.pickled else class_at(self.path)
        violations = contract_violations(found)
        if violations:
            raise BackendContractError(f"{self.origin}: {'; '.join(violations)}")
        assert isinstance(found, type)
        return Subject(self.name, found, self.origin)


@dataclass(frozen=True)
class Job:
    """One check of one case on one backend.

    Args:
        check: the check's id.
        case: the case's id.
    """

    check: str
    case: str
    subject: SubjectRef


def _at(path: str) -> object:
    module, _, names = path.partition(":")
    found: object = importlib.import_module(module)
    for name in names.split("."):
        found = getattr(found, name)
    return found


def _entry_points(name: str) -> list[str]:
    points = entry_points(group=ENTRY_POINT_GROUP, name=name)
    return [point.value.partition("[")[0].replace(" ", "") for point in points]


def _leads_to(path: str, cls: type[FusedMoEPermuteExpertsUnpermute]) -> bool:
    """Whether "module:Class" leads to this very class in a fresh process with the same `sys.path`."""
    name, _, names = path.partition(":")
    module = sys.modules.get(name)
    if module is None or name == "__main__" or not names or "<locals>" in names:
        return False
    try:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None or spec.origin != getattr(module, "__file__", None):
            return False
        return _from_path(name) and _at(path) is cls
    except (ImportError, AttributeError, ValueError):
        return False


def _from_path(name: str) -> bool:
    """Whether `sys.path` or an editable install leads to a module: pytest, for one, puts modules into `sys.modules` to
    which neither does."""
    found = None
    search = None
    parts = name.split(".")
    for depth in range(1, len(parts) + 1):
        found = _found(".".join(parts[:depth]), search)
        if found is None:
            return False
        search = list(found.submodule_search_locations or ())
    return found is not None and found.origin == getattr(sys.modules[name], "__file__", None)


def _found(name: str, search: list[str] | None) -> importlib.machinery.ModuleSpec | None:
    """By the finders that a fresh process has as well: what a build tool puts there for an editable install is called
    so by setuptools, meson-python and scikit-build-core alike."""
    for finder in sys.meta_path:
        kind = finder if isinstance(finder, type) else type(finder)
        if kind is importlib.machinery.PathFinder or "editable" in kind.__module__:
            found = finder.find_spec(name, search)
            if found is not None:
                return found
    return None


def _by_value(cls: type[FusedMoEPermuteExpertsUnpermute]) -> bytes:
    try:
        import cloudpickle
    except ImportError as error:
        raise RuntimeError(
            f"{cls.__module__}.{cls.__qualname__} cannot be imported by name in a process of its own, so it travels by "
            "value, which takes the package cloudpickle: pip install cloudpickle, or put the class at the top of a "
            "module on the import path"
        ) from error
    with _its_module_by_value(cls):
        try:
            return bytes(cloudpickle.dumps(cls))
        except Exception as error:  # what a class drags along may refuse in any way
            raise RuntimeError(f"{cls.__module__}.{cls.__qualname__} cannot travel by value: {error}") from error


@contextmanager
def _its_module_by_value(cls: type) -> Iterator[None]:
    """Where a fresh process does not find the module, whatever the class takes from it travels along."""
    import cloudpickle

    module: ModuleType | None = sys.modules.get(cls.__module__)
    if module is None or cls.__module__ == "__main__" or _from_path(cls.__module__):
        yield
        return
    cloudpickle.register_pickle_by_value(module)
    try:
        yield
    finally:
        cloudpickle.unregister_pickle_by_value(module)
