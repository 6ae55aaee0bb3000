"""What a sampler gives to the gate: pairs of times of two versions, and why some of them do not count."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntFlag
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Times = NDArray[np.float64]
Flags = NDArray[np.uint8]


class Flag(IntFlag):
    """Why a sample is not valid; one sample may have several. 0 is valid."""

    THROTTLED = 1
    """The device lowered its clocks for heat or power while the sample was taken."""
    CLOCKS_CHANGED = 2
    """The clock that the device may have at most is set otherwise than at the start of the run."""
    SHARED = 4
    """Other work was on the device."""


@dataclass(frozen=True)
class Samples:
    """Pairs of times of one cell, in the order in which they were taken.

    Pair i (from 0, anew in each call) ran A before B where i is even and B before A where it is odd.

    Args:
        a_us, b_us: (n,) float64, microseconds of one graph replay of version A and of version B. Both graphs hold the
            same number of calls of the cell: their ratio is that of the calls. As many as make the gap before a graph
            small, and no more: the longer a pair takes, the more the clocks change within it. n is even, and may be 0.
        flags: (n,) uint8, a union of `Flag` for each pair.
        overhead_us: device time, in microseconds, that this call took beyond the times given: warm-up replays, pairs
            that were thrown away. It counts against the budget.

    Raises:
        ValueError: an odd number of pairs, lengths that differ, or a time that is not positive and finite.
    """

    a_us: Times
    b_us: Times
    flags: Flags
    overhead_us: float = 0.0

    def __post_init__(self) -> None:
        _check_lengths({"a_us": self.a_us, "b_us": self.b_us, "flags": self.flags})
        _check_times({"a_us": self.a_us, "b_us": self.b_us})
        _check_overhead(self.overhead_us)

    @property
    def spent_us(self) -> float:
        """Device time of the samples, invalid ones and overhead included, in microseconds."""
        return float(self.a_us.sum() + self.b_us.sum()) + self.overhead_us


class PairSampler(Protocol):
    """Times two versions of a cell in turn; a GPU's and the simulated one have this and nothing else in common.

    `processes` is 1 where both versions live in one process and 2 where each has its own and they take turns: it
    selects the margin.
    """

    processes: int

    def pairs(self, cell: str, count: int) -> Samples:
        """`count` fresh pairs of the cell (even, at least 2); fewer, an even number, if no more can be had.

        Where the cell is another than that of the call before, the sampler warms up first, and counts that in
        `overhead_us`.

        Args:
            cell: one of the names that the gate was given, one case on one backend.

        What it raises goes through the gate unchanged: a backend that breaks has no verdict about its speed.
        """
        ...


@dataclass(frozen=True)
class Rounds:
    """Rounds of one cell and all yardsticks, in the order in which they were taken.

    Round i (from 0, anew in each call) replays the cell and then each yardstick where i is even, and the same backwards
    where it is odd.

    Args:
        cell_us: (n,) float64, microseconds of one graph replay of the cell. n is even.
        yardsticks_us: (n,) float64 each, microseconds of one graph replay of each yardstick, by its name.
        flags: (n,) uint8, a union of `Flag` for each round.
        overhead_us: as in `Samples`.

    Raises:
        ValueError: as `Samples`; or no yardstick.
    """

    cell_us: Times
    yardsticks_us: Mapping[str, Times]
    flags: Flags
    overhead_us: float = 0.0

    def __post_init__(self) -> None:
        if not self.yardsticks_us:
            raise ValueError("yardsticks_us: at least one yardstick, not none: stored times are compared through them")
        named = {"cell_us": self.cell_us} | {f"yardsticks_us[{k!r}]": v for k, v in self.yardsticks_us.items()}
        _check_lengths(named | {"flags": self.flags})
        _check_times(named)
        _check_overhead(self.overhead_us)

    @property
    def spent_us(self) -> float:
        """Device time of the samples, invalid ones and overhead included, in microseconds."""
        return float(self.cell_us.sum() + sum(times.sum() for times in self.yardsticks_us.values())) + self.overhead_us


class RoundSampler(Protocol):
    """Times cells among yardsticks, for a comparison with another process or day.

    Yardsticks are kernels of ours that never change, one for each kind of work, such as a large copy ("memory"), a
    large GEMM ("compute") and a short kernel ("launch"). `setting` is what must be the same in both runs for their
    times to be comparable, by name: device, driver, versions of libraries that are not under test.
    """

    setting: Mapping[str, str]

    def yardstick(self, cell: str) -> str:
        """The name of the yardstick whose kind of work is the cell's own."""
        ...

    def rounds(self, cell: str, count: int) -> Rounds:
        """`count` fresh rounds (even, at least 2); called several times for each cell, with all others in between."""
        ...


def valid_couples(flags: Flags) -> NDArray[np.bool_]:
    """(n,) True where a sample counts: neither it nor the other of its couple (2k, 2k + 1) has a flag.

    A couple has both orders, so what is left has as many pairs of one order as of the other.
    """
    return np.repeat((flags.reshape(-1, 2) == 0).all(axis=1), 2)


def flags_in(flags: Flags) -> Counter[Flag]:
    """How many samples have each flag; those without a name in `Flag` count for nothing."""
    return Counter({flag: count for flag in Flag if (count := int((flags & flag != 0).sum()))})


def _check_lengths(arrays: Mapping[str, Times | Flags]) -> None:
    shapes = [array.shape for array in arrays.values()]
    if len(shapes[0]) != 1 or shapes[0][0] % 2 or shapes.count(shapes[0]) < len(shapes):
        told = {name: array.shape for name, array in arrays.items()}
        raise ValueError(f"arrays of one even length, not {told}: give whole couples of both orders")


def _check_times(arrays: Mapping[str, Times]) -> None:
    for name, times in arrays.items():
        fine = (times > 0) & (times < np.inf)
        if not fine.all():
            where = int(fine.argmin())
            raise ValueError(
                f"{name}[{where}]: a positive time in microseconds, not {times[where]}: leave the sample out"
            )


def _check_overhead(overhead_us: float) -> None:
    if not (np.isfinite(overhead_us) and overhead_us >= 0):
        raise ValueError(f"overhead_us: microseconds, 0 or more, not {overhead_us}")
