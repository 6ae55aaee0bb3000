"""A gate run as JUnit XML: a test case for each cell and part."""

from __future__ import annotations

from conformance.gate.numerics import Change
from conformance.gate.result import GateResult, Status
from conformance.gate.shown import words
from conformance.gate.verdicts import Outcome
from conformance.junit import FAILURE, SKIPPED, TOLD, Entry, Suite, rendered

ROOT = "fp8moe gate"
OTHER = "other"
"""The suite of what was not run and belongs to no part."""
NOT_RUN = "not run"
"""The test case that stands for what a part left out."""


def junit(result: GateResult) -> str:
    """The whole run: a suite for each part, in which a failure has the sentence that the gate says of the cell.

    What is inconclusive or was not run is skipped, with the reason: it neither passed nor failed.
    """
    suites = [_suite(result, part, _entries(result, part)) for part in words.PARTS]
    others = [(name, why) for name, why in words.left(result) if name not in words.PARTS]
    suites.append(_suite(result, OTHER, [_entry(OTHER, name, SKIPPED, why) for name, why in others]))
    return rendered(ROOT, suites, "fp8moe.gate")


def _entry(part: str, name: str, kind: str = "", said: str = "", detail: tuple[str, ...] = ()) -> Entry:
    return Entry(name, f"fp8moe.gate.{part}", kind, said, detail)


def _entries(result: GateResult, part: str) -> list[Entry]:
    entries = []
    if part == "decisions" and result.decisions is not None:
        entries.append(_of_decisions(result))
    if part == "numerics":
        kinds = {Change.WORSE: FAILURE, Change.GONE: FAILURE, Change.SAME_BITS: ""}
        entries += [_entry(part, one.cell, kinds.get(one.change, TOLD), str(one)) for one in result.numerics or ()]
    if part == "speed" and result.speed is not None:
        outcomes = {Outcome.SLOWER: FAILURE, Outcome.INCONCLUSIVE: SKIPPED, Outcome.SAME: ""}
        entries += [_entry(part, one.cell, outcomes.get(one.outcome, TOLD), str(one)) for one in result.speed.cells]
    if part in result.left or (not entries and result.parts[part] is Status.NOT_RUN):
        entries.append(_entry(part, NOT_RUN, SKIPPED, words.why_not(result, part)))
    return entries


def _of_decisions(result: GateResult) -> Entry:
    assert result.decisions is not None
    kinds = {Status.FAILED: FAILURE, Status.PASSED: TOLD if result.decisions.lines else ""}
    status = result.decisions.status
    said = f"{words.STATUSES[status]}: {words.found(result, 'decisions')}"
    return _entry(
        "decisions", "decisions of the selector", kinds.get(status, SKIPPED), said, tuple(result.decisions.lines)
    )


def _suite(result: GateResult, part: str, entries: list[Entry]) -> Suite:
    seconds = result.speed.spent_us / 1e6 if part == "speed" and result.speed is not None else 0.0
    versions = [(f"version.{key}", value) for key, value in result.versions.items()]
    first = [("compared", result.compared), ("device", result.device), ("date", result.date)]
    properties = [*first, *versions, *result.told.items()]
    return Suite(f"{ROOT}: {part}", entries, properties, result.date, seconds)
