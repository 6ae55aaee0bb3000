"""What a run leaves behind for later ones to be compared with: each cell's time over its yardstick's, as JSON."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from conformance.gate.families import checked_names
from conformance.gate.interval import Estimate, estimate, interquartile_mean, timer_floor
from conformance.gate.policy import DEFAULT, Policy
from conformance.gate.samples import Flag, Rounds, RoundSampler, flags_in, valid_couples

FORMAT = 1
MAY_LACK = ("log_ratio", "spread")
"""Figures of a cell that are NaN where too few rounds were valid, and null in JSON, which has no NaN."""


@dataclass(frozen=True)
class CellRecord:
    """Of one cell in one process.

    Args:
        yardstick: whose times the cell's are over.
        log_ratio: the interquartile mean of log(cell / yardstick); NaN where too few rounds were valid.
        spread, freedom: as in `Estimate`.
        rounds, dropped: valid and invalid ones.
        trouble: the commonest flag of the invalid ones, 0 where none has one.
    """

    yardstick: str
    log_ratio: float
    spread: float
    freedom: int
    rounds: int
    dropped: int
    trouble: int = 0

    @property
    def estimate(self) -> Estimate:
        """The ratio and how sure it is within this process."""
        return Estimate(self.log_ratio, self.spread, self.freedom)


@dataclass(frozen=True)
class Record:
    """Of one run in one process.

    Args:
        setting: the sampler's; two records are comparable where it is the same.
        cells: by name.
        yardsticks_us: of each yardstick, microseconds: the interquartile mean of log times over the whole run.
        spent_us: device time of the run.
    """

    setting: Mapping[str, str]
    cells: Mapping[str, CellRecord]
    yardsticks_us: Mapping[str, float]
    spent_us: float

    def to_json(self) -> str:
        """The text of a baseline file."""
        given = {"format": FORMAT, **asdict(self)}
        for cell in given["cells"].values():
            cell |= {name: None for name in MAY_LACK if math.isnan(cell[name])}
        return json.dumps(given, indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Record:
        """The inverse of `to_json`.

        Raises:
            ValueError: not JSON, another format, or a field that is missing, unknown or of another type.
        """
        given = json.loads(text)
        if not isinstance(given, dict) or given.get("format") != FORMAT:
            found = given.get("format") if isinstance(given, dict) else given
            raise ValueError(f"format: {FORMAT}, not {found!r}: measure the baseline anew")
        try:
            cells = {name: _cell_of(cell) for name, cell in given["cells"].items()}
            yardsticks = {name: float(us) for name, us in given["yardsticks_us"].items()}
            setting = {str(name): str(value) for name, value in given["setting"].items()}
            return cls(setting, cells, yardsticks, float(given["spent_us"]))
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"not a record of a run: {error!r}: measure the baseline anew") from error


def _cell_of(given: Mapping[str, Any]) -> CellRecord:
    cell = CellRecord(**{**given, **{name: math.nan for name in MAY_LACK if given[name] is None}})
    numbers = (cell.log_ratio, cell.spread, cell.freedom, cell.rounds, cell.dropped, cell.trouble)
    if not isinstance(cell.yardstick, str) or not all(isinstance(number, (int, float)) for number in numbers):
        raise TypeError(f"a cell's fields are a name and numbers, not {given}")
    return cell


def measure(cells: Iterable[str], sampler: RoundSampler, policy: Policy = DEFAULT) -> Record:
    """Goes through all cells several times, a few rounds a visit, and sums up each.

    Visits of one cell lie far apart, so its spread has what changes slowly; a block of the bootstrap is a visit. Where
    rounds were invalid, as many visits again make up for them.

    Raises:
        ValueError: no cell or one twice; a cell whose yardstick is not in its rounds.
    """
    names = checked_names(cells)
    taken: dict[str, list[Rounds]] = {name: [] for name in names}
    missing = dict.fromkeys(names, policy.visits * policy.visit_rounds)
    for _ in range(2 * policy.visits):
        for name in [name for name in names if missing[name] > 0]:
            rounds = sampler.rounds(name, policy.visit_rounds)
            taken[name].append(rounds)
            missing[name] -= int(valid_couples(rounds.flags).sum())
    everything = [rounds for of_cell in taken.values() for rounds in of_cell]
    return Record(
        dict(sampler.setting),
        {name: _summed_up(name, sampler.yardstick(name), rounds, policy) for name, rounds in taken.items()},
        _yardsticks(everything),
        sum(rounds.spent_us for rounds in everything),
    )


def _summed_up(cell: str, yardstick: str, taken: list[Rounds], policy: Policy) -> CellRecord:
    if yardstick not in taken[0].yardsticks_us:
        known = sorted(taken[0].yardsticks_us)
        raise ValueError(f"yardstick({cell!r}): one of {known}, which the rounds have, not {yardstick!r}")
    valid = valid_couples(np.concatenate([rounds.flags for rounds in taken]))
    cell_us = np.concatenate([rounds.cell_us for rounds in taken])[valid]
    yardstick_us = np.concatenate([rounds.yardsticks_us[yardstick] for rounds in taken])[valid]
    flags: Counter[Flag] = sum((flags_in(rounds.flags) for rounds in taken), Counter())
    trouble = int(flags.most_common(1)[0][0]) if flags else 0
    count, dropped = len(cell_us), len(valid) - len(cell_us)
    if count < policy.least_pairs:
        return CellRecord(yardstick, math.nan, math.nan, 1, count, dropped, trouble)
    floor = timer_floor(cell_us, yardstick_us)
    found = estimate(np.log(cell_us / yardstick_us), floor, policy.resamples, policy.seed)
    return CellRecord(yardstick, found.log_ratio, found.spread, found.freedom, count, dropped, trouble)


def _yardsticks(everything: list[Rounds]) -> dict[str, float]:
    """Of all rounds, valid or not: the interquartile mean does not see what is rare."""
    names = everything[0].yardsticks_us
    times = {name: np.concatenate([rounds.yardsticks_us[name] for rounds in everything]) for name in names}
    return {name: float(np.exp(interquartile_mean(np.log(us)))) for name, us in times.items()}
