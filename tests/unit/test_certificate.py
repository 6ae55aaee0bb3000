"""A certificate holds as it was written; scripted forgeries do not, though each has a statement of its own."""

from __future__ import annotations

import base64
import gzip
import json
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from conformance.bounds import pooled
from conformance.bounds.aggregates import DIRECTIONS
from conformance.bounds.pooled import PARTS
from conformance.cases import Case
from conformance.certificate.reading import Malformed, read_certificate
from conformance.certificate.sampling import spot_check
from conformance.certificate.signing import CannotSign
from conformance.certificate.statement import EVIDENCE
from conformance.certificate.verifying import Verified, verify, zeros
from conformance.certificate.writing import STATEMENT_FILE, NoCertificate, write_certificate
from conformance.certification import POOLED
from conformance.checks import EQUIVALENCE
from conformance.matrix import BY_BITS, BY_BOUND
from conformance.results import CheckResult, Status
from tests.unit.certificates import SMALL, Change, cases_of, evidence_in, forged, invented, surroundings, written


def verdict_on(folder: Path, key: Path | None = None) -> Verified:
    return verify(folder, key, editions=lambda name: SMALL)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return written(tmp_path / "certificate")


def test_a_certificate_holds(folder: Path) -> None:
    found = verdict_on(folder)
    assert found.findings == []
    assert (found.holds, found.verdict) == (True, "passed")
    assert any("not signed" in note for note in found.notes)
    assert sum(file.stat().st_size for file in folder.iterdir()) < 5 << 20


def test_one_of_a_failed_run_holds_and_says_so(tmp_path: Path) -> None:
    found = verdict_on(written(tmp_path / "certificate", invented(failing=2)))
    assert (found.findings, found.verdict) == ([], "failed")


def by_bound(evidence: dict[str, Any]) -> dict[str, Any]:
    return next(check for check in cases_of(evidence) if "error_over_bound" in check)


def other_case(evidence: dict[str, Any]) -> None:
    check = cases_of(evidence)[3]
    check["case"] = str(replace(Case.parse(check["case"]), seed=99))


def repeated(evidence: dict[str, Any]) -> None:
    """A case of another activation or seed has the same output."""
    first = equivalence_of(evidence)[0]
    second = next(check for check in equivalence_of(evidence) if values_of(check) != values_of(first))
    second["digest"] = first["digest"]


def equivalence_of(evidence: dict[str, Any]) -> list[dict[str, Any]]:
    return [check for check in cases_of(evidence) if check["check"] == EQUIVALENCE]


def values_of(check: dict[str, Any]) -> tuple[int, str]:
    case = Case.parse(check["case"])
    return case.seed, case.activation


def without(name: str) -> Change:
    return lambda evidence: by_bound(evidence).pop(name)


def at(name: str, value: Any) -> Change:
    return lambda evidence: by_bound(evidence).update({name: value})


def in_report(**changed: Any) -> Change:
    return lambda evidence: evidence["report"].update(changed)


