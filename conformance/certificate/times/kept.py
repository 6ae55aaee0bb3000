"""What a certificate has of times: whether they were taken, and every round of every case, as two files.

`rounds.json` has what each backend took on each case, round by round; `times.json` is the same as a table that
`fp8moe explain --measured` reads, of the backends that can be selected. Floors, shares and regrets are in neither:
`judged` derives them from the rounds.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from conformance.cases import Case
from conformance.pinned import checkpoint_cases
from conformance.plan import Target
from conformance.timing.rows import SOURCE, VERSIONS, rows_of
from conformance.timing.side_by_side import typical
from fp8moe.measured import MeasuredTable
from fp8moe.measured.rows import MeasuredDevice

TABLE, ROUNDS = "times.json", "rounds.json"
FORMAT, WITHOUT_STATE = "fp8moe-rounds/2", "fp8moe-rounds/1"
TAKEN, NOT_TAKEN, FAILED = "taken", "not taken", "failed"
BEFORE = "it was made before certificates had any"
FIRST_TOKENS = (64, 4096, 1, 1000, 7)
"""The order of cases, so that what there is time for tells of decoding and of prefill."""
LARGE = 128 << 20
"""Layers from these bytes on come last: to build one takes as long as to time several."""


@dataclass(frozen=True)
class TimedCase:
    """
    Args:
        case: its id.
        selected: by the selector's own order; "" where nothing is.
        us: microseconds of a call, of each round, by backend.
        absent: backends without a time, and why.
        state: of the device meanwhile, as `conformance.timing.state.Watch.figures` has it; empty in format 1.
    """

    case: str
    selected: str
    us: Mapping[str, Sequence[float]]
    absent: Mapping[str, str] = field(default_factory=dict)
    state: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def typical_us(self) -> dict[str, float]:
        """Of each backend."""
        return {name: typical(np.array(rounds, dtype=np.float64)) for name, rounds in self.us.items()}


@dataclass(frozen=True)
class Times:
    """
    Args:
        status: TAKEN, NOT_TAKEN or FAILED.
        reason: why there are none; "" where there are.
        device: name, kind and architecture, as the process that took them saw it.
        rates: of the device, as `conformance.rates` had them.
        cases: the first of `planned`, in its order.
    """

    status: str = NOT_TAKEN
    reason: str = BEFORE
    device: Mapping[str, str] = field(default_factory=dict)
    rates: Mapping[str, Any] = field(default_factory=dict)
    cases: Sequence[TimedCase] = ()

    @property
    def told(self) -> dict[str, str]:
        """In the evidence."""
        return {"status": self.status, "reason": self.reason}

    def files(self, versions: Mapping[str, str]) -> dict[str, bytes]:
        """By name; none where no times were taken.

        Args:
            versions: of the run.

        Raises:
            ValueError: a device, backend or version that no table has.
        """
        if self.status != TAKEN:
            return {}
        told = {"format": FORMAT, "device": dict(self.device), "rates": dict(self.rates)}
        cases = ",\n  ".join(json.dumps(asdict(case)) for case in self.cases)
        head = "".join(f" {json.dumps(name)}: {json.dumps(value)},\n" for name, value in told.items())
        return {ROUNDS: f'{{\n{head} "cases": [\n  {cases}\n ]\n}}\n'.encode(), TABLE: self._table(versions).encode()}

    def _table(self, versions: Mapping[str, str]) -> str:
        rows = rows_of((Case.parse(one.case), one.typical_us) for one in self.cases)
        of = {name: versions[name] for name in VERSIONS if versions.get(name, "none") != "none"}
        return MeasuredTable(MeasuredDevice(**self.device), of, rows, {}, SOURCE).dumps()


def planned(takes: Mapping[str, Sequence[str]], target: Target) -> list[Case]:
    """The cases that are timed on a backend, in their order.

    Args:
        takes: activations by scheme.
    """
    cases = (case for case in checkpoint_cases(target) if case.activation in takes.get(case.scheme, ()))
    return sorted(cases, key=lambda case: (case.weight_bytes >= LARGE, FIRST_TOKENS.index(case.tokens)))
