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
from conformance.typed import check_object
from conformance.untrusted import Malformed, shown

FORMAT = 1
ANY_FLAG = sum(Flag)
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
        return cls.from_object(json.loads(text))

    @classmethod
    def from_object(cls, given: Any) -> Record:
        """The same, of what the text holds.

        Raises:
            ValueError: as `from_json`.
        """
        if not isinstance(given, dict) or given.get("format") != FORMAT:
            found = given.get("format") if isinstance(given, dict) else given
            raise ValueError(f"format: {FORMAT}, not {shown(found)}: measure the baseline anew")
        told = {name: value for name, value in given.items() if name != "format"}
        cells = told.get("cells")
        try:
            if isinstance(cells, dict):
                told["cells"] = {name: _with_nan(cell) for name, cell in cells.items()}
            check_object(told, cls, "record")
            told["cells"] = {name: _cell_of(cell) for name, cell in told["cells"].items()}
            record = cls(**told)
            record._check_figures()
        except Malformed as error:
            raise ValueError(f"not a record of a run: {error}: measure the baseline anew") from None
        return record

    def _check_figures(self) -> None:
        """What the gate takes logarithms of and divides by is there, and positive.

        Raises:
            conformance.untrusted.Malformed: it is not.
        """
        wrong = [f"yardsticks_us[{shown(name)}]={us}" for name, us in self.yardsticks_us.items() if not us > 0]
        for name, cell in self.cells.items():
            known = cell.yardstick in self.yardsticks_us and 0 <= cell.trouble <= ANY_FLAG
            if not known or cell.freedom < 1 or cell.spread < 0:
                wrong.append(f"cells[{shown(name)}]")
        if wrong:
            raise Malformed(f"{wrong[0]}: no figures of a run")


def _with_nan(cell: Any) -> Any:
    """Figures that JSON has no number for as the text that stands for them."""
    if not isinstance(cell, dict):
        return cell
    return {**cell, **{name: "nan" for name in MAY_LACK if name in cell and cell[name] is None}}


def _cell_of(given: Mapping[str, Any]) -> CellRecord:
    return CellRecord(**{**given, **{name: float(given[name]) for name in MAY_LACK}})


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
