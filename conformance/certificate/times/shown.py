"""A certificate's times on its page, as data: a row for each case, the summary, and who had no time."""

from __future__ import annotations

from dataclasses import dataclass, replace

from conformance.certificate.reading import Certificate
from conformance.certificate.tabled import Field, Table, field, lines, table
from conformance.certificate.times.judged import Judged, absent, all_judged, summary
from conformance.certificate.times.kept import FAILED, TAKEN
from conformance.timing.side_by_side import Regret
from fp8moe.counted import counted

NONE = "-"
CASES = "Microseconds of a call beside the floor, which is the least that the device's data sheet allows."
COLUMNS = ("layer", "floor", "its time", "floor over time", "over the fastest", "regret of the selected", "others")
ROOM = 250_000
"""Characters of the cases as HTML: a hundred rows with their bars."""
COMPARED = ("its time", "floor over time", "over the fastest")


@dataclass(frozen=True)
class Shown:
    """
    Args:
        why: there are no times; "" where there are.
        failed: taking them went wrong.
    """

    why: str
    failed: bool
    summary: Table
    cases: Table
    absent: Table


def shown(certificate: Certificate) -> Shown:
    """One certificate's."""
    times, report = certificate.times, certificate.report
    found = all_judged(times, report)
    why = {
        FAILED: f"Times were not taken to their end: {times.reason}.",
        TAKEN: "" if found else "Times are part of this certificate, and none of them is of a case that is known here.",
    }.get(times.status, f"Times and regret are not part of this certificate: {times.reason}.")
    told = [line.removeprefix("times: ") for line in summary(times, report)]
    return Shown(
        field(why).text if why else "",
        times.status == FAILED,
        lines(line for line in told if not line.startswith("absent: ")),
        table(CASES, COLUMNS, (_row(one, report.origin) for one in found), room=ROOM),
        table("Backends without a time.", ("backend", "why", "cases"), absent(times)),
    )


def _row(one: Judged, backend: str) -> list[Field]:
    us = one.timed.typical_us
    others = ", ".join(f"{name} {us[name]:.4g}" for name in us if name != backend)
    cost = _cost(one, one.selected)
    return [
        _layer(one),
        Field(f"{one.floor.us:.4g}, by {one.floor.by}"),
        *_own(one, backend),
        replace(cost, text=field(f"{one.timed.selected or 'nothing'}: {cost.text}").text),
        field(others) if others else Field(NONE),
    ]


def _layer(one: Judged) -> Field:
    """In words; a published one has one case of each."""
    return Field(f"{one.case.model}, {one.case.scheme}, {counted(one.case.tokens, 'token')}")


def _own(one: Judged, backend: str) -> list[Field]:
    """Time, share of the floor, and what the backend costs over the fastest."""
    if one.own is None:
        return [Field("no time"), Field(NONE), Field(NONE)]
    share = one.floor.us / one.timed.typical_us[backend]
    return [
        Field(f"{one.timed.typical_us[backend]:.4g}"),
        Field(f"{share:.1%}", "is-failed" if share > 1 else "", share),
        _cost(one, one.own),
    ]


def _cost(one: Judged, regret: Regret | None) -> Field:
    if regret is None:
        return Field(NONE)
    if regret.best == regret.selected:
        return Field("the fastest" if len(one.timed.us) > 1 else "alone here", bar=0.0)
    told = f"{regret.value:.1%} ({regret.low:.1%} to {regret.high:.1%}) over {field(regret.best).text}"
    return Field(told, bar=regret.value)


def compared(first: Certificate, second: Certificate) -> Table:
    """Cases that either has, with the own figures of each."""
    both = (first, second)
    found = [{one.timed.case: one for one in all_judged(each.times, each.report)} for each in both]

    def row(case: str) -> list[Field]:
        fields = [_layer(next(of[case] for of in found if case in of))]
        for certificate, of in zip(both, found, strict=True):
            fields += (
                _own(of[case], certificate.report.origin) if case in of else [Field("not timed"), *[Field(NONE)] * 2]
            )
        return fields

    columns = ("layer", *(f"{name} ({side})" for side in ("first", "second") for name in COMPARED))
    return table(CASES, columns, map(row, dict.fromkeys([*found[0], *found[1]])), room=ROOM)
