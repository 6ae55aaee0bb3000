"""A gate run as Markdown and as JUnit XML: nothing is lost, nothing breaks out of its place, the worst stands first."""

import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from markdown_it import MarkdownIt

from conformance.gate.numerics import Change
from conformance.gate.result import Decisions, GateResult, Status
from conformance.gate.shown import words
from conformance.gate.shown.escapes import FIELD
from conformance.gate.shown.junit import junit
from conformance.gate.shown.markdown import MARK, MOST, markdown
from conformance.gate.verdicts import Mode, Outcome, RunVerdict
from fp8moe.texts import clipped, visible
from tests.unit.gate_runs import HOSTILE, change, run, verdict, verdicts, whole

OURS = {
    "h2",
    "h3",
    "p",
    "table",
    "thead",
    "tbody",
    "tr",
    "th",
    "td",
    "strong",
    "code",
    "ul",
    "li",
    "details",
    "summary",
}
NAMES = [f"TRITON v1:M={2**k}" for k in range(8)]


class Shown(HTMLParser):
    """What a browser would make of Markdown: the elements, and the rows of all tables as texts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.rows, self.items, self.in_item = set[str](), list[list[str]](), list[str](), False
        self.feed(MarkdownIt("commonmark", {"html": True}).enable("table").render(text))

    def handle_starttag(self, tag: str, attributes: object) -> None:
        assert not attributes, (tag, attributes)
        self.tags.add(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag == "li":
            self.items.append("")
            self.in_item = True

    def handle_endtag(self, tag: str) -> None:
        self.in_item &= tag != "li"

    def handle_data(self, data: str) -> None:
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data.strip("\n")
        if self.in_item:
            self.items[-1] += data.strip("\n")


def seen(name: str) -> str:
    return clipped(visible(name), FIELD)


def cases(xml: str) -> dict[str, list[ElementTree.Element]]:
    """By suite, the test cases."""
    root = ElementTree.fromstring(xml.encode())
    return {suite.get("name", ""): suite.findall("testcase") for suite in root}


@pytest.mark.parametrize("status", Status)
def test_every_status_has_its_word(status: Status) -> None:
    speed = {
        Status.PASSED: verdicts(NAMES, (Outcome.SAME, Outcome.FASTER)),
        Status.FAILED: verdicts(NAMES),
        Status.INCONCLUSIVE: verdicts(NAMES, (Outcome.SAME, Outcome.INCONCLUSIVE)),
        Status.NOT_RUN: None,
    }[status]
    result = run(speed)
    assert result.status is status
    shown = Shown(markdown(result))
    word = words.STATUSES[status]
    assert ["speed", word] in [row[:2] for row in shown.rows]
    assert f"## fp8moe gate: {'nothing was run' if status is Status.NOT_RUN else word}" in markdown(result)
    assert any("decisions was not asked for" in item for item in shown.items)
    tests = cases(junit(result))
    kinds = {child.tag for case in tests["fp8moe gate: speed"] for child in case}
    expected = {
        Status.PASSED: {"system-out"},
        Status.FAILED: {"failure", "skipped", "system-out"},
        Status.INCONCLUSIVE: {"skipped"},
        Status.NOT_RUN: {"skipped"},
    }
    assert kinds == expected[status]


@pytest.mark.parametrize("status", Status)
def test_decisions_of_every_status(status: Status) -> None:
    result = run(decisions=Decisions(status, ["device = h100: A -> B"], "since so"))
    assert f"| decisions | **{words.STATUSES[status]}** |" in markdown(result)
    assert "device = h100: A -&#62; B" in markdown(result)
    (case,) = cases(junit(result))["fp8moe gate: decisions"]
    tag = {Status.FAILED: "failure", Status.PASSED: "system-out"}.get(status, "skipped")
    assert [child.tag for child in case] == [tag]
    assert "device = h100: A -> B" in (case[0].text or "")
    assert "since so" in (case[0].text or "")


def test_headline_names_what_failed_and_what_was_not_run() -> None:
    result = run(verdicts(NAMES), [change("TRITON block", Change.WORSE)], Decisions(Status.FAILED, ["x"]))
    expected = "failed: the selector decides otherwise; 1 cell numerically worse; 2 cells slower"
    assert words.headline(result) == expected
    unsure = run(verdicts(NAMES, (Outcome.INCONCLUSIVE,)), left={"numerics": "no baseline"})
    said = "inconclusive: 8 cells inconclusive in speed (not everything was run: decisions, numerics)"
    assert words.headline(unsure) == said
    numbers = [change("X block", Change.SAME_BITS)]
    partly = run(
        verdicts(NAMES, (Outcome.SAME,)), numbers, Decisions(Status.PASSED), left={"speed": "one cell: no library"}
    )
    assert words.headline(partly) == "passed (not everything was run: speed)"
    assert words.headline(run(verdicts(NAMES, (Outcome.SAME,)), numbers, Decisions(Status.PASSED))) == "passed"


def test_tables_have_every_figure_and_the_worst_first() -> None:
    cells = [verdict("same v1:M=1", Outcome.SAME), verdict("mild v1:M=2", Outcome.SLOWER, 1.02)]
    cells += [verdict("bad v1:M=3", Outcome.SLOWER, 1.4), verdict("none v1:M=4", Outcome.INCONCLUSIVE, float("nan"))]
    cells += [verdict("quick v1:M=5", Outcome.FASTER, 0.8), verdict("quicker v1:M=6", Outcome.FASTER, 0.7)]
    text = markdown(run(RunVerdict(Mode.STORED, tuple(cells), 1e6, 0.005)))
    rows = [row for row in Shown(text).rows if "v1:" in row[0]]
    order = ["bad", "mild", "none", "quicker", "quick", "same"]
    assert [row[0].split()[0] for row in rows] == order
    assert rows[0][1:] == ["slower", "1.4000", "1.3930 to 1.4070", "0.60%", "96 (screen), 4 dropped"]
    assert rows[2][1:4] == ["inconclusive: GPU shared with other work", "not measured", ""]
    assert text.index("<details>") < text.index("same v1:M=1") < text.index("</details>")
    assert "at most 0.50% of the runs" in text


def test_numerics_tell_the_changes_and_fold_the_same() -> None:
    text = markdown(run(numerics=[change(f"TRITON {kind.name}", kind) for kind in Change]))
    rows = {row[0]: row for row in Shown(text).rows}
    worse = ["worse", "30 of 30", "29 / 1 (chance 0.25)", "0.01 to 0.014", "0.3 to 0.4", "v1:M=17,law=skewed times 1.7"]
    assert rows["TRITON WORSE"][1:] == worse
    assert text.index("<details>") < text.index("TRITON SAME_BITS") < text.index("</details>")
    assert text.index("TRITON WORSE") < text.index("TRITON CHANGED") < text.index("TRITON BETTER")
    failures = [
        case.get("name")
        for case in cases(junit(run(numerics=[change(k.name, k) for k in Change])))["fp8moe gate: numerics"]
        if case.find("failure") is not None
    ]
    assert failures == ["WORSE", "GONE"]


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_stay_in_their_place_in_markdown(name: str) -> None:
    text = markdown(run(verdicts([name] * 4), [change(name, kind) for kind in Change], left={name: name}))
    shown = Shown(text)
    assert shown.tags <= OURS
    assert sum(row[0] == seen(name) and len(row) == 6 for row in shown.rows) == 4
    assert sum(row[0] == seen(name) and len(row) in (2, 7) for row in shown.rows) == len(Change)
    assert {len(row) for row in shown.rows} == {2, 3, 6, 7}
    assert f"{seen(name)}: {clipped(visible(name), 500)}" in shown.items
    # A mention is sought in the text as shown, so the sign must not stand next to the name.
    assert not re.search(r"(&#64;|@)\w", text)
    assert "://" not in text


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_stay_in_their_place_in_xml(name: str) -> None:
    tests = cases(junit(whole([name] * 4)))
    assert [case.get("name") for case in tests["fp8moe gate: speed"]] == [visible(name)] * 4
    assert [case.get("name") for case in tests["fp8moe gate: numerics"]] == [visible(name)] * 4
    assert all(case.get("classname") == "fp8moe.gate.speed" for case in tests["fp8moe gate: speed"])


def test_facts_are_told_by_both() -> None:
    result = run(verdicts(NAMES))
    properties = ElementTree.fromstring(junit(result).encode())[0].find("properties")
    assert properties is not None
    told = {one.get("name"): one.get("value") for one in properties}
    assert told["device"] == "Example GPU 80GB"
    assert told["compared"] == "this checkout with its base"
    assert told["version.torch"] == "2.13.0"
    assert told["SM clock, MHz"] == "1200 to 1980"
    rows = dict(row for row in Shown(markdown(result)).rows if len(row) == 2)
    assert rows["versions"] == "fp8moe 0.1.0, torch 2.13.0"
    assert rows["device"] == "Example GPU 80GB"


def test_junit_counts_are_those_of_its_cases() -> None:
    result = whole([f"TRITON v1:M={k}" for k in range(500)])
    root = ElementTree.fromstring(junit(result).encode())
    assert root.get("tests") == "1001"
    assert root.get("failures") == str(1 + 125 + 2 * 100)
    assert root.get("skipped") == "125"
    for suite in root:
        assert suite.get("failures") == str(len(suite.findall("testcase/failure")))
        assert suite.get("skipped") == str(len(suite.findall("testcase/skipped")))
        assert suite.get("tests") == str(len(suite.findall("testcase")))


def test_junit_has_what_was_left_of_a_part_and_beside_all_parts() -> None:
    tests = cases(junit(run(verdicts(NAMES), left={"speed": "no time", "the zoo": "not installed"})))
    assert [case[0].get("message") for case in tests["fp8moe gate: speed"] if case.get("name") == "not run"] == [
        "no time"
    ]
    assert [(case.get("name"), case[0].get("message")) for case in tests["fp8moe gate: other"]] == [
        ("the zoo", "not installed")
    ]


@pytest.mark.parametrize("count", [60, 500, 3000])
def test_a_huge_run_is_cut_and_says_what_is_left_out(count: int) -> None:
    names = [f"acme_kernels.moe:AcmeExperts v1:E=256,k=8,H=7168,I=2048,M={k},law=skewed" for k in range(count)]
    text = markdown(whole(names))
    assert len(text) <= MOST
    assert text.startswith(MARK + "\n")
    shown = Shown(text)
    left = {}
    for section in re.split(r"^### ", text, flags=re.MULTILINE)[1:]:
        found = [
            int(number.replace(",", "")) for number in re.findall(r"^([\d,]+) (?:row|line)s? left out", section, re.M)
        ]
        left[section.split("\n")[0]] = sum(found)
    decided = sum("device = " in item for item in shown.items)
    speed = sum(len(row) == 6 and "v1:" in row[0] for row in shown.rows)
    numerics = sum(len(row) in (2, 7) and "v1:" in row[0] for row in shown.rows)
    assert (decided + left["Decisions"], speed + left["Speed"], numerics + left["Numerics"]) == (count,) * 3
    assert min(decided, speed, numerics) > 0
    if count == 60:
        assert sum(left.values()) == 0
    else:
        # What is left out last is what is worst.
        assert text.count("**slower**") >= 20
        assert len(text) > MOST - 1000


def test_a_smaller_limit_is_kept_or_refused() -> None:
    result = whole(NAMES * 10)
    assert len(markdown(result, 6000)) <= 6000
    with pytest.raises(ValueError, match=r"most=100: at least \d+ characters"):
        markdown(result, 100)


def test_empty_parts() -> None:
    empty = RunVerdict(Mode.STORED, (), 0.0, 0.005)
    result = run(empty, [], Decisions(Status.PASSED))
    text = markdown(result)
    assert "| speed | **not run** |" in text
    assert "| numerics | **not run** |" in text
    assert "| decisions | **passed** | no change |" in text
    assert "<details>" not in text
    tests = cases(junit(result))
    assert list(tests) == [f"fp8moe gate: {part}" for part in ("decisions", "numerics", "speed")]


def test_what_no_reader_sees_is_shown_as_its_escape() -> None:
    assert visible("a\nb\x00\u202e\ud800\ufffe") == r"a\nb\x00\u202e\ud800\ufffe"
    assert visible("é 名 🙂 x") == "é 名 🙂 x"


def test_a_result_of_the_gate_that_was_not_run_says_why() -> None:
    bare = GateResult("a", "b", "c", {})
    assert words.left(bare) == [(part, words.NO_REASON) for part in words.PARTS]
