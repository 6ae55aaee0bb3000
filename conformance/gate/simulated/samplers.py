"""Samplers of the simulated device: what a GPU's do, with the truth known."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from conformance.gate.policy import DEFAULT as POLICY
from conformance.gate.samples import Rounds, Samples
from conformance.gate.simulated.device import Device, Stream, in_turn
from conformance.gate.simulated.mix import GRAPH_US, Mixed, unrolled
from conformance.gate.simulated.work import (
    CLOCK_BETWEEN_RUNS,
    COPY,
    DEVICE,
    GAP_BETWEEN_RUNS,
    GAP_US,
    GEMM,
    LARGE_GEMM,
    OFFSET_ONE_PROCESS,
    OFFSET_TWO_PROCESSES,
    SHORT_GEMM,
    Work,
)

WARM_UP_US = 100e3
"""Replays that are thrown away whenever the cell changes, as a sampler does while clocks settle."""
SETTLED_US = 500e3
"""As how long at work the device then counts: after a pause of 0.1 s for the next cell it has its boost back by 28%,
and of that 28% x exp(-100/300) = 20% = exp(-500/300) is left after the warm-up."""
VISIT_WARM_UP_US = 20e3
"""The same in a stored run, whose yardsticks keep the device at work."""

VISITS_APART_US = 1e6
"""From one visit of a cell to the next, while all others have theirs."""

YARDSTICKS: dict[str, Work] = {"memory": COPY, "compute": LARGE_GEMM, "launch": SHORT_GEMM}
"""Each as it was measured, 20 calls in a graph."""
OWN_YARDSTICK: dict[str, str] = {
    COPY.name: "memory",
    GEMM.name: "compute",
    LARGE_GEMM.name: "compute",
    SHORT_GEMM.name: "launch",
}
MIXED_SHARE = 0.2
"""Cells of a run follow the clock by up to so much less, or more, than the measured kind of work does."""


class SimulatedPairs:
    """Two versions of each cell on the simulated device: a `PairSampler`.

    Args:
        cells: of the run.
        rng: the run's.
        processes: 1 or 2; the steady offset between equal versions is drawn for each cell accordingly.
        slowdowns: by how much B is slower, by cell; 0.02 is 2%.
        noise: factor on the noise of every stream, to try the gate on a device that is worse than the measured one.
        graph_us: how long graphs are, at most (`unrolled`).
        device, offset: others than the measured ones, for tests; `offset` is a standard deviation.
    """

    def __init__(
        self,
        cells: Iterable[Mixed],
        rng: np.random.Generator,
        *,
        processes: int = 1,
        slowdowns: Mapping[str, float] | None = None,
        noise: float = 1.0,
        graph_us: float = GRAPH_US,
        device: Device = DEVICE,
        offset: float | None = None,
    ) -> None:
        self.processes, self._rng, self._device = processes, rng, device
        if offset is None:
            offset = OFFSET_ONE_PROCESS if processes == 1 else OFFSET_TWO_PROCESSES
        slower = slowdowns or {}
        self._streams: dict[str, list[Stream]] = {}
        for cell in cells:
            share = _drawn_share(rng, cell.work)
            a = _noisier(cell.work.of(cell.call_us, unrolled(cell.call_us, graph_us), share), noise)
            b = replace(a, call_us=a.call_us * (1 + slower.get(cell.name, 0.0)), offset=rng.normal(0.0, offset))
            self._streams[cell.name] = [a, b]
        self._last = ""

    def pairs(self, cell: str, count: int) -> Samples:
        """`PairSampler.pairs`."""
        order = in_turn(count)
        times, flags = self._device.replay(self._rng, self._streams[cell], order, SETTLED_US)
        both = flags.reshape(-1, 2)
        overhead, self._last = (0.0 if cell == self._last else WARM_UP_US), cell
        return Samples(times[order == 0], times[order == 1], both[:, 0] | both[:, 1], overhead)


@dataclass(frozen=True)
class Installed:
    """What a cell keeps from one process to the next: how it follows the clock."""

    cell: Mixed
    clock_share: float


def installed(cells: Iterable[Mixed], rng: np.random.Generator) -> tuple[Installed, ...]:
    """Cells for two or more `SimulatedRounds` that are to be compared."""
    return tuple(Installed(cell, _drawn_share(rng, cell.work)) for cell in cells)


class SimulatedRounds:
    """One process with cells and yardsticks on the simulated device: a `RoundSampler`.

    Each process has memory placements of its own, a clock and a pace of launching of its own day.

    Args:
        cells: from `installed`, the same for all processes that are compared.
        rng: the process's.
        slowdowns, noise, graph_us: as in `SimulatedPairs`.
    """

    setting: Mapping[str, str]

    def __init__(
        self,
        cells: Iterable[Installed],
        rng: np.random.Generator,
        *,
        slowdowns: Mapping[str, float] | None = None,
        noise: float = 1.0,
        graph_us: float = GRAPH_US,
    ) -> None:
        self.setting = {"device": "simulated"}
        self._rng = rng
        self._clock = rng.normal(0.0, CLOCK_BETWEEN_RUNS)
        self._pace = float(np.exp(rng.normal(0.0, GAP_BETWEEN_RUNS)))
        self._yardsticks = {name: self._here(work.stream, noise) for name, work in YARDSTICKS.items()}
        self._streams = {}
        for had in cells:
            name, call_us = had.cell.name, had.cell.call_us
            stream = had.cell.work.of(call_us, unrolled(call_us, graph_us), had.clock_share)
            slower_us = call_us * (1 + (slowdowns or {}).get(name, 0.0))
            self._streams[name] = self._here(replace(stream, call_us=slower_us), noise)
        self._ready: dict[tuple[str, int], list[Rounds]] = {}
        self._visits_ahead = POLICY.visits
        self._own = {had.cell.name: OWN_YARDSTICK[had.cell.work.name] for had in cells}

    def _here(self, stream: Stream, noise: float) -> Stream:
        """The stream in this process: two processes differ by `OFFSET_TWO_PROCESSES`, each has half the variance."""
        offset = self._rng.normal(0.0, OFFSET_TWO_PROCESSES / np.sqrt(2)) + stream.clock_share * self._clock
        return replace(_noisier(stream, noise), offset=offset, lead_us=stream.lead_us + GAP_US * (self._pace - 1))

    def yardstick(self, cell: str) -> str:
        """`RoundSampler.yardstick`."""
        return self._own[cell]

    def rounds(self, cell: str, count: int) -> Rounds:
        """`RoundSampler.rounds`; visits are simulated many at a time."""
        ready = self._ready.setdefault((cell, count), [])
        if not ready:
            ready.extend(self._visits(cell, count))
        return ready.pop()

    def _visits(self, cell: str, count: int) -> Iterator[Rounds]:
        streams = [self._streams[cell], *self._yardsticks.values()]
        order = np.repeat(in_turn(count, len(streams)), self._visits_ahead, axis=0)
        times, flags = DEVICE.replay(self._rng, streams, order, SETTLED_US, VISITS_APART_US)
        for row, flag, turn in zip(times, flags, order, strict=True):
            of = {name: row[turn == index] for index, name in enumerate(self._yardsticks, start=1)}
            yield Rounds(row[turn == 0], of, flag.reshape(count, -1).max(axis=1), VISIT_WARM_UP_US)


def _drawn_share(rng: np.random.Generator, work: Work) -> float:
    """Between what was measured and `MIXED_SHARE` off, to the side where there is room."""
    share, off = work.stream.clock_share, float(rng.uniform(0.0, MIXED_SHARE))
    return share - off if share > 0.5 else share + off


def _noisier(stream: Stream, factor: float) -> Stream:
    return replace(stream, noise=stream.noise * factor, lead_noise_us=stream.lead_noise_us * factor)
