"""JUnit XML, the form in which CI systems show single results, as Jenkins, GitLab and GitHub's reporters read it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from xml.etree import ElementTree

from fp8moe.texts import visible

FAILURE, SKIPPED, TOLD = "failure", "skipped", "system-out"
COUNTS = ("tests", "failures", "errors", "skipped")


@dataclass(frozen=True)
class Entry:
    """One test case. Its texts may come from anywhere: what no reader sees is shown as its escape.

    Args:
        classname: what CI systems group by.
        kind: FAILURE, SKIPPED or TOLD, the element that holds what is said; "" where all there is to say is that it
            passed.
        said: one line.
        detail: further lines.
    """

    name: str
    classname: str
    kind: str = ""
    said: str = ""
    detail: Sequence[str] = ()


@dataclass(frozen=True)
class Suite:
    """
    Args:
        properties: name and value of what holds for all of it, such as the device and versions.
        date: ISO 8601.
        seconds: of the whole suite.
    """

    name: str
    entries: Sequence[Entry]
    properties: Sequence[tuple[str, str]] = ()
    date: str = ""
    seconds: float = 0.0


def rendered(name: str, suites: Iterable[Suite], failure_type: str) -> str:
    """The XML text; suites without an entry are left out.

    Args:
        failure_type: that every failure has.
    """
    root = ElementTree.Element("testsuites", name=visible(name))
    for suite in suites:
        if suite.entries:
            _add_suite(root, suite, failure_type)
    for count in COUNTS:
        root.set(count, str(sum(int(suite.get(count, "0")) for suite in root)))
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def _add_suite(root: ElementTree.Element, suite: Suite, failure_type: str) -> None:
    kinds = Counter(entry.kind for entry in suite.entries)
    counts = dict(zip(COUNTS, (len(suite.entries), kinds[FAILURE], 0, kinds[SKIPPED]), strict=True))
    made = ElementTree.SubElement(
        root,
        "testsuite",
        {
            "name": visible(suite.name),
            **{name: str(count) for name, count in counts.items()},
            "timestamp": visible(suite.date),
            "time": f"{suite.seconds:.3f}",
        },
    )
    properties = ElementTree.SubElement(made, "properties")
    for key, value in suite.properties:
        ElementTree.SubElement(properties, "property", name=visible(key), value=visible(value))
    for entry in suite.entries:
        case = ElementTree.SubElement(
            made, "testcase", classname=visible(entry.classname), name=visible(entry.name), time="0"
        )
        if entry.kind:
            _add_told(case, entry, failure_type)


def _add_told(case: ElementTree.Element, entry: Entry, failure_type: str) -> None:
    said = visible(entry.said)
    element = ElementTree.SubElement(case, entry.kind)
    if entry.kind != TOLD:
        element.set("message", said)
    if entry.kind == FAILURE:
        element.set("type", failure_type)
    element.text = "\n".join(filter(None, (said, *map(visible, entry.detail))))
