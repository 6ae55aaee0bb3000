"""How long one case takes on the backend that is selected here, and the least that it can take on this device."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from conformance.bits import difference
from conformance.build import CaseTensors, build, config_of, expert_map_of, forms, routing
from conformance.cases import Case
from conformance.pinned import is_checkpoints, model_cases
from conformance.plan import Target
from conformance.rates import Rates, rates_of
from conformance.results import CheckResult, Evidence, Status
from conformance.timing.graphs import CaptureFailed, captured
from conformance.timing.memory import high_water
from fp8moe.counted import counted
from fp8moe.dispatch import local_ids
from fp8moe.experts import FusedMoEPermuteExpertsUnpermute
from fp8moe.registry import BackendUnavailable
from fp8moe.schemes import SCHEMES
from fp8moe.selector import explain_fp8_moe_backend

VERDICT = "performs"
CHECK = "performs.time"
NOTHING = "NONE"
"""The name of no backend, in the selector's enum."""
WARM_UP = 3
REPLAYS = 30
FLUSHED_BYTES = 512 << 20
"""Written before each measured call: twice the largest cache of a device (MI300X, 256 MiB), so that the weights come
from memory, as they do in a model whose other layers ran in between, and as the floor assumes."""

OF_EXPERTS = ("w13", "w2", "w13_scale", "w2_scale", "w13_bias", "w2_bias")


@dataclass(frozen=True)
class Work:
    """What a case cannot do without.

    Args:
        bytes: to be read and written: each touched expert's weights, scales and biases once, the hidden states of
            tokens that have an expert here, the whole output.
        flops: 2 for each multiplication and addition of both GEMMs.
    """

    bytes: int
    flops: int


@dataclass(frozen=True)
class Floor:
    """The least time, in microseconds, and what sets it: "bytes" or "flops"."""

    us: float
    by: str


@dataclass(frozen=True)
class Timing:
    """Medians in microseconds: with caches flushed before each call, and without. `method` is how calls were made."""

    median_us: float
    warm_us: float
    method: str


@dataclass(frozen=True)
class Selected:
    """A case and what the selector picks for it here; `reason` says why nothing can be timed, if so."""

    case: Case
    backend: str
    experts_cls: type[FusedMoEPermuteExpertsUnpermute] | None
    reason: str = ""


def selected_for(case: Case, target: Target) -> Selected:
    """The backend for a published model's layer, no variable set, CUTLASS allowed as its checkpoint's caller does."""
    selection = explain_fp8_moe_backend(
        config_of(case, target.device),
        *SCHEMES[case.scheme],
        case.scheme == "channel_tok",
        platform=target.platform,
        env={},
    )
    if selection.backend is None or selection.experts_cls is None:
        name = NOTHING if selection.backend is None else selection.backend.name
        return Selected(case, name, None, f"the selector gives no class for {case.scheme} here")
    name, cls = selection.backend.name, selection.experts_cls
    return Selected(case, name, cls)


def timed_cases(target: Target, schemes: set[str], backends: set[str]) -> list[Selected]:
    """The published models in the schemes of their checkpoints, as far as a run was asked for them."""
    cases = (case for case in model_cases(target) if case.scheme in schemes and is_checkpoints(case))
    found = (selected_for(case, target) for case in cases)
    return [selected for selected in found if selected.backend in backends | {NOTHING}]


def work_of(tensors: CaseTensors) -> Work:
    """Bytes and flops of a case, from its own ids."""
    sizes = {name: (tuple(one.shape), one.element_size()) for name, one in tensors.named().items()}
    return _work(sizes, tensors.topk_ids, tensors.expert_map)


def work_of_case(case: Case) -> Work:
    """The same from the case alone: its ids are drawn again, and nothing else of it."""
    sizes = {name: (shape, dtype.itemsize) for name, (dtype, shape) in forms(case).items()}
    return _work(sizes, routing(case)[1], expert_map_of(case))


