"""Which distribution brings a backend, and in which version: what a waiver's range is about.

registered by an entry point        the distribution of the entry point
an adapter of a kernel library      the library's distribution, as the kernels are what it judges
another class of this package       fp8moe
any other class                     the distribution that brings its module; fp8moe, whose contract it keeps, where
                                    none does
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.version import InvalidVersion, Version

from conformance.contain import DeviceLost, SubjectRef, SuiteError, Worker, WorkerEnded
from conformance.distributions import bringing
from conformance.plan import Subject
from conformance.planned import reference_to
from conformance.report import Report
from fp8moe import __version__
from fp8moe.backends.libraries import LibraryBackend
from fp8moe.libraries import DISTRIBUTIONS, VLLM_OPS, Surroundings, vllms_deep_gemm
from fp8moe.registry import Fp8MoeBackend, registered_backends

SECONDS = 30.0
"""For the suite's own part of the question, on top of what a backend has for its first job."""
OWN = "fp8moe"
OURS = (OWN, "conformance")
LIBRARIES = {
    Fp8MoeBackend.AITER: "aiter",
    Fp8MoeBackend.FLASHINFER_TRTLLM: "flashinfer",
    Fp8MoeBackend.FLASHINFER_CUTLASS: "flashinfer",
    Fp8MoeBackend.DEEPGEMM: "deep_gemm",
    Fp8MoeBackend.BATCHED_DEEPGEMM: "deep_gemm",
    Fp8MoeBackend.VLLM_CUTLASS: "vllm",
    Fp8MoeBackend.BATCHED_VLLM_CUTLASS: "vllm",
    Fp8MoeBackend.MARLIN: "vllm",
    Fp8MoeBackend.XPU: "vllm_xpu_kernels",
}
"""Whose kernels an adapter runs, by the names of `fp8moe.libraries`."""


@dataclass(frozen=True)
class Release:
    """A distribution in a version; `why` says why there is no version, where `version` is ""."""

    distribution: str
    version: str = ""
    why: str = ""

    def __str__(self) -> str:
        return f"{self.distribution} {self.version}" if self.version else f"{self.distribution} ({self.why})"


def release_here(report: Report) -> Release:
    """Of a report's backend, in a process on the device that is here."""
    with Worker(report.target) as worker:
        return release_of(worker, reference_to(report.origin))


def release_of(worker: Worker, ref: SubjectRef) -> Release:
    """Of a backend that this process need not have imported; that it cannot be asked leaves it without a version."""
    try:
        return Release(*worker.call(told_release, ref, seconds=SECONDS + worker.limits.first))
    except (WorkerEnded, DeviceLost, SuiteError) as error:
        return Release(ref.name, why=str(error).strip().splitlines()[-1])


def told_release(ref: SubjectRef) -> Sequence[str]:
    """In a worker: the fields of `Release`."""
    try:
        registered = {spec.name: spec.distribution for spec in registered_backends()}
        found = release(ref.load(), registered)
    except (Exception, SystemExit) as error:
        found = Release(ref.name, why=f"looking for it raised {type(error).__name__}: {error}")
    return found.distribution, found.version, found.why


def release(subject: Subject, registered: Mapping[str, str | None], env: Mapping[str, str] = os.environ) -> Release:
    """What brings a backend.

    Args:
        registered: the distributions of backends from outside the tree, by name.
    """
    named = registered.get(subject.origin)
    if named is not None:
        return _of(named)
    cls = subject.experts_cls
    package = cls.__module__.partition(".")[0]
    if package in OURS:
        return _of_library(LIBRARIES[cls.backend], env) if issubclass(cls, LibraryBackend) else _own()
    file = getattr(sys.modules.get(cls.__module__), "__file__", None)
    return next(map(_of, bringing(package, Path(file).resolve())), _own()) if file else _own()


def _own() -> Release:
    return Release(OWN, __version__)


def _of(name: str) -> Release:
    try:
        return _versioned(name, distribution(name).version)
    except PackageNotFoundError:
        return Release(name, why="it is not installed")


def _versioned(name: str, version: str) -> Release:
    try:
        Version(version)
    except (InvalidVersion, TypeError):
        return Release(name, why=f"its version is {version!r}, which no range can be compared with")
    return Release(name, version)


def _of_library(library: str, env: Mapping[str, str]) -> Release:
    names = DISTRIBUTIONS[library]
    if library == "vllm" and env.get(VLLM_OPS):
        return Release(library, why=f"its operators come from the folder in {VLLM_OPS}, which tells no version")
    version = Surroundings().version(*names)
    if version is None and library == "deep_gemm" and vllms_deep_gemm() is not None:
        names, version = DISTRIBUTIONS["vllm"], Surroundings().version(*DISTRIBUTIONS["vllm"])
    if version is None:
        return Release(names[0], why="it is not installed")
    return _versioned(names[0], version)
