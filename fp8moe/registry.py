"""The backends: names, reasons, specs, the order in which they are considered, and how others join them."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from fp8moe.plug_ins import BrokenPlugIn, strict, told_if_slow, warn_of
from fp8moe.texts import said, visible

if TYPE_CHECKING:
    from fp8moe.experts import FusedMoEPermuteExpertsUnpermute

ENTRY_POINT_GROUP = "fp8moe.backends"
UNKNOWN = "an unknown distribution"
MOST_OF_A_NAME = 100
PLAIN = "a backend of fp8moe in plain PyTorch"
RESERVED = {"NONE": "'no backend'", "TORCHEXPERTS": PLAIN, "BATCHEDTORCHEXPERTS": PLAIN}
"""What names mean that no backend has, in capitals, since case does not count."""


class Fp8MoeBackend(Enum):
    """The eleven FP8 MoE backends of the specification, and NONE; values equal names."""

    NONE = "NONE"
    AITER = "AITER"
    FLASHINFER_TRTLLM = "FLASHINFER_TRTLLM"
    FLASHINFER_CUTLASS = "FLASHINFER_CUTLASS"
    DEEPGEMM = "DEEPGEMM"
    BATCHED_DEEPGEMM = "BATCHED_DEEPGEMM"
    VLLM_CUTLASS = "VLLM_CUTLASS"
    BATCHED_VLLM_CUTLASS = "BATCHED_VLLM_CUTLASS"
    TRITON = "TRITON"
    BATCHED_TRITON = "BATCHED_TRITON"
    MARLIN = "MARLIN"
    XPU = "XPU"


@dataclass(frozen=True, order=True)
class OutOfTreeBackend:
    """A backend that somebody else registered; used like a member of `Fp8MoeBackend`."""

    name: str

    @property
    def value(self) -> str:
        return self.name


AnyBackend = Fp8MoeBackend | OutOfTreeBackend


class Reason(Enum):
    """Why a backend is refused; the first that applies, in the order of the specification's section 2."""

    DEVICE = "DEVICE"
    GATING = "GATING"
    ACTIVATION = "ACTIVATION"
    SCHEME = "SCHEME"
    PARALLEL = "PARALLEL"
    ROUTING = "ROUTING"
    FORMAT = "FORMAT"
    LOGITS_DTYPE = "LOGITS_DTYPE"
    DISABLED_BY_ENV = "DISABLED_BY_ENV"
    NOT_ALLOWED = "NOT_ALLOWED"


class BackendUnavailable(RuntimeError):
    """A backend cannot be constructed here: its library, its device, or its adapter is missing."""


class LayerNotSupported(BackendUnavailable):
    """A backend's constructor refuses this layer (a size, a dtype, biases), which its predicate does not look at or
    takes; on the same device it takes others. The text names the limit."""


class BackendContractError(TypeError):
    """A backend's class or registration does not keep the contract of `experts.py`."""


@dataclass(frozen=True)
class Position:
    """Where a registered backend stands in the order: right before, or right after, a named one."""

    before: str | None = None
    after: str | None = None

    def __post_init__(self) -> None:
        if (self.before is None) == (self.after is None):
            raise ValueError(f"Position(before={self.before!r}, after={self.after!r}): expected exactly one of the two")


@dataclass(frozen=True)
class BackendSpec:
    """One candidate of the selector.

    Args:
        name: what users write; for the eleven, the value of their `Fp8MoeBackend`.
        experts_cls: the class that computes, a `FusedMoEPermuteExpertsUnpermute`.
        position: where it stands in the order of a scan; None means that it is never scanned, only named.
        returns_class: False for FLASHINFER_TRTLLM, for which `select` returns no class.
        distribution: the package that registered it, for error messages.
    """

    name: str
    experts_cls: type[FusedMoEPermuteExpertsUnpermute]
    position: Position | None = None
    returns_class: bool = True
    distribution: str | None = None

    @property
    def backend(self) -> AnyBackend:
        """The object that `select` returns for this candidate."""
        return Fp8MoeBackend[self.name] if self.name in Fp8MoeBackend.__members__ else OutOfTreeBackend(self.name)


# The seed's order (specification section 1.1). A class is imported when the registry is first asked.
SEED_ORDER = (
    ("AITER", "fp8moe.backends.aiter", "AiterExperts"),
    ("FLASHINFER_TRTLLM", "fp8moe.backends.flashinfer_trtllm", "FlashInferTrtllmExperts"),
    ("FLASHINFER_CUTLASS", "fp8moe.backends.flashinfer_cutlass", "FlashInferCutlassExperts"),
    ("DEEPGEMM", "fp8moe.backends.deepgemm", "DeepGemmExperts"),
    ("BATCHED_DEEPGEMM", "fp8moe.backends.batched_deepgemm", "BatchedDeepGemmExperts"),
    ("VLLM_CUTLASS", "fp8moe.backends.vllm_cutlass", "VllmCutlassExperts"),
    ("BATCHED_VLLM_CUTLASS", "fp8moe.backends.batched_vllm_cutlass", "BatchedVllmCutlassExperts"),
    ("TRITON", "fp8moe.backends.triton_experts", "TritonExperts"),
    ("BATCHED_TRITON", "fp8moe.backends.batched_triton", "BatchedTritonExperts"),
    ("MARLIN", "fp8moe.backends.marlin", "MarlinExperts"),
    ("XPU", "fp8moe.backends.xpu", "XpuExperts"),
)

