"""A gate run as JUnit XML, the form in which CI systems show single results: a test case for each cell and part."""

from __future__ import annotations

from dataclasses import dataclass
from xml.etree import ElementTree

from conformance.gate.numerics import Change
from conformance.gate.result import GateResult, Status
from conformance.gate.shown import words
from conformance.gate.verdicts import Outcome

ROOT = "fp8moe gate"
OTHER = "other"
"""The suite of what was not run and belongs to no part."""
NOT_RUN = "not run"
"""The test case that stands for what a part left out."""
FAILURE, SKIPPED, TOLD = "failure", "skipped", "system-out"


@dataclass(frozen=True)
class _Test:
    """One test case: `kind` is the element that holds what is said, "" where all there is to say is that it passed."""

    name: str
    kind: str = ""
    said: str = ""
    detail: str = ""


def junit(result: GateResult) -> str:
    """The whole run: a suite for each part, in which a failure has the sentence that the gate says of the cell.

    What is inconclusive or was not run is skipped, with the reason: it neither passed nor failed.
    """
    suites = {part: _tests(result, part) for part in words.PARTS}
    suites[OTHER] = [_Test(name, SKIPPED, why) for name, why in words.left(result) if name not in words.PARTS]
    root = ElementTree.Element("testsuites", name=ROOT)
    for name, tests in suites.items():
        if tests:
            _add_suite(root, result, name, tests)
    for count in ("tests", "failures", "errors", "skipped"):
        root.set(count, str(sum(int(suite.get(count, "0")) for suite in root)))
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def _tests(result: GateResult, part: str) -> list[_Test]:
    tests = []
    if part == "decisions" and result.decisions is not None:
        tests.append(_of_decisions(result))
    if part == "numerics":
        kinds = {Change.WORSE: FAILURE, Change.GONE: FAILURE, Change.SAME_BITS: ""}
        tests += [_Test(one.cell, kinds.get(one.change, TOLD), str(one)) for one in result.numerics or ()]
    if part == "speed" and result.speed is not None:
        outcomes = {Outcome.SLOWER: FAILURE, Outcome.INCONCLUSIVE: SKIPPED, Outcome.SAME: ""}
        tests += [_Test(one.cell, outcomes.get(one.outcome, TOLD), str(one)) for one in result.speed.cells]
    if part in result.left or (not tests and result.parts[part] is Status.NOT_RUN):
        tests.append(_Test(NOT_RUN, SKIPPED, words.why_not(result, part)))
    return tests


def _of_decisions(result: GateResult) -> _Test:
    assert result.decisions is not None
    kinds = {Status.FAILED: FAILURE, Status.PASSED: TOLD if result.decisions.lines else ""}
    status = result.decisions.status
    said = words.found(result, "decisions")
    detail = "\n".join(words.visible(line) for line in result.decisions.lines)
    return _Test("decisions of the selector", kinds.get(status, SKIPPED), f"{words.STATUSES[status]}: {said}", detail)


def _add_suite(root: ElementTree.Element, result: GateResult, name: str, tests: list[_Test]) -> None:
    seconds = result.speed.spent_us / 1e6 if name == "speed" and result.speed is not None else 0.0
    suite = ElementTree.SubElement(
        root,
        "testsuite",
        name=f"{ROOT}: {name}",
        tests=str(len(tests)),
        failures=str(sum(test.kind == FAILURE for test in tests)),
        errors="0",
        skipped=str(sum(test.kind == SKIPPED for test in tests)),
        timestamp=words.visible(result.date),
        time=f"{seconds:.3f}",
    )
    properties = ElementTree.SubElement(suite, "properties")
    versions = [(f"version.{key}", value) for key, value in result.versions.items()]
    first = [("compared", result.compared), ("device", result.device), ("date", result.date)]
    for key, value in (*first, *versions, *result.told.items()):
        ElementTree.SubElement(properties, "property", name=words.visible(key), value=words.visible(value))
    for test in tests:
        case = ElementTree.SubElement(
            suite, "testcase", classname=f"fp8moe.gate.{name}", name=words.visible(test.name), time="0"
        )
        if test.kind:
            _add_told(case, test)


def _add_told(case: ElementTree.Element, test: _Test) -> None:
    said = words.visible(test.said)
    element = ElementTree.SubElement(case, test.kind)
    if test.kind != TOLD:
        element.set("message", said)
    if test.kind == FAILURE:
        element.set("type", "fp8moe.gate")
    element.text = "\n".join(filter(None, (said, test.detail)))
