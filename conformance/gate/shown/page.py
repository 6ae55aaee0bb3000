"""A gate run as one HTML page that needs nothing else: both plots and every table, light and dark, no script."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from conformance.gate.numerics import CellChange
from conformance.gate.result import GateResult, Status
from conformance.gate.shown import svg, words
from conformance.gate.shown.history import Dated
from conformance.gate.shown.history_plot import history_plot
from conformance.gate.shown.plots import ratio_plot
from conformance.gate.verdicts import CellVerdict
from conformance.pages import environment

TEMPLATE = "page.html.j2"


@dataclass(frozen=True)
class _Row:
    """Of a table: `kind` names the class of the row, which gives its verdict's colour and no more."""

    kind: str
    fields: tuple[str, ...]


def page(result: GateResult, history: Iterable[Dated] = ()) -> str:
    """The whole run, every cell of it, and the history of the few cells that rose most.

    Args:
        history: earlier runs, and this one if its record is kept; of none, the page has no history.

    Raises:
        conformance.pages.PageUnavailable: jinja2 is missing.
        ValueError: a date of the history is not ISO 8601.
    """
    runs = [run for run in history if run.record.cells]
    return (
        environment("conformance.gate.shown")
        .get_template(TEMPLATE)
        .render(
            result=result,
            status=result.status.value,
            headline=words.headline(result),
            parts=[
                (part, status, words.STATUSES[status], words.found(result, part)) for part, status in _parts(result)
            ],
            light=svg.LIGHT,
            dark=svg.DARK,
            ratios=ratio_plot(result.speed) if result.speed is not None and result.speed.cells else "",
            history=history_plot(runs) if runs else "",
            runs=len(runs),
            speed_note=words.speed_note(result),
            speed=[_verdict(cell) for cell in words.by_outcome(result.speed.cells if result.speed is not None else ())],
            numerics=[_change(cell) for cell in words.by_change(result.numerics or ())],
            left=words.left(result),
            facts=words.facts(result),
        )
    )


def _parts(result: GateResult) -> list[tuple[str, Status]]:
    return [(part, result.parts[part]) for part in words.PARTS]


def _verdict(cell: CellVerdict) -> _Row:
    outcome = cell.outcome.value if cell.reason is None else f"{cell.outcome.value}: {cell.reason.value}"
    figures = (words.ratio(cell), words.limits(cell), f"{cell.margin:.2%}", words.samples(cell))
    return _Row(cell.outcome.value, (cell.cell, outcome, *figures))


def _change(cell: CellChange) -> _Row:
    figures = (
        f"{cell.differing} of {cell.cases}",
        f"{cell.larger} / {cell.smaller} ({cell.chance:.2g})",
        words.before_after((cell.before[0], cell.after[0])),
        words.before_after((cell.before[1], cell.after[1])),
        f"{cell.worst[0]}, times {cell.worst[1]:.3g}",
    )
    return _Row(cell.change.name.lower(), (cell.cell, cell.change.value, *figures))