_registered: list[BackendSpec] = []


@cache
def seed_backends() -> tuple[BackendSpec, ...]:
    """The eleven, in the seed's order."""
    return tuple(
        BackendSpec(name, getattr(import_module(module), cls), returns_class=name != "FLASHINFER_TRTLLM")
        for name, module, cls in SEED_ORDER
    )


@cache
def default_backends() -> tuple[BackendSpec, ...]:
    """The order of a scan: the eleven, with the registered backends at the positions they asked for.

    An installed package's backend that does not load, breaks the contract, has a name that is taken, or a position
    beside an unknown one is left out with a `BrokenPlugInWarning`.

    Raises:
        BackendContractError: there is such a backend, and FP8MOE_STRICT_PLUG_INS is set.
    """
    found = _arranged()
    if found.broken and strict():
        raise BackendContractError(found.broken[0].error)
    warn_of(found.broken)
    return found.order


class _Arranged(NamedTuple):
    order: tuple[BackendSpec, ...]
    registered: tuple[BackendSpec, ...]
    broken: tuple[BrokenPlugIn, ...]


@cache
def _arranged() -> _Arranged:
    loaded, broken = _entry_point_backends()
    order = list(seed_backends())
    waiting = [spec for spec in (*(spec for _, spec in loaded), *_registered) if spec.position is not None]
    while waiting:
        placed = [spec for spec in waiting if _place(order, spec)]
        if not placed:
            break
        waiting = [spec for spec in waiting if spec not in placed]
    for spec in waiting:
        if spec in _registered:
            raise BackendContractError(_misplaced(spec, order))
    lost = [
        BrokenPlugIn(name, spec.name, spec.distribution or UNKNOWN, _misplaced(spec, order))
        for name, spec in loaded
        if spec in waiting
    ]
    kept = [spec for _, spec in loaded if spec not in waiting]
    return _Arranged(tuple(order), (*kept, *_registered), (*broken, *lost))


def _forget_order() -> None:
    _arranged.cache_clear()
    default_backends.cache_clear()


def _misplaced(spec: BackendSpec, order: Iterable[BackendSpec]) -> str:
    assert spec.position is not None
    return (
        f"{_who(spec)}: position is beside {spec.position.before or spec.position.after!r}, which is no backend in the "
        f"order; known: {', '.join(known.name for known in order)}"
    )


def _place(order: list[BackendSpec], spec: BackendSpec) -> bool:
    assert spec.position is not None
    neighbour = spec.position.before or spec.position.after
    for index, known in enumerate(order):
        if known.name == neighbour:
            order.insert(index + (spec.position.after is not None), spec)
            return True
    return False


def registered_backends() -> tuple[BackendSpec, ...]:
    """Backends from outside the tree: entry points first, then those registered by a call."""
    return _arranged().registered


def plug_ins_installed() -> bool:
    """Whether any package has an entry point for us, or any call registered a backend; nothing is imported."""
    return bool(_registered or entry_points(group=ENTRY_POINT_GROUP))


def broken_plug_ins() -> tuple[BrokenPlugIn, ...]:
    """Installed packages' backends that are left out, in the order of their entry points' names."""
    return _arranged().broken


def backend_named(name: str) -> BackendSpec:
    """The spec of a backend, those that are only named included. For one of the eleven no plug-in is imported.

    Raises:
        KeyError: no backend has this name; the message lists those that are there.
        BackendContractError: an installed package's has, and it cannot be used; the message has the cause.
    """
    known = {spec.name: spec for spec in seed_backends()}
    if name in known:
        return known[name]
    known |= {spec.name: spec for spec in registered_backends()}
    if name not in known:
        for plug_in in broken_plug_ins():
            if name in (plug_in.name, plug_in.backend):
                raise BackendContractError(plug_in.error)
        raise KeyError(f"no backend is named {name!r}; known: {', '.join(sorted(known))}")
    return known[name]


def register_backend(
    spec: BackendSpec | str,
    experts_cls: type[FusedMoEPermuteExpertsUnpermute] | None = None,
    *,
    before: str | None = None,
    after: str | None = None,
) -> BackendSpec:
    """Adds a backend from outside the tree, and checks its class at once.

    Args:
        spec: a whole `BackendSpec`, or a name with `experts_cls` beside it.
        before, after: the neighbour in the order; with neither, the backend is never scanned, only named.

    Raises:
        BackendContractError: the class breaks the contract, the name is taken, or the neighbour is unknown.
    """
    if isinstance(spec, str):
        if experts_cls is None:
            raise BackendContractError(f"register_backend({spec!r}): expected an experts class beside the name")
        spec = BackendSpec(spec, experts_cls, Position(before, after) if before or after else None)
    elif not isinstance(spec, BackendSpec):
        raise BackendContractError(f"register_backend({spec!r}): expected a name with a class, or a BackendSpec")
    elif before or after or experts_cls is not None:
        raise BackendContractError(f"register_backend({spec!r}): the class and the position are the BackendSpec's own")
    _check_spec(spec, taken=[*seed_backends(), *registered_backends()])
    _registered.append(spec)
    _forget_order()
    try:
        _arranged()
    except BackendContractError:
        _registered.remove(spec)
        _forget_order()
        raise
    return spec


