"""A cell of a timed run, one case on one backend, as a graph of calls on a model's worth of layers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from conformance.build import CaseTensors
from conformance.cases import Case
from conformance.oracles import forget, tensors_of
from conformance.performs import Floor, Work, floor_of, work_of
from conformance.plan import load_subject
from conformance.raised import told
from conformance.rates import Rates, rates_of
from conformance.timing.graphs import Unrolled
from conformance.timing.memory import Memory, high_water
from conformance.timing.shared import Given, on_memory_of
from conformance.timing.yardsticks import COMPUTE, LAUNCH, MEMORY
from fp8moe.experts import FusedMoEPermuteExpertsUnpermute, MoEWeights
from fp8moe.registry import BackendUnavailable

GRAPH_US = 1000.0
"""What a graph takes at the least. A single replay of an 11 us kernel repeats to within -28 and +54%, 20 of them in one
graph to 0.5% (measured on one H100, 2026-11-24); a call of a millisecond needs none beside it."""
LAUNCHED_US = 10.0
"""A call of several kernels takes that long on any device."""
MOST_CALLS = 100
SHORT_US = 20.0
"""With a floor below it, a call is mostly launches and the tails of kernels."""
MODEST = Rates(1e12, 5e14, 2.5e14, "none: a device that is not listed, for the number of calls alone")
CACHES = 4
"""All layers together have so many times the weights that the last-level cache holds."""
LEAST_LAYERS, MOST_LAYERS = 2, 32
MOST_PLACES = 16
"""Of intermediate results: what one place does to a time, by 0.5%, is 0.13% in the mean of so many."""
PLACES_BYTES = 1 << 30
"""What one cell's places may take, as far as a case tells; a stored run holds some dozens of cells."""


@dataclass(frozen=True)
class TimedCell:
    """One case on one backend.

    Args:
        backend: a registered name or module:Class.
        case: its id.
    """

    backend: str
    case: str

    @property
    def name(self) -> str:
        return f"{self.backend} {self.case}"

    @classmethod
    def parse(cls, name: str) -> TimedCell:
        """The inverse of `name`.

        Raises:
            ValueError: not "BACKEND CASE".
        """
        backend, _, case = name.partition(" ")
        if not backend or not case:
            raise ValueError(f"cell={name!r}: expected BACKEND CASE, such as 'TRITON {Case()}'")
        return cls(backend, str(Case.parse(case)))

    def prepared(
        self, count: int | None = None, more: int = 0, given: Given | None = None, device: str = "cuda"
    ) -> Prepared:
        """Its calls, ready to be replayed.

        Args:
            count: of the calls in the graph; None: by the case's floor on this device, so that it is the same in every
                run that may be compared with this one.
            more: as `prepared_pair`.
            given: another process's tensors, to be timed on their memory.

        Raises:
            conformance.timing.graphs.CaptureFailed: the backend declares that it can be captured, and cannot.
            ValueError: the tensors given are not laid out as this version's.
        """
        layers = Layers.of(Case.parse(self.case), device, given)
        return _prepared(self, layers, count, None, more, None if given is None else given.output)


@dataclass(frozen=True)
class Prepared:
    """A cell that can be timed, the yardstick whose kind of work it is, the memory that one layer of it takes, and its
    tensors."""

    graph: Unrolled
    kind: str
    memory: Memory
    tensors: Given


def prepared_pair(
    first: TimedCell, second: TimedCell, count: int | None = None, more: int = 0, device: str = "cuda"
) -> tuple[Unrolled, Unrolled]:
    """Two backends, or one twice, on one case: they read the same weights and inputs, write to the same output, and
    have their intermediate results in the same memory.

    Where each has its own, two instances of one backend differ steadily by up to 1.7%, above all by where intermediate
    results lie (`conformance.timing.graphs.Unrolled`).

    Args:
        count: of the calls in each graph; None: by the case's floor.
        more: calls of the second that its count does not tell: to slow it on purpose.

    Raises:
        ValueError: two cases.
        conformance.timing.graphs.CaptureFailed: as `TimedCell.prepared`.
    """
    if first.case != second.case:
        raise ValueError(f"cells: one case on two backends, not {first.case} and {second.case}")
    layers = Layers.of(Case.parse(first.case), device)
    a = _prepared(first, layers, count, None).graph
    return a, _prepared(second, layers, a.count, a, more).graph


def prepared_beside(
    case: Case, names: Sequence[str], layers: Layers, built: dict[str, Built] | None = None
) -> Iterator[tuple[str, Prepared | str]]:
    """Several backends on one case and its layers, as `prepared_pair`; in place of one that cannot be timed, why.

    Args:
        built: by name, the backends that stand on these layers already; those that do not yet join them.
    """
    before: Unrolled | None = None
    for name in names:
        try:
            made = _prepared(TimedCell(name, str(case)), layers, None, before, built=built)
        except BackendUnavailable as error:
            yield name, str(error)
        except (Exception, SystemExit) as error:
            yield name, f"it raised {told(error)}"
        else:
            before = made.graph if made.graph.graphs else before  # the last one that has places to share
            yield name, made


