"""What a run will do: the device, the backends, and for every (backend, scheme) whether it runs, and if not, why."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from conformance.cases import SCHEME_NAMES
from conformance.class_at import class_at
from conformance.not_here import REFERENCES, NoDevice, UnknownBackend
from conformance.results import Evidence, Status
from fp8moe.backends import torch_experts
from fp8moe.config import (
    ACTIVATIONS,
    FusedMoEActivationFormat,
    FusedMoEConfig,
    FusedMoEParallelConfig,
    RoutingMethodType,
)
from fp8moe.envs import Env
from fp8moe.experts import FusedMoEPermuteExpertsUnpermute, contract_violations
from fp8moe.platforms import PLATFORMS, Platform, detected_platform
from fp8moe.registry import (
    BackendContractError,
    BackendSpec,
    backend_named,
    broken_plug_ins,
    registered_backends,
    seed_backends,
)
from fp8moe.schemes import SCHEMES
from fp8moe.texts import said

DEVICES = ("auto", "cpu", "interpreter", "cuda", "rocm", "xpu")
SIMULATED_PLATFORM = PLATFORMS["h100"]
"""What the interpreter stands for: our kernels' support is asked for this device."""


@dataclass(frozen=True)
class Target:
    """Where a run takes place: the platform that selection is asked about, and torch's device for the tensors."""

    name: str
    platform: Platform
    device: str

    @property
    def interpreter(self) -> bool:
        """Triton's kernels run in its interpreter."""
        return self.device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"


def resolve_target(name: str = "auto") -> Target:
    """The device to run on. Without a GPU, Triton's interpreter is switched on: before triton is first imported.

    Raises:
        NoDevice: (a ValueError) an unknown name, or a device that is not there.
    """
    if name not in DEVICES:
        raise NoDevice(name, f"expected one of {', '.join(DEVICES)}")
    here = detected_platform()
    if name == "auto":
        name = here.kind if here.kind in ("cuda", "rocm", "xpu") else "interpreter"
    if name in ("cuda", "rocm", "xpu"):
        if here.kind != name:
            raise NoDevice(name, f"torch {torch.__version__} sees a {here.kind} device here")
        return Target(name, here, "xpu" if name == "xpu" else "cuda")
    if name == "interpreter":
        os.environ["TRITON_INTERPRET"] = "1"
    if os.environ.get("TRITON_INTERPRET") == "1":
        name = "interpreter"  # whatever it was called: this is what brings the same run about again
    return Target(name, here if here.kind == "cpu" else PLATFORMS["cpu"], "cpu")


def target_name(device: str = "auto") -> str:
    """The name of the device that `device` comes to here; for a worker to answer, since it looks at the device."""
    return resolve_target(device).name


PROBED_SIZES: tuple[dict[str, Any], ...] = (
    {},
    {"hidden_dim": 7168, "intermediate_size_per_partition": 2048},
    {"hidden_dim": 512, "intermediate_size_per_partition": 384, "num_experts": 64, "num_local_experts": 64},
)
"""Layers that a predicate is asked about; a scheme that it takes for any of them runs, and each case is asked again."""


