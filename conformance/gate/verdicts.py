"""What the gate says: of each cell slower, faster, same or inconclusive with a reason; of a run, what it cost."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

from conformance.gate.samples import Flag
from fp8moe.counted import counted


class Outcome(str, Enum):
    """Of one cell: version B against version A, or this run against the stored one."""

    SLOWER = "slower"
    """By more than the margin; the error that the whole run's false-alarm rate is about."""
    FASTER = "faster"
    """By more than the margin."""
    SAME = "same"
    """The whole interval lies within the aim."""
    INCONCLUSIVE = "inconclusive"


class Reason(str, Enum):
    """Why a cell is inconclusive."""

    NOISE = "noise too wide"
    THROTTLED = "throttled"
    CLOCKS = "clocks changed"
    SHARED = "GPU shared with other work"
    BUDGET = "time budget spent"
    NO_SAMPLES = "sampler gave too few samples"
    NO_BASELINE = "not in the baseline"
    UNWATCHED = "device state not watched"


REASON_OF = {Flag.THROTTLED: Reason.THROTTLED, Flag.CLOCKS_CHANGED: Reason.CLOCKS, Flag.SHARED: Reason.SHARED}
"""Of a cell too few of whose samples are valid."""


class Mode(str, Enum):
    """How times were compared; results of different modes are never mixed."""

    ONE_PROCESS = "paired, one process"
    TWO_PROCESSES = "paired, two processes"
    STORED = "stored"


@dataclass(frozen=True)
class CellVerdict:
    """Of one cell.

    Args:
        ratio, low, high: time of B over that of A, with its limits; NaN where nothing was measured.
        level: probability with which either limit is wrong.
        margin: what the ratio had to exceed 1 by, more than noise allows, to be slower (or fall short of, for faster).
        pairs: valid samples behind the ratio.
        dropped: invalid samples left out, over all stages.
        stage: "screen", or "confirm" where the ratio is that of fresh pairs of a suspect; "stored".
        reason: why, where inconclusive.
    """

    cell: str
    outcome: Outcome
    ratio: float
    low: float
    high: float
    level: float
    margin: float
    pairs: int
    dropped: int
    stage: str
    reason: Reason | None = None

    def __str__(self) -> str:
        told = self.outcome.value if self.reason is None else f"{self.outcome.value} ({self.reason.value})"
        if math.isnan(self.ratio):
            return f"{self.cell}: {told}, {counted(self.dropped, 'sample')} dropped"
        return (
            f"{self.cell}: {told}, ratio {self.ratio:.4f} in {self.low:.4f} to {self.high:.4f} "
            f"(each limit wrong at {self.level:.2g}), margin {self.margin:.2%}, "
            f"{counted(self.pairs, 'sample')} ({self.stage}), {self.dropped} dropped"
        )


@dataclass(frozen=True)
class RunVerdict:
    """Of all cells of a run, in the order in which they were given; `alpha` is that of the whole family."""

    mode: Mode
    cells: tuple[CellVerdict, ...]
    spent_us: float
    alpha: float

    def of(self, outcome: Outcome) -> tuple[CellVerdict, ...]:
        """The cells with this outcome."""
        return tuple(cell for cell in self.cells if cell.outcome is outcome)

    @property
    def slower(self) -> tuple[CellVerdict, ...]:
        """The accused."""
        return self.of(Outcome.SLOWER)

    def unwatched(self) -> RunVerdict:
        """The same without verdicts, since the device may have been shared, throttled or set otherwise."""
        cells = [
            replace(cell, outcome=Outcome.INCONCLUSIVE, reason=cell.reason or Reason.UNWATCHED) for cell in self.cells
        ]
        return replace(self, cells=tuple(cells))

    def lines(self) -> list[str]:
        """For a person: a summary, and each cell that is not the same."""
        counts = ", ".join(f"{len(self.of(outcome))} {outcome.value}" for outcome in Outcome)
        first = f"{self.mode.value}: {counts}; {self.spent_us / 1e6:.1f} s of device time, family-wise {self.alpha:.2g}"
        return [first, *(str(cell) for cell in self.cells if cell.outcome is not Outcome.SAME)]

    def as_json(self) -> dict[str, Any]:
        """Plain data; a figure that was not measured is None."""
        return {
            "mode": self.mode.value,
            "spent_us": self.spent_us,
            "alpha": self.alpha,
            "cells": [
                {name: value.value if isinstance(value, Enum) else _figure(value) for name, value in vars(cell).items()}
                for cell in self.cells
            ],
        }


def _figure(value: object) -> object:
    return None if isinstance(value, float) and math.isnan(value) else value
