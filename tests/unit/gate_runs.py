"""Made-up runs of the gate, for the tests of how they are shown."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from conformance.gate.numerics import CellChange, Change
from conformance.gate.record import CellRecord, Record
from conformance.gate.result import Decisions, GateResult, Status
from conformance.gate.shown.history import Dated
from conformance.gate.verdicts import CellVerdict, Mode, Outcome, Reason, RunVerdict

RATIOS = {Outcome.SLOWER: 1.05, Outcome.INCONCLUSIVE: 1.01, Outcome.FASTER: 0.93, Outcome.SAME: 1.0}
HOSTILE = (
    "a|b|c v1:M=1",
    "ends in a backslash\\| v1:M=2",
    "<script>alert(1)</script> </code></details></table> v1:M=3",
    "two\nlines\r\n| x | y |\n\n# heading v1:M=4",
    "`code` ``two`` *bold* __under_scores__ [link](javascript:x) ![i](https://a.example/x.png) v1:M=5",
    "@somebody #12 www.a.example https://b.example ~~gone~~ $x$ v1:M=6",
    "名前 é ẞ 🙂 v1:M=7",
    "nul\x00 bell\x07 surrogate\ud800 override\u202e end\ufffe v1:M=8",
    "&amp; &#124; &lt;b&gt; {{ 7 * 7 }} {% raw %} ]]> --> v1:M=9",
    "very long " + "x" * 5000 + " v1:M=10",
)


def verdict(cell: str, outcome: Outcome, ratio: float | None = None, half: float = 0.005) -> CellVerdict:
    """One cell's; its limits lie `half` times the ratio to either side."""
    ratio = RATIOS[outcome] if ratio is None else ratio
    reason = Reason.NOISE if outcome is Outcome.INCONCLUSIVE else None
    if reason and math.isnan(ratio):
        reason = Reason.SHARED
    limits = (ratio * (1 - half), ratio * (1 + half))
    return CellVerdict(cell, outcome, ratio, *limits, 0.01, 0.006, 96, 4, "screen", reason)


def verdicts(names: Sequence[str], outcomes: Sequence[Outcome] = tuple(Outcome)) -> RunVerdict:
    """Cells with these outcomes in turn."""
    cells = [verdict(name, outcomes[k % len(outcomes)]) for k, name in enumerate(names)]
    return RunVerdict(Mode.TWO_PROCESSES, tuple(cells), 12.5e6, 0.005)


def change(cell: str, kind: Change) -> CellChange:
    differing = 0 if kind is Change.SAME_BITS else 30
    larger, smaller = {Change.WORSE: (29, 1), Change.BETTER: (1, 29), Change.CHANGED: (14, 16)}.get(kind, (0, 0))
    medians = ((0.01, 0.3), (0.014, 0.4))
    return CellChange(cell, kind, 30, differing, larger, smaller, 0.25, *medians, ("v1:M=17,law=skewed", 1.7))


def run(
    speed: RunVerdict | None = None,
    numerics: Sequence[CellChange] | None = None,
    decisions: Decisions | None = None,
    left: Mapping[str, str] | None = None,
) -> GateResult:
    """A run with these parts, in which what is not run has a reason."""
    parts = {"speed": speed, "numerics": numerics, "decisions": decisions}
    reasons = {part: f"{part} was not asked for" for part, found in parts.items() if found is None}
    return GateResult(
        "this checkout with its base",
        "Example GPU 80GB",
        "2026-11-30T03:17:00+00:00",
        {"fp8moe": "0.1.0", "torch": "2.13.0"},
        decisions,
        numerics,
        speed,
        {**reasons, **(left or {})},
        {"SM clock, MHz": "1200 to 1980"},
    )


def whole(names: Sequence[str]) -> GateResult:
    """All parts, each name in each of them with every verdict in turn."""
    kinds = list(Change)
    numerics = [change(name, kinds[k % len(kinds)]) for k, name in enumerate(names)]
    return run(verdicts(names), numerics, Decisions(Status.FAILED, [f"device = {name}: A -> B" for name in names]))


def record(
    log_ratios: Mapping[str, float], setting: Mapping[str, str] | None = None, yardstick: str = "memory"
) -> Record:
    """A process's; a cell whose log ratio is NaN had too few valid rounds."""
    cells = {
        name: CellRecord(yardstick, value, math.nan if math.isnan(value) else 0.001, 15, 32, 0)
        for name, value in log_ratios.items()
    }
    return Record(setting or {"driver": "1"}, cells, {"memory": 100.0, "compute": 200.0}, 1e6)


def days(*log_ratios: Mapping[str, float]) -> list[Dated]:
    """A run a day, from the first of the month on."""
    return [Dated(f"2026-11-{day:02d}T03:17:00+00:00", record(of_day)) for day, of_day in enumerate(log_ratios, 1)]