@dataclass(frozen=True)
class Layers:
    """A case's call on as many layers as a cache cannot hold, as a model has them. Layers of a few MiB are at most
    `MOST_LAYERS`, and stay in the cache; so may, with few tokens, the weights of the experts that they meet.

    Args:
        calls: the case's tensors; copies of the weights, and the tokens in another order, in the further ones.
        work: of one call.
        floor: of one call; of a modest device where this one is not listed.
    """

    calls: Sequence[CaseTensors]
    work: Work
    floor: Floor

    @classmethod
    def of(cls, case: Case, device: str, given: Given | None = None) -> Layers:
        tensors = tensors_of(case, device)
        forget()  # a large case's weights are kept here alone
        work = work_of(tensors)
        floor = floor_of(work, rates_of(torch.cuda.get_device_name(0)) or MODEST, case.scheme)
        if given is not None:
            return cls([on_memory_of(one, tensors) for one in given.layers], work, floor)
        cache = torch.cuda.get_device_properties(0).L2_cache_size
        count = math.ceil(CACHES * cache / max(case.weight_bytes, 1))
        return cls(
            [_further(tensors, number) for number in range(min(max(count, LEAST_LAYERS), MOST_LAYERS))], work, floor
        )

    def first(self, case: Case) -> Layers:
        """The same layers, called with the first tokens of these calls.

        Args:
            case: as theirs, with no more tokens.
        """
        least = slice(case.tokens)
        calls = [
            replace(
                one,
                case=case,
                hidden_states=one.hidden_states[least],
                topk_weights=one.topk_weights[least],
                topk_ids=one.topk_ids[least],
            )
            for one in self.calls
        ]
        work = work_of(calls[0])
        return Layers(calls, work, floor_of(work, rates_of(torch.cuda.get_device_name(0)) or MODEST, case.scheme))


@dataclass(frozen=True)
class Built:
    """One backend on each of a case's layers, and the memory that the first took."""

    backends: Sequence[FusedMoEPermuteExpertsUnpermute]
    memory: Memory

    @classmethod
    def on(cls, layers: Layers, name: str) -> Built:
        """Raises what the backend's constructor does."""
        experts_cls = load_subject(name).experts_cls
        first, memory = high_water(partial(_made, experts_cls, layers.calls[0]))
        return cls([first, *(_made(experts_cls, tensors) for tensors in layers.calls[1:])], memory)


def _further(tensors: CaseTensors, number: int) -> CaseTensors:
    if not number:
        return tensors
    weights: dict[str, Any] = {
        name: None if one is None else one.clone() for name, one in vars(tensors.weights).items()
    }
    return replace(
        tensors,
        weights=MoEWeights(**weights),
        hidden_states=tensors.hidden_states.roll(number, 0),
        topk_weights=tensors.topk_weights.roll(number, 0),
        topk_ids=tensors.topk_ids.roll(number, 0),
    )


def _prepared(
    cell: TimedCell,
    layers: Layers,
    count: int | None,
    beside: Unrolled | None,
    more: int = 0,
    output: Tensor | None = None,
    built: dict[str, Built] | None = None,
) -> Prepared:
    stand = None if built is None else built.get(cell.backend)
    if stand is None:
        stand = Built.on(layers, cell.backend)
        if built is not None:
            built[cell.backend] = stand
    backends = stand.backends
    if beside is not None and beside.output is not None:
        output = beside.output
    if output is None:
        output = torch.empty_like(layers.calls[0].hidden_states, memory_format=torch.contiguous_format)
    calls = [partial(tensors.call, backend, output) for backend, tensors in zip(backends, layers.calls, strict=True)]
    _, called = high_water(calls[0])
    tokens = len(layers.calls[0].hidden_states)
    captures = all(backend.contract.for_tokens(tokens).graph_capturable for backend in backends)
    told = count or -(-calls_for(layers.floor.us) // len(calls)) * len(calls)
    memory, places = stand.memory.then(called), places_for(Case.parse(cell.case))
    graph = Unrolled(calls, told, capture=captures, beside=beside, more=more, places=places)
    graph.output = output
    return Prepared(graph, kind_of(layers.floor), memory, Given.of(layers.calls, output))


def _made(cls: type[FusedMoEPermuteExpertsUnpermute], tensors: CaseTensors) -> FusedMoEPermuteExpertsUnpermute:
    return cls(tensors.config, tensors.quant, tensors.weights)


def calls_for(floor_us: float) -> int:
    """How many calls a graph should hold, by the least time that one of them can take."""
    return min(max(math.ceil(GRAPH_US / max(floor_us, LAUNCHED_US)), 1), MOST_CALLS)


def places_for(case: Case) -> int:
    """In how many places a call's intermediate results lie: by the case alone, so that every version and backend has as
    many, and a launch as many graphs."""
    nominal = case.tokens * case.top_k * (3 * case.inter + case.hidden) * 4  # both GEMMs' results, and what is between
    return min(max(PLACES_BYTES // max(nominal, 1), 1), MOST_PLACES)


def kind_of(floor: Floor) -> str:
    """The yardstick for a floor."""
    if floor.us < SHORT_US:
        return LAUNCH
    return COMPUTE if floor.by == "flops" else MEMORY