def default_workers(target: str) -> int:
    """Processes that run cases at the same time: two on a CPU with two cores; four share a GPU, which small cases
    leave idle while the host prepares them."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(2 if target in ("cpu", "interpreter") else 4, cores)


@dataclass(frozen=True)
class Subject:
    """A backend under test. `origin` is what `--fp8moe-backend` takes to name it again."""

    name: str
    experts_cls: type[FusedMoEPermuteExpertsUnpermute]
    origin: str


def load_subject(text: str) -> Subject:
    """A backend by name, or a class by "module:Class".

    Raises:
        UnknownBackend: (a ValueError) no such backend, module or class; the text says which are there.
        BackendContractError: the class breaks the contract, or its module raises.
    """
    for subject in reference_subjects():
        if text == subject.name:
            return subject
    if ":" not in text:
        try:
            spec = backend_named(text)
        except KeyError:
            known = [*(subject.name for subject in default_subjects()), *(each.name for each in broken_plug_ins())]
            raise UnknownBackend.of(text, dict.fromkeys(known)) from None
        return Subject(spec.name, spec.experts_cls, text)
    try:
        found = class_at(text)
    except UnknownBackend:
        raise
    except (Exception, SystemExit) as error:
        raise BackendContractError(f"{text}: importing it raised {said(error)}") from error
    violations = contract_violations(found)
    if violations:
        raise BackendContractError(f"{text}: {'; '.join(violations)}")
    return Subject(text.partition(":")[2], found, text)


def _subject(spec: BackendSpec) -> Subject:
    return Subject(spec.name, spec.experts_cls, spec.name)


def reference_subjects() -> tuple[Subject, ...]:
    """Our honest backends in plain PyTorch: in no selection list, and able to run everywhere."""
    return tuple(Subject(name, getattr(torch_experts, name), name) for name in REFERENCES)


def default_subjects() -> tuple[Subject, ...]:
    """The eleven, those registered from outside the tree, and the plain PyTorch backends."""
    return (*map(_subject, (*seed_backends(), *registered_backends())), *reference_subjects())


@dataclass(frozen=True)
class Cell:
    """One backend on one scheme. `status` is None where it runs; `activations` are those it takes."""

    subject: Subject
    scheme: str
    status: Status | None
    reason: str
    evidence: Evidence | None
    activations: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        return f"{self.subject.name}-{self.scheme}"


def plan(
    subjects: Sequence[Subject], target: Target, schemes: Sequence[str] = SCHEME_NAMES, *, named: bool = True
) -> list[Cell]:
    """Every (backend, scheme), in order.

    Args:
        named: each of them was asked for. Otherwise those in plain PyTorch do not run on a GPU, where pinned cases
            alone take 13 s a scheme.
    """
    return [_cell(subject, scheme, target, named) for subject in subjects for scheme in schemes]


def _cell(subject: Subject, scheme: str, target: Target, named: bool) -> Cell:
    cls = subject.experts_cls
    if subject.name in REFERENCES and not named and target.device != "cpu":
        reason = f"plain PyTorch: it runs on a GPU where it is named, --fp8moe-backend={subject.name}"
        return Cell(subject, scheme, Status.NOT_RUN, reason, None)
    simulated = is_simulated(cls, target)
    platform = SIMULATED_PLATFORM if simulated else target.platform
    activations = tuple(name for name in ACTIVATIONS if _refusal(cls, scheme, name, platform) is None)
    if not activations:
        refused = _refusal(cls, scheme, "silu", platform)
        return Cell(subject, scheme, Status.NOT_SUPPORTED, str(refused), None)
    if simulated and not target.interpreter:
        return Cell(subject, scheme, Status.NOT_RUN, "no GPU here; the device interpreter simulates one", None)
    evidence = Evidence.SIMULATED if simulated else Evidence.HARDWARE
    return Cell(subject, scheme, None, "", evidence, activations)


def is_simulated(cls: type[FusedMoEPermuteExpertsUnpermute], target: Target) -> bool:
    """Whether its kernels can only run in the interpreter there."""
    return is_triton(cls) and target.device == "cpu"


def is_triton(cls: type[FusedMoEPermuteExpertsUnpermute]) -> bool:
    """Ours, or derived from it: what the interpreter can stand in for."""
    from fp8moe.backends.triton_stages import TritonStages

    return issubclass(cls, TritonStages)


def _refusal(
    cls: type[FusedMoEPermuteExpertsUnpermute], scheme: str, activation: str, platform: Platform
) -> str | None:
    """Why the class does not take this scheme and activation, asked in its own format; None where it does."""
    batched = cls.activation_format() is FusedMoEActivationFormat.BatchedExperts
    refusals = []
    for sizes in PROBED_SIZES:
        config = replace(probe_config(activation, batched=batched), **sizes)
        supported, reason = cls.is_supported_config(
            cls, config, *SCHEMES[scheme], cls.activation_format(), platform=platform, env=Env.of({})
        )
        if supported:
            return None
        refusals.append(getattr(reason, "value", str(reason)))
    return refusals[0]


def probe_config(activation: str, *, batched: bool) -> FusedMoEConfig:
    """A small layer to ask a predicate about; `batched`: under a parallelism that batches tokens by expert."""
    parallel = FusedMoEParallelConfig.make(
        dp_size=2 if batched else 1, enable_expert_parallel=batched, all2all_backend="deepep_low_latency"
    )
    plain = FusedMoEConfig(8, 2, 256, 256, 8, "silu", "cpu", RoutingMethodType.Renormalize, parallel, torch.bfloat16)
    return replace(plain, activation=activation, is_act_and_mul=not activation.endswith("_no_mul"))