FORGERIES: dict[str, tuple[Change, str]] = {
    "an error above the limit": (at("error_over_bound", 1.01), "above the limit"),
    "an infinite error": (at("error_over_bound", "inf"), "above the limit"),
    "an error that is no number": (at("error_over_bound", "nan"), "above the limit"),
    "a negative error": (at("error_over_bound", -0.1), "no check gives"),
    "a negative duration": (at("seconds", -1.0), "no check gives"),
    "a statistic above the limit": (at("statistics", {"gain": 1.5}), "above the limit"),
    "an error left out": (without("error_over_bound"), "without an error/bound"),
    "a dropped case": (lambda evidence: evidence["report"]["checks"].pop(5), "are missing"),
    "the last case dropped": (lambda evidence: evidence["report"]["checks"].pop(), "are missing"),
    "a case dropped, and counted so": (
        lambda evidence: (evidence["report"]["checks"].pop(5), in_report(planned=len(cases_of(evidence)))(evidence)),
        "are missing",
    ),
    "a case twice": (lambda evidence: evidence["report"]["checks"].append(cases_of(evidence)[0]), "stand twice"),
    "a case of another seed": (other_case, "none of the edition's"),
    "a case spelt otherwise": (
        lambda evidence: cases_of(evidence)[0].update(case=cases_of(evidence)[0]["case"] + ",seed=0"),
        "",
    ),
    "no case": (at("case", "v1:M=-1"), "no case"),
    "another scheme's": (at("scheme", "none"), "of another scheme"),
    "one output for two cases": (repeated, "the output of cases of 2 seeds"),
    "no digest": (without("digest"), "expected 16 hexadecimal digits"),
    "a digest that is none": (at("digest", "z" * 16), "expected 16 hexadecimal digits"),
    "another backend's result": (at("backend", "OTHER"), "in a report on"),
    "judged by nothing": (without("judged_by"), "neither bits nor the bound"),
    "simulated": (at("evidence", "simulated"), "not on a device"),
    "evidence of nothing": (without("evidence"), "not on a device"),
    "passed with a reason": (at("reason", "it crashed"), "passed, with a reason"),
    "not supported, with figures": (at("status", "not_supported"), "without a reason"),
    "a waiver of nobody": (at("status", "waived"), "without a reason"),
    "another level": (in_report(level="quick"), "report.level"),
    "another seed": (in_report(seed=8), "report.seed"),
    "the interpreter": (in_report(target="interpreter"), "report.target"),
    "another device": (in_report(device="a better GPU"), "device.name"),
    "another kind of device": (in_report(target="rocm"), "device.kind"),
    "other versions": (in_report(versions={"fp8moe": "9"}), "versions"),
    "fewer activations": (in_report(takes={"block": []}), "report.takes"),
    "another scheme in their place": (in_report(takes={"channel_tok": ["silu"]}), "none of the edition's"),
    "an unknown scheme": (in_report(takes={"better": ["silu"]}), "report.takes"),
    "nothing run": (in_report(takes={}), "no scheme was run"),
    "a run to come": (in_report(date="2999-01-01T00:00:00+00:00"), "in the future"),
    "no date": (in_report(date="soon"), "no ISO 8601 date"),
    "more covered": (in_report(coverage=["all of 1 pairs of values"]), "report.coverage"),
    "more excluded": (in_report(excluded=["E=1, k=2: hard"]), "report.excluded"),
    "more planned": (in_report(planned=10**6), "report.planned"),
    "another version of the suite": (lambda evidence: evidence["suite"].update(version="0.2.0"), "suite.version"),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_a_forgery_does_not_hold(name: str, folder: Path) -> None:
    change, told = FORGERIES[name]
    forged(folder, change)
    found = verdict_on(folder)
    assert not found.holds
    assert any(told in finding for finding in found.findings), found.findings


def test_there_are_as_many_as_were_asked_for() -> None:
    assert len(FORGERIES) >= 25


@pytest.mark.parametrize("name", ["an error above the limit", "a dropped case", "another device"])
def test_evidence_that_changed_after_its_statement(name: str, folder: Path) -> None:
    forged(folder, FORGERIES[name][0], restated=False)
    assert any("statement: subject: the evidence's file has changed" in one for one in verdict_on(folder).findings)


def test_a_failure_called_passed(tmp_path: Path) -> None:
    """Its status alone changed, or the case gone: each tells. With its figures changed too, only a sample tells."""
    for number, change in enumerate(
        (
            lambda evidence: failures(evidence)[0].update(status="passed"),
            lambda evidence: failures(evidence)[0].update(status="passed", reason="", error_over_bound=0.5),
            lambda evidence: evidence["report"]["checks"].remove(failures(evidence)[0]),
        )
    ):
        folder = written(tmp_path / str(number), invented(failing=1))
        forged(folder, change)
        found = verdict_on(folder)
        assert found.verdict == "passed"
        assert found.holds == (number == 1)  # the second is a consistent invention, which nothing here can tell


def failures(evidence: dict[str, Any]) -> list[dict[str, Any]]:
    return [check for check in cases_of(evidence) if check["status"] == "failed"]


def test_the_statement_alone_changed(tmp_path: Path) -> None:
    folder = written(tmp_path / "certificate", invented(failing=1))
    envelope = json.loads((folder / STATEMENT_FILE).read_text())
    statement = json.loads(base64.b64decode(envelope["payload"]))
    statement["predicate"]["result"] = "PASSED"
    envelope["payload"] = base64.b64encode(json.dumps(statement).encode()).decode()
    (folder / STATEMENT_FILE).write_text(json.dumps(envelope))
    assert any("statement: predicate" in finding for finding in verdict_on(folder).findings)


def test_an_output_of_zeros_may_be_that_of_several_cases(folder: Path) -> None:
    def change(evidence: dict[str, Any]) -> None:
        first = equivalence_of(evidence)[0]
        second = next(check for check in equivalence_of(evidence) if values_of(check) != values_of(first))
        first["digest"] = second["digest"] = zeros(first["case"])

    forged(folder, change)
    assert verdict_on(folder).findings == []


def keys(folder: Path, name: str) -> tuple[Path, Path]:
    private = folder / name
    made = subprocess.run(
        ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "someone", "-f", str(private)], capture_output=True
    )
    if made.returncode:
        pytest.fail(made.stderr.decode())
    return private, folder / f"{name}.pub"


