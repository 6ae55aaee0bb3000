"""The gate's samplers on a device: pairs of two versions in one process, and rounds among yardsticks."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from conformance.gate.samples import Rounds, Samples
from conformance.timing.cells import Prepared
from conformance.timing.graphs import Replay, Unrolled, replays
from conformance.timing.state import Watch

Make = Callable[[], tuple[Unrolled, Unrolled]]
MOST_KEPT = 4
"""Pairs of graphs that stay in memory: the screen goes from cell to cell, the looks come back to few."""
WARM = 2
"""Pairs that are thrown away when a cell is taken up again: caches and clocks are then the last cell's."""


class DevicePairs:
    """`conformance.gate.samples.PairSampler` for two versions in this process.

    Args:
        cells: by name, what makes the graphs of both versions, with the same number of calls.
        watch: entered by the caller.
    """

    processes = 1

    def __init__(self, cells: Mapping[str, Make], watch: Watch) -> None:
        self.cells = cells
        self.watch = watch
        self._kept: dict[str, tuple[Unrolled, Unrolled]] = {}

    def pairs(self, cell: str, count: int) -> Samples:
        a, b = self._graphs(cell)
        warm = replays([a, b] * WARM)
        order = [graph for number in range(count) for graph in ((a, b) if number % 2 == 0 else (b, a))]
        taken = replays(order)
        first, second = taken[0::2], taken[1::2]
        swapped = [number % 2 == 1 for number in range(count)]
        return Samples(
            np.array([(y if odd else x).us for x, y, odd in zip(first, second, swapped, strict=True)]),
            np.array([(x if odd else y).us for x, y, odd in zip(first, second, swapped, strict=True)]),
            np.array([self.watch.flags(x.begin, y.end) for x, y in zip(first, second, strict=True)], dtype=np.uint8),
            _spent(warm) + taken[0].us + warm[0].us,  # the untimed launches that come first
        )

    def _graphs(self, cell: str) -> tuple[Unrolled, Unrolled]:
        found = self._kept.pop(cell, None)
        if found is None:
            while len(self._kept) >= MOST_KEPT:
                del self._kept[next(iter(self._kept))]  # the one that was asked for least lately
            found = self.cells[cell]()
            a, b = found
            if a.count != b.count:
                raise ValueError(f"{cell}: graphs of {a.count} and {b.count} calls have no ratio")
            if bool(a.graphs) != bool(b.graphs):
                raise ValueError(f"{cell}: A makes {a.method}, B {b.method}: such times are not compared")
        self._kept[cell] = found
        return found


class DeviceRounds:
    """`conformance.gate.samples.RoundSampler`: cells among yardsticks.

    Args:
        cells: by name, what prepares a cell.
        yardsticks: by name.
        setting: what must be the same in two runs that are compared.
        watch: entered by the caller.
    """

    def __init__(
        self,
        cells: Mapping[str, Callable[[], Prepared]],
        yardsticks: Mapping[str, Unrolled],
        setting: Mapping[str, str],
        watch: Watch,
    ) -> None:
        self.cells, self.yardsticks = cells, yardsticks
        self.setting = setting
        self.watch = watch
        self._kept: dict[str, Prepared] = {}
        self._turns: dict[str, int] = {}

    def yardstick(self, cell: str) -> str:
        return self._prepared(cell).kind

    def rounds(self, cell: str, count: int) -> Rounds:
        graph, names = self._prepared(cell).graph, list(self.yardsticks)
        forwards = [graph, *self.yardsticks.values()]
        warm = replays(forwards)
        order = [one for number in range(count) for one in (forwards if number % 2 == 0 else forwards[::-1])]
        turn = self._turns.get(cell, 0)
        self._turns[cell] = turn + count
        taken = replays(order, turn)
        size = len(forwards)
        each = [taken[at : at + size][:: 1 if number % 2 == 0 else -1] for number, at in _starts(count, size)]
        return Rounds(
            np.array([one[0].us for one in each]),
            {name: np.array([one[place].us for one in each]) for place, name in enumerate(names, start=1)},
            np.array([self._flags(one) for one in each], dtype=np.uint8),
            _spent(warm) + warm[0].us + taken[0].us,
        )

    def _prepared(self, cell: str) -> Prepared:
        if cell not in self._kept:
            self._kept[cell] = self.cells[cell]()
        return self._kept[cell]

    def _flags(self, taken: list[Replay]) -> int:
        return self.watch.flags(min(replay.begin for replay in taken), max(replay.end for replay in taken))


def _starts(count: int, size: int) -> list[tuple[int, int]]:
    return [(number, number * size) for number in range(count)]


def _spent(taken: list[Replay]) -> float:
    return sum(replay.us for replay in taken)