def _work(sizes: Mapping[str, tuple[tuple[int, ...], int]], topk_ids: Tensor, expert_map: Tensor | None) -> Work:
    """
    Args:
        sizes: shape, and bytes of an element, of a case's tensors by name.
    """
    (experts, rows, hidden), _ = sizes["w13"]
    inter = sizes["w2"][0][2]
    local = local_ids(topk_ids, expert_map, experts)
    here = local >= 0
    pairs, tokens = int(here.sum()), int(here.any(dim=1).sum())
    touched = int((torch.bincount(local[here], minlength=experts) > 0).sum())
    held = sum(math.prod(sizes[name][0]) * sizes[name][1] for name in OF_EXPERTS if name in sizes)
    moved = held * touched // experts + (tokens + len(topk_ids)) * hidden * sizes["hidden_states"][1]
    return Work(moved, 2 * pairs * (rows * hidden + hidden * inter))


def floor_of(work: Work, rates: Rates, scheme: str) -> Floor:
    """The larger of bytes/bandwidth and flops/rate."""
    times = {"bytes": work.bytes / rates.bandwidth, "flops": work.flops / rates.flops_for(scheme)}
    by = max(times, key=lambda name: times[name])
    return Floor(times[by] * 1e6, by)


class Broken(Exception):
    """The backend broke a promise while it was being timed; the text says which."""


class Stopwatch:
    """A backend ready to be called again and again on one case: as a graph where it declares that it can be captured.

    Raises:
        Broken: it cannot be captured all the same, or a replay's output is another than that of the call before.
    """

    def __init__(self, backend: FusedMoEPermuteExpertsUnpermute, tensors: CaseTensors) -> None:
        self.output = torch.empty_like(tensors.hidden_states, memory_format=torch.contiguous_format)

        def call() -> None:
            tensors.call(backend, self.output)

        try:
            _, self.memory = high_water(call)
            for _ in range(WARM_UP - 1):
                call()
            torch.cuda.synchronize()
        except torch.OutOfMemoryError:
            raise
        except (Exception, SystemExit) as error:
            raise Broken(f"apply raised {_told(error)}") from error
        self.launch: Callable[[], object] = call
        self.method = "eager calls"
        contract = backend.contract.for_tokens(len(tensors.hidden_states))
        if contract.graph_capturable:
            expected = self.output.clone()
            try:
                self.graph = captured(call)
            except CaptureFailed as error:
                raise Broken(f"declared graph-capturable, and capture raised {error}") from error
            self.launch, self.method = self.graph.replay, "graph replays"
            self._check_replay(expected, exactly=contract.deterministic is True)

    def _check_replay(self, expected: Tensor, *, exactly: bool) -> None:
        self.output.fill_(torch.nan)
        self.once()
        if exactly:
            same = not difference(expected, self.output).differing
        else:
            same = torch.equal(self.output.isfinite(), expected.isfinite())
        if not same:
            raise Broken("declared graph-capturable, and a replay gives another output than the eager call")

    def once(self) -> None:
        """One call, to its end."""
        self.launch()
        torch.cuda.synchronize()

    def measure(self) -> Timing:
        """Medians of `REPLAYS` calls each, between device events."""
        flushed = torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device=self.output.device)
        cold = median(self._times(flushed.zero_))
        del flushed
        return Timing(cold, median(self._times(lambda: None)), self.method)

    def _times(self, before: Callable[[], object]) -> Iterator[float]:
        """Microseconds of each call."""
        event: Callable[..., Any] = torch.cuda.Event
        for _ in range(REPLAYS):
            start, end = event(enable_timing=True), event(enable_timing=True)
            before()
            start.record()
            self.launch()
            end.record()
            torch.cuda.synchronize()
            yield start.elapsed_time(end) * 1e3


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no text'])[0]}"


@dataclass
class Measured:
    """A case's result, and the stopwatch that gave it; None where nothing was timed."""

    result: CheckResult
    stopwatch: Stopwatch | None = None
    floor_by: str = ""