def test_a_signature(tmp_path: Path) -> None:
    private, public = keys(tmp_path, "id")
    _, other = keys(tmp_path, "other")
    folder = written(tmp_path / "certificate", key=private)
    assert verdict_on(folder, public).findings == []
    assert any("by the key in id.pub" in note for note in verdict_on(folder, public).notes)
    assert any("not checked" in note for note in verdict_on(folder).notes)
    assert not verdict_on(folder, other).holds
    forged(folder, lambda evidence: None)  # whoever has no key makes a statement without a signature
    assert verdict_on(folder).holds
    assert not verdict_on(folder, public).holds


def test_keys_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no key")
    for each in (tmp_path / "text", tmp_path / "absent"):
        with pytest.raises(CannotSign, match="ed25519"):
            written(tmp_path / "certificate", key=each)
        assert not (tmp_path / "certificate").exists()
    folder = written(tmp_path / "certificate")
    with pytest.raises(CannotSign, match="ed25519"):
        verdict_on(folder, tmp_path / "text")


def test_no_certificate_is_written_over_another_or_of_half_a_run(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(NoCertificate, match="is there already"):
        written(folder)
    report = invented()
    left = CheckResult("computes", "computes.equivalence (pairs)", Status.NOT_RUN, "TOY", "block", reason="the budget")
    report = replace(report, checks=(*report.checks, left))
    with pytest.raises(NoCertificate, match="incomplete"):
        written(tmp_path / "other", report)


def test_nothing_is_left_where_writing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("conformance.certificate.writing.os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_certificate(tmp_path / "certificate", invented(), SMALL.edition, surroundings())
    assert list(tmp_path.iterdir()) == []


BROKEN = {
    "no folder": (lambda folder: [file.unlink() for file in folder.iterdir()] and folder.rmdir(), "no folder"),
    "no evidence": (lambda folder: (folder / EVIDENCE).unlink(), EVIDENCE),
    "cut off": (lambda folder: (folder / EVIDENCE).write_bytes((folder / EVIDENCE).read_bytes()[:-20]), "cut off"),
    "something behind": (
        lambda folder: (folder / EVIDENCE).write_bytes((folder / EVIDENCE).read_bytes() + b"x"),
        "follows the end",
    ),
    "no gzip": (lambda folder: (folder / EVIDENCE).write_bytes(b"{}"), "no gzip"),
    "a bomb": (lambda folder: (folder / EVIDENCE).write_bytes(gzip.compress(bytes(65 << 20))), "more than 64 MiB"),
    "deep": (lambda folder: packed(folder, b'{"a":' * 90_000 + b"1" + b"}" * 90_000), "no JSON"),
    "nested": (lambda folder: packed(folder, b'{"a":' * 40 + b"1" + b"}" * 40), "nested"),
    "twice": (lambda folder: packed(folder, b'{"format": 1, "format": 1}'), "twice"),
    "NaN": (lambda folder: packed(folder, b'{"format": NaN}'), "no number"),
    "a list": (lambda folder: packed(folder, b"[]"), "expected an object"),
    "another format": (lambda folder: packed(folder, b'{"format": 2}'), "format=2"),
    "no statement": (lambda folder: (folder / STATEMENT_FILE).write_text("{}"), "payloadType"),
    "no base64": (
        lambda folder: (folder / STATEMENT_FILE).write_text(
            '{"payloadType": "application/vnd.in-toto+json", "payload": "?"}'
        ),
        "base64",
    ),
}


def packed(folder: Path, content: bytes) -> None:
    (folder / EVIDENCE).write_bytes(gzip.compress(content))


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_no_certificate(name: str, folder: Path) -> None:
    change, told = BROKEN[name]
    change(folder)
    with pytest.raises(Malformed, match=told):
        read_certificate(folder)
    assert not verdict_on(folder).holds


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda evidence: evidence["report"].pop("checks"), "report.checks"),
        (lambda evidence: evidence["report"]["checks"].append(3), "expected an object"),
        (lambda evidence: cases_of(evidence)[0].update(status="great"), "report"),
        (lambda evidence: cases_of(evidence)[0].update(extra=1), "no field"),
        (lambda evidence: cases_of(evidence)[0].update(digest=1), "digest"),
        (lambda evidence: by_bound(evidence).update(error_over_bound="small"), "error_over_bound"),
        (lambda evidence: by_bound(evidence).update(error_over_bound=10**400), "too large"),
        (lambda evidence: evidence["report"].update(seed="7"), "report.seed"),
        (lambda evidence: evidence["report"].update(takes={"block": "silu"}), "report.takes"),
        (lambda evidence: evidence.update(device="a GPU"), "device"),
        (lambda evidence: evidence["report"].update(device="x" * 30_000), "characters"),
    ],
)
def test_a_field_of_another_type(change: Change, told: str, folder: Path) -> None:
    evidence = evidence_in(folder)
    change(evidence)
    packed(folder, json.dumps(evidence).encode())
    with pytest.raises(Malformed, match=told):
        read_certificate(folder)


