"""Kept times judged again: the floor from the case and the device's rates, the regrets from the rounds; and what about
them cannot be. The file is untrusted, and nothing but cases of the suite is drawn."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from conformance.cases import Case
from conformance.certificate.times.kept import TAKEN, TimedCase, Times, planned
from conformance.editions import target_of
from conformance.performs import Floor, Work, floor_of, work_of_case
from conformance.rates import Rates, rates_of
from conformance.report import Report
from conformance.timing.side_by_side import Regret, SideBySide, regret
from fp8moe.counted import counted

TARGETS = ("cuda", "rocm")
"""Whose devices can be timed."""
_work = lru_cache(maxsize=1024)(work_of_case)


@dataclass(frozen=True)
class Judged:
    """One case.

    Args:
        floor: by the device's data sheet.
        own, selected: what the backend, and the one that is selected here, cost over the fastest; None without a time.
    """

    timed: TimedCase
    case: Case
    floor: Floor
    own: Regret | None
    selected: Regret | None

    def too_fast(self, name: str) -> str:
        """How a backend took less time than the work needs; "" where it did not."""
        us = self.timed.typical_us[name]
        if us >= self.floor.us:
            return ""
        need = f"less than the {self.floor.us:.4g} us that its {self.floor.by} need by the data sheet"
        return f"{name} took {us:.4g} us, {need}: not all of the work was done, or this is another device"


def judged(one: TimedCase, backend: str, rates: Rates) -> Judged:
    """
    Args:
        one: a case of the suite.
        backend: the one that the certificate is of.
    """
    case = Case.parse(one.case)
    work: Work = _work(case)
    times = SideBySide({name: np.array(us, dtype=np.float64) for name, us in one.us.items()}, one.absent, work, {})
    own, selected = (regret(times, name) if name in one.us else None for name in (backend, one.selected))
    return Judged(one, case, floor_of(work, rates, case.scheme), own, selected)


def all_judged(times: Times, report: Report) -> list[Judged]:
    """Every case that the suite has, where the device's rates are known; whatever else is there is not looked at."""
    rates = rates_of(str(times.device.get("name")))
    if times.status != TAKEN or rates is None or report.target not in TARGETS:
        return []
    known = set(map(str, planned(report.takes, target_of(report.target))))
    cases = {one.case: one for one in times.cases if one.case in known}  # each once, however often it is there
    return [judged(one, report.origin, rates) for one in cases.values()]


def summary(times: Times, report: Report) -> list[str]:
    """In words, a line each: over which cases, the share of the floor, the regrets, and who was absent."""
    found = all_judged(times, report)
    if not found:
        return [f"times: {times.status}{f': {times.reason}' if times.reason else ''}"]
    name = report.origin
    mine = [one for one in found if one.own is not None]
    shares = sorted(one.floor.us / one.timed.typical_us[name] for one in mine)
    of = len(planned(report.takes, target_of(report.target)))
    told = [
        f"times: {name} on {len(mine)} of {counted(of, 'published case')}: the floor is {shares[0]:.0%} to "
        f"{shares[-1]:.0%} of its time, median {shares[len(shares) // 2]:.0%}"
    ] * bool(mine)
    regrets = {
        f"{name} over the fastest": [one.own for one in mine],
        "regret of the selected backend": [one.selected for one in found],
    }
    for what, values in regrets.items():
        costs = sorted(value.value for value in values if value is not None)
        if costs:
            of_cases = f"in {counted(len(costs), 'case')}"
            told.append(f"times: {what}: median {costs[len(costs) // 2]:.1%}, most {costs[-1]:.1%}, {of_cases}")
    told += [f"times: {line}" for line in watched(times)]
    return told + [f"times: absent: {who}, in {counted(count, 'case')}: {why}" for who, why, count in absent(times)]


def watched(times: Times) -> Iterator[str]:
    """What the device told of itself meanwhile; nothing where the certificate does not tell."""
    states = [one.state for one in times.cases if one.state]
    if not states:
        return
    clocks = [mhz for state in states for mhz in state["sm_mhz"] if mhz]
    if clocks:
        slower = Counter(reason for state in states for reason in state["slower"])
        told = ", ".join(f"{reason} in {counted(count, 'case')}" for reason, count in slower.most_common())
        yield f"SM clock {min(clocks)} to {max(clocks)} MHz; slower clocks: {told or 'none'}"
    shared = sum(state["processes"] > 1 for state in states)
    if shared:
        yield f"other processes were on the device in {counted(shared, 'case')}"
    for why, count in Counter(state["unwatched"] for state in states if state["unwatched"]).most_common():
        yield f"clocks not watched in {counted(count, 'case')}: {why}"


def absent(times: Times) -> list[tuple[str, str, int]]:
    """Who had no time, why, and in how many cases; the most frequent first."""
    found = Counter(each for one in times.cases for each in one.absent.items())
    return [(*each, count) for each, count in found.most_common()]


def contradictions(times: Times, report: Report, device: Mapping[str, Any]) -> Iterator[str]:
    """What about times cannot be, each with its place.

    Args:
        device: that the checks ran on, as the certificate describes it.
    """
    if times.status != TAKEN:
        return
    for name, told in times.device.items():
        if told != device.get(name):
            yield f"times: device.{name}={told[:80]!r}: the checks ran on {str(device.get(name))[:80]!r}"
    rates = rates_of(str(device.get("name")))
    if rates is None or report.target not in TARGETS:
        yield f"times: taken on {str(device.get('name'))[:80]}, a {report.target} device whose rates are not known"
        return
    if dict(times.rates) != asdict(rates):
        yield f"times: rates: {str(dict(times.rates))[:200]}: this suite has {asdict(rates)} for {device.get('name')}"
    expected = [str(case) for case in planned(report.takes, target_of(report.target))]
    cases = [one.case for one in times.cases]
    if not cases or cases != expected[: len(cases)]:
        yield f"times: the cases are not the first of the {len(expected)} that are timed for what this backend takes"
        return
    if not any(report.origin in one.us for one in times.cases):
        yield f"times: {report.origin} itself, which they are of, has none"
    for one in times.cases:
        wrong = list(_of_case(one, report))
        yield from (f"times: {one.case}: {text}" for text in wrong)
        if not wrong:
            found = judged(one, report.origin, rates)
            yield from (f"times: {one.case}: {text}" for text in map(found.too_fast, one.us) if text)


def _of_case(one: TimedCase, report: Report) -> Iterator[str]:
    both = sorted(one.us.keys() & one.absent.keys())
    if both:
        yield f"{', '.join(both)}: with times, and absent"
    for name, who in ((report.origin, "which the certificate is of"), (one.selected, "which is selected")):
        if name and name not in one.us and name not in one.absent:
            yield f"{name}, {who}, has neither a time nor a reason for none"