def time_case(selected: Selected, target: Target, reached: Rates | None = None) -> Measured:
    """Builds, constructs, warms up, captures, times; a device that cannot hold it, or a missing library, is not run.

    Args:
        reached: the device's rates as measured, for a floor beside that of the data sheet.
    """
    case, cls = selected.case, selected.experts_cls
    if cls is None:
        return Measured(_result(selected, Status.NOT_RUN, selected.reason))
    gc.collect()
    torch.cuda.empty_cache()  # the case before is gone: its memory serves for this one
    try:
        tensors = build(case, target.device)
        backend, built = high_water(partial(cls, tensors.config, tensors.quant, tensors.weights))
        stopwatch = Stopwatch(backend, tensors)
        timing = stopwatch.measure()
    except BackendUnavailable as error:
        return Measured(_result(selected, Status.NOT_RUN, str(error)))
    except torch.OutOfMemoryError as error:
        return Measured(_result(selected, Status.NOT_RUN, f"out of memory: {_told(error)}"))
    except Broken as error:
        return Measured(_result(selected, Status.FAILED, str(error)))
    work = work_of(tensors)
    rates = rates_of(torch.cuda.get_device_name(0))
    floor = None if rates is None else floor_of(work, rates, case.scheme)
    figures = {"median_us": timing.median_us, "warm_us": timing.warm_us, "bytes": work.bytes, "flops": work.flops}
    figures |= built.then(stopwatch.memory).figures()
    if reached is not None:
        reached_us = floor_of(work, reached, case.scheme).us
        figures |= {"measured_floor_us": reached_us, "measured_floor_over_time": reached_us / timing.median_us}
    status, reason = verdict_of(timing, floor)
    if floor is not None:
        figures |= {"floor_us": floor.us, "floor_over_time": floor.us / timing.median_us}
    return Measured(_result(selected, status, reason, figures), stopwatch, "" if floor is None else floor.by)


def verdict_of(timing: Timing, floor: Floor | None) -> tuple[Status, str]:
    """Slow is not wrong here; faster than the device's memory and matrix units is: then work was left out."""
    if floor is not None and timing.median_us < floor.us:
        told = f"{timing.median_us:.4g} us is below the floor of {floor.us:.4g} us, which {floor.by} set"
        return Status.FAILED, f"{told}: not all of the work was done, or the device's rates are not those of its name"
    return Status.PASSED, f"median of {REPLAYS} {timing.method}, caches flushed before each"


def _result(selected: Selected, status: Status, reason: str, figures: dict[str, float] | None = None) -> CheckResult:
    case = selected.case
    return CheckResult(
        VERDICT,
        CHECK,
        status,
        selected.backend,
        case.scheme,
        str(case),
        reason,
        evidence=Evidence.HARDWARE if status in (Status.PASSED, Status.FAILED) else None,
        reproduce=f"pytest conformance -m performs -k '[{id_of(case)}]'",
        measured=figures or {},
    )


def not_timed(results: Sequence[CheckResult]) -> list[str]:
    """Why cases were not timed, one line for each backend and reason."""
    counts: dict[tuple[str, str], int] = {}
    for result in results:
        if result.status is Status.NOT_RUN:
            counts[result.backend, result.reason] = counts.get((result.backend, result.reason), 0) + 1
    lines = []
    for (backend, reason), count in counts.items():
        lines.append(
            f"{VERDICT}: {reason}" if not backend else f"{VERDICT}: {backend}: {reason} ({counted(count, 'case')})"
        )
    unknown = [r for r in results if r.measured and "floor_us" not in r.measured]
    if unknown:
        lines.append(
            f"{VERDICT}: no floor for {counted(len(unknown), 'case')}: conformance/rates.py has no such device"
        )
    return lines


def id_of(case: Case) -> str:
    """The case's in pytest's names."""
    return f"{case.model}-{case.scheme}-M{case.tokens}"
