"""The words that all presentations of a gate run share: its headline, what each part found, figures, and the order."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from conformance.gate.numerics import CellChange, Change
from conformance.gate.result import GateResult, Status
from conformance.gate.verdicts import CellVerdict, Mode, Outcome
from fp8moe.counted import counted

PARTS = ("decisions", "numerics", "speed")
OUTCOMES = (Outcome.SLOWER, Outcome.INCONCLUSIVE, Outcome.FASTER, Outcome.SAME)
"""As a person wants to read them."""
CHANGES = (Change.GONE, Change.WORSE, Change.CHANGED, Change.BETTER, Change.SAME_BITS)
STATUSES = {
    Status.PASSED: "passed",
    Status.FAILED: "failed",
    Status.INCONCLUSIVE: "inconclusive",
    Status.NOT_RUN: "not run",
}
NOT_MEASURED = "not measured"
NO_REASON = "no reason was given"
OF_WHAT = {
    Mode.ONE_PROCESS: "time of the new version over that of the old one",
    Mode.TWO_PROCESSES: "time of the new version over that of the old one",
    Mode.STORED: "time of this run over that of the baseline, both over their yardstick's",
}


def visible(text: str) -> str:
    """The text on one line, and what no reader sees (control and direction marks, lone surrogates) as its escape.

    What is left can be a part of XML, and cannot forge a second line of a report.
    """
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in text)


def clipped(text: str, most: int) -> str:
    """At most so many characters, the last an ellipsis where there were more."""
    return text if len(text) <= most else text[: most - 1] + "…"


def headline(result: GateResult) -> str:
    """The verdict in one line, with what led to it and what was not run."""
    if result.status is Status.NOT_RUN:
        return "nothing was run"
    said = STATUSES[result.status]
    leading = [_leading(result, part) for part, status in result.parts.items() if status is result.status]
    if result.status in (Status.FAILED, Status.INCONCLUSIVE):
        said += ": " + "; ".join(leading)
    missing = [part for part in PARTS if result.parts[part] is Status.NOT_RUN or part in result.left]
    return f"{said} (not everything was run: {', '.join(missing)})" if missing else said


def _leading(result: GateResult, part: str) -> str:
    """What made a part fail, or inconclusive."""
    failed = result.parts[part] is Status.FAILED
    if part == "speed" and result.speed is not None:
        accused = result.speed.of(Outcome.SLOWER if failed else Outcome.INCONCLUSIVE)
        return f"{counted(len(accused), 'cell')} {'slower' if failed else 'inconclusive in speed'}"
    if part == "numerics":
        worse = sum(cell.change in (Change.WORSE, Change.GONE) for cell in result.numerics or ())
        return f"{counted(worse, 'cell')} numerically worse"
    return "the selector decides otherwise" if failed else "decisions inconclusive"


def found(result: GateResult, part: str) -> str:
    """What one part came to, in numbers; of one that was not run, why."""
    if result.parts[part] is Status.NOT_RUN:
        return why_not(result, part)
    if part == "decisions" and result.decisions is not None:
        lines = result.decisions.lines
        said = f"{counted(len(lines), 'change')}, as rules" if lines else "no change"
        return f"{said}; {result.decisions.reason}" if result.decisions.reason else said
    if part == "numerics":
        cells = result.numerics or ()
        counts = [(change, sum(cell.change is change for cell in cells)) for change in CHANGES]
        return f"{counted(len(cells), 'cell')}: " + ", ".join(f"{count} {change.value}" for change, count in counts)
    assert result.speed is not None  # or it was not run
    outcomes = ", ".join(f"{len(result.speed.of(outcome))} {outcome.value}" for outcome in OUTCOMES)
    return (
        f"{counted(len(result.speed.cells), 'cell')}: {outcomes}; {result.speed.mode.value}, "
        f"{result.speed.spent_us / 1e6:.1f} s of device time"
    )


def why_not(result: GateResult, part: str) -> str:
    """Why a part was not run."""
    decided = result.decisions.reason if part == "decisions" and result.decisions is not None else ""
    return result.left.get(part) or decided or NO_REASON


def left(result: GateResult) -> list[tuple[str, str]]:
    """All that was not run, with its reason: the parts in their order, then what else is named."""
    parts = [part for part in PARTS if result.parts[part] is Status.NOT_RUN or part in result.left]
    others = [name for name in result.left if name not in PARTS]
    return [(name, why_not(result, name)) for name in (*parts, *others)]


def facts(result: GateResult) -> list[tuple[str, str]]:
    """Of the run: what was compared, the device and its state, the date, the versions."""
    versions = ", ".join(f"{name} {version}" for name, version in result.versions.items()) or "not known"
    first = [("compared", result.compared), ("device", result.device), ("date", result.date), ("versions", versions)]
    return [*first, *result.told.items()]


def by_outcome(cells: Iterable[CellVerdict]) -> list[CellVerdict]:
    """The accused first and the same last; in each, the largest ratio first, of the faster the smallest."""

    def key(cell: CellVerdict) -> tuple[int, float]:
        size = -math.inf if math.isnan(cell.ratio) else cell.ratio
        return OUTCOMES.index(cell.outcome), size if cell.outcome is Outcome.FASTER else -size

    return sorted(cells, key=key)


def by_change(cells: Iterable[CellChange]) -> list[CellChange]:
    """The worse first and the same last; in each, the most cases with other bits first."""
    return sorted(cells, key=lambda cell: (CHANGES.index(cell.change), -cell.differing))


def ratio(cell: CellVerdict) -> str:
    """The ratio of times, or that there is none."""
    return NOT_MEASURED if math.isnan(cell.ratio) else f"{cell.ratio:.4f}"


def limits(cell: CellVerdict) -> str:
    """Both limits of the ratio; "" where nothing was measured."""
    return "" if math.isnan(cell.low) or math.isnan(cell.high) else f"{cell.low:.4f} to {cell.high:.4f}"


def samples(cell: CellVerdict) -> str:
    """How many samples were valid, at which stage, and how many were not."""
    said = f"{cell.pairs} ({cell.stage})"
    return f"{said}, {cell.dropped} dropped" if cell.dropped else said


def before_after(pair: Sequence[float]) -> str:
    """Two figures, such as a median before and after."""
    return f"{pair[0]:.3g} to {pair[1]:.3g}"


def speed_note(result: GateResult) -> str:
    """What the ratio is and when a cell is slower; "" where speed was not run."""
    if result.speed is None:
        return ""
    return (
        f"Ratio: {OF_WHAT[result.speed.mode]}. A cell is slower where even the lower limit is above 1 by more than the "
        f"margin. Were no cell slower, any would be called so in at most {result.speed.alpha:.2%} of the runs."
    )
