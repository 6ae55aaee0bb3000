"""The stored gate: a run against records of earlier processes or days, through yardsticks measured in all of them.

A cell's time is taken over that of a yardstick of its own kind of work in the same round: what changes both alike, from
clocks to memory rates, cancels. What does not, widens the interval:

- Noise within each process, by the block bootstrap over visits that lie seconds apart.
- The yardsticks themselves may have moved apart by d between the runs, say since the clocks are lower today and memory
  is not. A cell that follows another yardstick with a part f of its time (`Policy.follows_other`) has then moved by as
  much as f d against its own, in either direction: both limits are wider by f d.
- Memory lies elsewhere in each process: the margin allows for it.

There is no screen: the errors of the baseline are the same in any new sample of this run, so a second look at suspects
would not be fresh. Holm's procedure goes over all cells at once, at level alpha for "slower" and again for "faster".
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from conformance.gate.families import beyond, mirrored
from conformance.gate.interval import Estimate
from conformance.gate.policy import DEFAULT, Policy
from conformance.gate.record import CellRecord, Record
from conformance.gate.samples import Flag
from conformance.gate.student import normal_quantile
from conformance.gate.verdicts import REASON_OF, CellVerdict, Mode, Outcome, Reason, RunVerdict

STAGE = "stored"
CALIBRATES = 3
"""Records of a baseline from which the spread between processes is taken rather than assumed; two would give one
difference a cell, of the kind that is to be judged."""


def judge_stored(run: Record, baseline: Sequence[Record], policy: Policy = DEFAULT) -> RunVerdict:
    """A verdict on every cell of the run.

    Args:
        baseline: records of earlier processes, one or more; with three or more, a spread between them that is wider
            than assumed widens the margin.

    Raises:
        ValueError: no baseline; one of another setting, with other yardsticks, or with another yardstick for a cell.
    """
    _check_comparable(run, baseline)
    moved = moved_apart(run, baseline)
    slack = policy.follows_other * moved
    margin = max(policy.margin_stored, measured_margin(baseline, len(run.cells), policy.alpha))
    changes = {
        name: change
        for name, cell in run.cells.items()
        if (change := _change(cell, [record.cells[name] for record in baseline if name in record.cells]))
    }
    comparable = {} if moved > policy.most_moved else changes
    bound = math.log1p(margin) + slack
    slower = beyond(comparable, bound, policy.alpha, len(run.cells))
    faster = beyond(mirrored(comparable), bound, policy.alpha, len(run.cells))
    verdicts = []
    for name, cell in run.cells.items():
        found = changes.get(name)
        level = slower.get(name, faster.get(name, policy.same_level))
        reason: Reason | None = None
        if name in slower or name in faster:
            outcome = Outcome.SLOWER if name in slower else Outcome.FASTER
        elif name in comparable and _within(comparable[name], slack, policy):
            outcome = Outcome.SAME
        else:
            outcome, reason = Outcome.INCONCLUSIVE, _why(name, cell, baseline, moved, slack, changes, policy)
        limits = (math.nan,) * 3
        if found is not None:
            limits = (found.log_ratio, found.low(level) - slack, found.high(level) + slack)
        ratio, low, high = (math.exp(limit) for limit in limits)
        verdicts.append(
            CellVerdict(name, outcome, ratio, low, high, level, margin, cell.rounds, cell.dropped, STAGE, reason)
        )
    return RunVerdict(Mode.STORED, tuple(verdicts), run.spent_us, policy.alpha)


def moved_apart(run: Record, baseline: Sequence[Record]) -> float:
    """The largest change of one yardstick's log time less the smallest of another's, from the baseline to the run."""
    changes = [
        math.log(us) - float(np.mean([math.log(record.yardsticks_us[name]) for record in baseline]))
        for name, us in run.yardsticks_us.items()
    ]
    return max(changes) - min(changes)


def measured_margin(baseline: Sequence[Record], cells: int, alpha: float) -> float:
    """What the spread between the baseline's own processes asks for; 0 with fewer than three of them.

    The standard deviation of a cell's log ratio over processes, pooled over cells (noise within them included), times
    sqrt(1 + 1 / B) for a new process against the mean of B, times the normal quantile of alpha over the cells.
    """
    if len(baseline) < CALIBRATES:
        return 0.0
    common = set.intersection(*(set(record.cells) for record in baseline))
    ratios = np.array([[record.cells[name].log_ratio for name in sorted(common)] for record in baseline])
    ratios = ratios[:, np.isfinite(ratios).all(axis=0)]
    if not ratios.size:
        return 0.0
    spread = math.sqrt(float(ratios.var(axis=0, ddof=1).mean()))
    return math.expm1(normal_quantile(alpha / cells) * spread * math.sqrt(1 + 1 / len(baseline)))


def _change(cell: CellRecord, before: Sequence[CellRecord]) -> Estimate | None:
    """From the mean of the records before to this run, with Welch's degrees of freedom, rounded down."""
    before = [record for record in before if math.isfinite(record.log_ratio)]
    if not before or not math.isfinite(cell.log_ratio):
        return None
    parts = [(cell.spread**2, cell.freedom)]
    parts += [((record.spread / len(before)) ** 2, record.freedom) for record in before]
    variance = sum(part for part, _ in parts)
    freedom = variance**2 / sum(part**2 / of for part, of in parts) if variance else parts[0][1]
    change = cell.log_ratio - sum(record.log_ratio for record in before) / len(before)
    return Estimate(change, math.sqrt(variance), max(int(freedom), 1))


def _within(found: Estimate, slack: float, policy: Policy) -> bool:
    level, bound = policy.same_level, math.log1p(policy.stored_aim) - slack
    return -bound < found.low(level) and found.high(level) < bound


def _why(
    name: str,
    cell: CellRecord,
    baseline: Sequence[Record],
    moved: float,
    slack: float,
    changes: Mapping[str, Estimate],
    policy: Policy,
) -> Reason:
    """Of a cell that is inconclusive: what stands in the way."""
    before = [record.cells[name] for record in baseline if name in record.cells]
    if not before:
        return Reason.NO_BASELINE
    if name not in changes:
        flags = [record.trouble for record in (cell, *before) if not math.isfinite(record.log_ratio) and record.trouble]
        return REASON_OF[Flag(flags[0])] if flags else Reason.NO_SAMPLES
    if moved > policy.most_moved or _within(changes[name], 0.0, policy):
        return Reason.CLOCKS
    return Reason.NOISE


def _check_comparable(run: Record, baseline: Sequence[Record]) -> None:
    if not baseline:
        raise ValueError("baseline: at least one record, not none: measure one first")
    for index, record in enumerate(baseline):
        for name in sorted(set(run.setting) | set(record.setting)):
            here, there = run.setting.get(name), record.setting.get(name)
            if here != there:
                raise ValueError(f"baseline[{index}].setting[{name!r}]: {here!r}, as in this run, not {there!r}")
        if set(run.yardsticks_us) != set(record.yardsticks_us):
            here_, there_ = sorted(run.yardsticks_us), sorted(record.yardsticks_us)
            raise ValueError(f"baseline[{index}].yardsticks_us: {here_}, as in this run, not {there_}")
        for name in run.cells.keys() & record.cells.keys():
            if run.cells[name].yardstick != record.cells[name].yardstick:
                raise ValueError(
                    f"baseline[{index}].cells[{name!r}].yardstick: {run.cells[name].yardstick!r}, as in this run, "
                    f"not {record.cells[name].yardstick!r}"
                )