def test_a_sample_convicts_an_invention(folder: Path) -> None:
    """Digests that nobody computed; where the bound judges, other bits are no finding."""
    certificate = read_certificate(folder)
    report = replace(certificate.report, target="cpu", origin="TorchExperts")
    bits = [replace(check, judged_by=BY_BITS) for check in report.checks if check.check == EQUIVALENCE][:6]
    sampled = spot_check(replace(certificate, report=replace(report, checks=bits)), 2, seed=1)
    assert (sampled.cases, sampled.equal, len(sampled.findings)) == (2, 0, 2)
    assert "other bits" in sampled.findings[0]
    bound = [replace(check, judged_by=f"{BY_BOUND}nothing declared") for check in bits]
    sampled = spot_check(replace(certificate, report=replace(report, checks=bound)), 2, seed=1)
    assert (sampled.cases, sampled.findings) == (2, [])
    with pytest.raises(ValueError, match="sees a cpu device here"):
        spot_check(certificate, 1)


SUMS = {f"{name}.{part}": 0.25 for name in DIRECTIONS for part in PARTS}


@pytest.mark.parametrize(
    ("change", "holds"),
    [
        ({}, True),
        ({"gain.signed": 0.5}, False),
        ({"gain.signed": float("inf")}, False),
        ({"gain.slack": None}, False),
    ],
)
def test_what_is_pooled_is_added_up_again(change: dict[str, float | None], holds: bool, tmp_path: Path) -> None:
    report = invented()
    pooled_result = CheckResult("computes", POOLED, Status.PASSED, "TOY", statistics=pooled([SUMS]))
    checks = [*report.checks, pooled_result]
    at = next(number for number, check in enumerate(checks) if check.check == EQUIVALENCE)
    sums = {name: value for name, value in {**SUMS, **change}.items() if value is not None}
    checks[at] = replace(checks[at], measured=sums)
    found = verdict_on(written(tmp_path / "certificate", replace(report, checks=checks)))
    assert found.holds == holds, found.findings
    assert holds or any(finding.startswith(POOLED) for finding in found.findings)