def unregister_backend(name: str) -> None:
    """Takes a backend back that `register_backend` added.

    Raises:
        KeyError: no backend of this name was registered by a call.
        BackendContractError: another one has its position beside it.
    """
    found = next((spec for spec in _registered if spec.name == name), None)
    if found is None:
        raise KeyError(f"no backend named {name!r} was registered by register_backend()")
    for spec in registered_backends():
        if spec.position is not None and name in (spec.position.before, spec.position.after):
            raise BackendContractError(f"{_who(spec)} has its position beside {name!r}; unregister it first")
    _registered.remove(found)
    _forget_order()


@cache
def _entry_point_backends() -> tuple[tuple[tuple[str, BackendSpec], ...], tuple[BrokenPlugIn, ...]]:
    """Those that load, each with its entry point's name, and those that do not."""
    found: list[tuple[str, BackendSpec]] = []
    broken: list[BrokenPlugIn] = []
    for entry_point in sorted(entry_points(group=ENTRY_POINT_GROUP), key=lambda point: (point.name, _brings(point))):
        name = entry_point.name
        try:
            spec = _load(entry_point)
            name = str(spec.name)
            _check_spec(spec, taken=[*seed_backends(), *(other for _, other in found)])
            found.append((entry_point.name, spec))
        except BackendContractError as error:
            broken.append(BrokenPlugIn(entry_point.name, name, _brings(entry_point), str(error)))
        except (Exception, SystemExit) as error:  # of what it gave, where that is asked
            told = f"{_named(entry_point)}: asking what it is raised {said(error)}"
            broken.append(BrokenPlugIn(entry_point.name, name, _brings(entry_point), told))
    return tuple(found), tuple(broken)


def _brings(entry_point: EntryPoint) -> str:
    return entry_point.dist.name if entry_point.dist is not None else UNKNOWN


def _named(entry_point: EntryPoint) -> str:
    return visible(f"entry point {entry_point.name!r} of {_brings(entry_point)} ({entry_point.value})")


def _load(entry_point: EntryPoint) -> BackendSpec:
    """An entry point names a `BackendSpec`, a function that returns one, or an experts class."""
    distribution = _brings(entry_point)
    where = _named(entry_point)
    try:
        with told_if_slow(where):
            target: Any = entry_point.load()
            if not inspect.isclass(target) and not isinstance(target, BackendSpec) and callable(target):
                target = target()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # SystemExit, and what pytest.importorskip raises
        raise BackendContractError(f"{where}: loading it raised {said(error)}") from error
    if inspect.isclass(target):
        target = BackendSpec(entry_point.name, cast("type[FusedMoEPermuteExpertsUnpermute]", target))
    if not isinstance(target, BackendSpec):
        raise BackendContractError(f"{where}: expected a BackendSpec, a function returning one, or an experts class")
    return BackendSpec(target.name, target.experts_cls, target.position, target.returns_class, distribution)


def _who(spec: BackendSpec) -> str:
    return f"backend {spec.name!r}" + (f" of {spec.distribution}" if spec.distribution else "")


def _is_name(text: str) -> bool:
    return text == text.strip() != "" and text.isprintable() and ":" not in text and len(text) <= MOST_OF_A_NAME


def _check_spec(spec: BackendSpec, taken: Iterable[BackendSpec]) -> None:
    from fp8moe.experts import contract_violations

    if not isinstance(spec.name, str) or not _is_name(spec.name):
        told = f"BackendSpec.name={spec.name!r:.{2 * MOST_OF_A_NAME}}: expected a name that can be typed and printed"
        raise BackendContractError(f"{told}: 1 to {MOST_OF_A_NAME} characters, no colon, no space at its ends")
    if spec.position is not None and not isinstance(spec.position, Position):
        raise BackendContractError(
            f"{_who(spec)}: position is {spec.position!r}: expected Position(before=...), Position(after=...) or None"
        )
    for other in taken:
        if other.name.upper() == spec.name.upper():
            raise BackendContractError(
                f"{_who(spec)}: the name is taken by {_who(other)} ({other.experts_cls.__module__}); choose another"
            )
    meaning = RESERVED.get(spec.name.upper())
    if meaning:
        raise BackendContractError(f"{_who(spec)}: the name stands for {meaning}; choose another")
    violations = contract_violations(spec.experts_cls)
    if violations:
        raise BackendContractError(f"{_who(spec)}: {'; '.join(violations)}")
