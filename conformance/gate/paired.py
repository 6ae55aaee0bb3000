"""The paired gate: every cell is screened with few pairs, and fresh pairs judge those under suspicion.

Why the error rates hold. Let m be the margin and call a cell *null* if B is slower than A by at most m, whatever the
steady cause. A cell is called slower only by fresh pairs, taken after the screen:

1. The screen picks the suspects. Given which, their fresh pairs are as they would be without a screen: the noise of
   pairs taken at different times is independent, and what stays (memory placement) is part of the ratio, which m allows
   for.
2. There are several looks at growing sets of fresh pairs. Look j is Holm's procedure at level alpha_j, sum alpha_j <=
   alpha, over the k suspects not yet rejected; one that was found to be the same, or whose budget ended, still counts.
   Take the first null that is rejected, at look j. None rejected before is null, so the nulls are at most k, and it was
   compared at alpha_j / k' with k' at least their number: by the union bound some null passes with probability alpha_j
   at most. Neither looks nor cells need be independent of each other.
3. Over the looks: P(any false "slower" | suspects) <= alpha, for every set of suspects, hence without the condition.

Holm is over the suspects, seldom more than two where nothing changed, and not over all cells: that is what the screen
buys, beside time. What it costs is power: a slow cell that it clears is lost. It clears a cell whose interval lies
within +- `Policy.cleared`, at a level that is each cell's own.

"Faster" has the same alpha of its own, by symmetry.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from conformance.gate.families import beyond, checked_names, mirrored
from conformance.gate.interval import Estimate, estimate, timer_floor
from conformance.gate.policy import DEFAULT, Policy
from conformance.gate.samples import Flag, PairSampler, Samples, flags_in, valid_couples
from conformance.gate.verdicts import REASON_OF, CellVerdict, Mode, Outcome, Reason, RunVerdict

PROBE = 2
"""Pairs that tell what a pair costs; they count in the screen."""
DISTURBED = frozenset(REASON_OF.values())


def judge_paired(cells: Iterable[str], sampler: PairSampler, policy: Policy = DEFAULT) -> RunVerdict:
    """A verdict on every cell of a run.

    Args:
        cells: names that the sampler knows, each once.

    Raises:
        ValueError: no cell or one twice; a sampler with neither one nor two processes, or with more pairs than asked.
    """
    run = _Run(checked_names(cells), sampler, policy)
    run.screen()
    run.confirm()
    return RunVerdict(run.mode, tuple(run.verdicts[name] for name in run.cells), run.spent_us, policy.alpha)


@dataclass
class _Gathered:
    """Samples of one cell, over one or more calls of the sampler; `earlier` were dropped in an attempt before."""

    log_ratios: list[NDArray[np.float64]] = field(default_factory=list)
    times: list[NDArray[np.float64]] = field(default_factory=list)
    flags: Counter[Flag] = field(default_factory=Counter)
    dropped: int = 0
    pairs: int = 0
    earlier: int = 0

    def add(self, samples: Samples) -> None:
        valid = valid_couples(samples.flags)
        self.log_ratios.append(np.log(samples.b_us[valid] / samples.a_us[valid]))
        self.times.append(np.stack([samples.a_us, samples.b_us]))
        self.flags.update(flags_in(samples.flags))
        self.dropped += int((~valid).sum())
        self.pairs += int(valid.sum())

    @property
    def pair_us(self) -> float:
        """What a pair costs: the mean, of the valid and the invalid."""
        return float(np.concatenate(self.times, axis=1).sum(axis=0).mean())

    @property
    def longest_us(self) -> float:
        """What a pair has cost at most."""
        return float(np.concatenate(self.times, axis=1).sum(axis=0).max())

    def estimate(self, policy: Policy) -> Estimate:
        floor = timer_floor(*np.concatenate(self.times, axis=1))
        return estimate(np.concatenate(self.log_ratios), floor, policy.resamples, policy.seed)

    def trouble(self, policy: Policy) -> Reason | None:
        """Why there can be no verdict from these samples; None where there can."""
        if self.pairs >= policy.least_pairs and self.dropped <= policy.most_dropped * (self.pairs + self.dropped):
            return None
        return REASON_OF[self.flags.most_common(1)[0][0]] if self.flags else Reason.NO_SAMPLES


class _Run:
    def __init__(self, cells: Sequence[str], sampler: PairSampler, policy: Policy) -> None:
        self.cells, self.sampler, self.policy = cells, sampler, policy
        self.margin = policy.margin(sampler.processes)
        self.mode = Mode.ONE_PROCESS if sampler.processes == 1 else Mode.TWO_PROCESSES
        self.screened = {cell: _Gathered() for cell in cells}
        self.planned: dict[str, int] = {}
        self.suspects: dict[str, Estimate] = {}
        self.verdicts: dict[str, CellVerdict] = {}
        self.spent_us = 0.0
        self.overhead_us = 0.0  # the largest so far, which any call may cost again

    def screen(self) -> None:
        """Clears what is clearly the same; the rest is under suspicion, or cannot be judged.

        A cell whose samples were disturbed has one more chance at the end: heat passes.
        """
        for cell in self.cells:
            self._screen_one(cell)
        disturbed = [cell for cell, verdict in self.verdicts.items() if verdict.reason in DISTURBED]
        for cell in disturbed:
            before = self.verdicts.pop(cell)
            self.screened[cell] = _Gathered(earlier=before.dropped)
            self._screen_one(cell)

    def _screen_one(self, cell: str) -> None:
        gathered = self.screened[cell]
        if self._left():
            self._sample(cell, PROBE, gathered)
        reason: Reason | None = None
        if not gathered.times:
            reason = Reason.NO_SAMPLES if self._left() else Reason.BUDGET
        else:
            self.planned[cell] = self._screen_pairs(gathered.pair_us)
            reason = gathered.trouble(self.policy) if self._reach(cell, self.planned[cell], gathered) else Reason.BUDGET
        if reason is not None:
            self._conclude(cell, gathered, None, "screen", reason)
            return
        found = gathered.estimate(self.policy)
        if self._within(found, self.policy.cleared):
            self._conclude(cell, gathered, found, "screen")
        else:
            self.suspects[cell] = found

    def confirm(self) -> None:
        """Judges the suspects, the clearest first, by fresh pairs; each look has twice as many as the one before."""
        policy, rejected = self.policy, {Outcome.SLOWER: 0, Outcome.FASTER: 0}
        latest = dict(self.suspects)
        fresh = {cell: _Gathered() for cell in latest}
        for look, part in enumerate(policy.looks):
            last = look == len(policy.looks) - 1
            seen: dict[str, Estimate] = {}
            # What is told by the evidence so far comes first: the budget may end with noise, not with a slow cell.
            order = sorted(latest, key=lambda cell: abs(latest[cell].log_ratio) / latest[cell].spread, reverse=True)
            for cell in [cell for cell in order if cell not in self.verdicts]:
                fits = self._reach(cell, self.planned[cell] << look, fresh[cell])
                reason = Reason.BUDGET if not fits else fresh[cell].trouble(policy)
                if reason is None:
                    seen[cell] = fresh[cell].estimate(policy)
                elif last or not fits:
                    self._give_up(cell, fresh[cell], reason)
            latest |= seen
            for outcome, estimates in ((Outcome.SLOWER, seen), (Outcome.FASTER, mirrored(seen))):
                family = len(latest) - rejected[outcome]
                found = beyond(estimates, math.log1p(self.margin), policy.alpha * part, family)
                rejected[outcome] += len(found)
                for cell, level in found.items():
                    self._conclude(cell, fresh[cell], seen[cell], "confirm", outcome=outcome, level=level)
            for cell in [cell for cell in seen if cell not in self.verdicts]:
                if self._within(seen[cell], policy.aim if last else policy.cleared):
                    self._conclude(cell, fresh[cell], seen[cell], "confirm")
                elif last:
                    self._conclude(cell, fresh[cell], seen[cell], "confirm", Reason.NOISE)

    def _give_up(self, cell: str, fresh: _Gathered, reason: Reason) -> None:
        """Without the samples of this look: what the looks before it show, else what the screen does."""
        stage, gathered = (
            ("confirm", fresh) if fresh.pairs >= self.policy.least_pairs else ("screen", self.screened[cell])
        )
        found = gathered.estimate(self.policy)
        same = stage == "confirm" and fresh.trouble(self.policy) is None and self._within(found, self.policy.aim)
        self._conclude(cell, gathered, found, stage, None if same else reason)

    def _screen_pairs(self, pair_us: float) -> int:
        affordable = 2 * int(self.policy.screen_us / pair_us / 2)
        return min(max(affordable, self.policy.least_pairs), self.policy.most_pairs)

    def _left(self) -> float:
        return max(self.policy.budget_us - self.spent_us, 0.0)

    def _reach(self, cell: str, pairs: int, gathered: _Gathered) -> bool:
        """Samples up to so many pairs, once more if too many were invalid; False if the budget does not allow it."""
        longest_us = (gathered if gathered.times else self.screened[cell]).longest_us
        for target in (pairs, self.policy.least_pairs):
            missing = target - gathered.pairs
            if missing > 0:
                if missing * longest_us + self.overhead_us > self._left():
                    return False
                self._sample(cell, missing, gathered)
        return True

    def _sample(self, cell: str, count: int, gathered: _Gathered) -> None:
        samples = self.sampler.pairs(cell, count)
        if len(samples.flags) > count:
            raise ValueError(f"pairs({cell!r}, {count}): at most {count} pairs, not {len(samples.flags)}")
        self.spent_us += samples.spent_us
        self.overhead_us = max(self.overhead_us, samples.overhead_us)
        if len(samples.flags):
            gathered.add(samples)

    def _within(self, found: Estimate, limit: float) -> bool:
        level, bound = self.policy.same_level, math.log1p(limit)
        return -bound < found.low(level) and found.high(level) < bound

    def _conclude(
        self,
        cell: str,
        gathered: _Gathered,
        found: Estimate | None,
        stage: str,
        reason: Reason | None = None,
        outcome: Outcome = Outcome.SAME,
        level: float | None = None,
    ) -> None:
        level = self.policy.same_level if level is None else level
        limits = (math.nan,) * 3 if found is None else (found.log_ratio, found.low(level), found.high(level))
        ratio, low, high = (math.exp(value) for value in limits)
        screened = self.screened[cell]
        dropped = screened.earlier + screened.dropped + (0 if gathered is screened else gathered.dropped)
        self.verdicts[cell] = CellVerdict(
            cell,
            outcome if reason is None else Outcome.INCONCLUSIVE,
            ratio,
            low,
            high,
            level,
            self.margin,
            gathered.pairs,
            dropped,
            stage,
            reason,
        )
