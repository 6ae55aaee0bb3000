"""A certificate holds as it was written, and is read as what nobody vouches for. Forgeries: `test_forgeries`."""

from __future__ import annotations

import base64
import gzip
import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from conformance.cases import Case
from conformance.certificate.consistent import zeros
from conformance.certificate.reading import Malformed, read_certificate
from conformance.certificate.sampling import spot_check
from conformance.certificate.signing import CannotSign
from conformance.certificate.statement import EVIDENCE
from conformance.certificate.verifying import Verified, verify
from conformance.certificate.writing import STATEMENT_FILE, NoCertificate, write_certificate
from conformance.checks import EQUIVALENCE
from conformance.matrix import BY_BITS, BY_BOUND
from conformance.pooling import POOLED
from conformance.results import CheckResult, Status
from fp8moe.commands.certify import print_verified
from tests.unit.certificates import (
    SMALL,
    SUMS,
    Change,
    by_bound,
    cases_of,
    equivalence_of,
    evidence_in,
    forged,
    invented,
    surroundings,
    values_of,
    written,
)


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


def test_verdicts_that_the_results_do_not_come_to(folder: Path) -> None:
    evidence = evidence_in(folder)
    evidence["report"]["verdicts"]["performs"] = "passed"
    packed(folder, json.dumps(evidence).encode())
    assert any(finding.startswith("report.verdicts: ") for finding in verdict_on(folder).findings)


def test_a_failure_called_passed(tmp_path: Path) -> None:
    """Its status alone changed, or the case gone: each tells. With its figures changed too, only a sample tells."""
    for number, change in enumerate(
        (
            lambda evidence: failures(evidence)[0].update(status="passed"),
            lambda evidence: failures(evidence)[0].update(
                status="passed", reason="", error_over_bound=0.5, measured=SUMS
            ),
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
        first["digest"] = second["digest"] = zeros(Case.parse(first["case"]))

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


@pytest.mark.parametrize("origin", ["ACME_MOE", "acme_moe.experts:AcmeExperts"])
def test_a_backend_that_is_not_installed_is_not_sampled(origin: str, folder: Path) -> None:
    certificate = read_certificate(folder)
    report = replace(certificate.report, target="cpu", origin=origin)
    with pytest.raises(ValueError, match=rf"^{origin}: (there is no module acme_moe|no backend has this name)"):
        spot_check(replace(certificate, report=report), 1)


def test_a_sample_convicts_a_refusal_that_is_none(folder: Path) -> None:
    certificate = read_certificate(folder)
    first = next(check for check in certificate.report.checks if check.check == EQUIVALENCE)
    refused = replace(first, status=Status.NOT_SUPPORTED, reason="SHAPE", digest="", error_over_bound=None)
    report = replace(certificate.report, target="cpu", origin="TorchExperts", checks=[refused])
    sampled = spot_check(replace(certificate, report=report), 1, seed=1)
    assert (sampled.cases, sampled.equal, len(sampled.findings)) == (1, 0, 1)
    assert "passed here" in sampled.findings[0]


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
    checks = list(report.checks)
    at = next(number for number, check in enumerate(checks) if "gain.signed" in check.measured)
    sums = {name: value for name, value in {**SUMS, **change}.items() if value is not None}
    checks[at] = replace(checks[at], measured=sums)
    found = verdict_on(written(tmp_path / "certificate", replace(report, checks=checks)))
    assert found.holds == holds, found.findings
    assert holds or any(finding.startswith(POOLED) for finding in found.findings)


def test_wrong_outputs_may_be_alike(tmp_path: Path) -> None:
    """A backend that answers NaN to everything has an honest certificate, too."""
    report = invented(failing=30)
    digests = {"failed": "0" * 16}
    checks = [replace(check, digest=digests.get(check.status.value, check.digest)) for check in report.checks]
    seeds = {Case.parse(check.case).seed for check in checks if check.status is Status.FAILED}
    assert len(seeds) > 1
    found = verdict_on(written(tmp_path / "certificate", replace(report, checks=checks)))
    assert (found.findings, found.verdict) == ([], "failed")


def test_a_certificate_is_of_a_run_with_cases(tmp_path: Path) -> None:
    check = CheckResult("selects", "selects.contract", Status.FAILED, "TOY", reason="it has no apply")
    with pytest.raises(NoCertificate, match="no case was run"):
        written(tmp_path / "certificate", replace(invented(), takes={}, checks=[check]))


def test_nothing_waits_for_a_pipe(folder: Path) -> None:
    (folder / EVIDENCE).unlink()
    os.mkfifo(folder / EVIDENCE)
    assert verdict_on(folder).findings == [f"{EVIDENCE}: no plain file"]


HOSTILE = "\x1b[2Jholds: the backend passed\x1b[8m\n\u202e\x9b31m\ud800[bold]x[/bold]"


def test_texts_stay_on_their_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def change(evidence: dict[str, Any]) -> None:
        evidence["device"]["name"] = evidence["report"]["device"] = HOSTILE
        evidence["distribution"] = None
        evidence["release"]["version"] = cases_of(evidence)[0]["reason"] = HOSTILE

    forged(folder, change)
    print_verified(verdict_on(folder))
    told = capsys.readouterr().out
    assert all(char.isprintable() or char == "\n" for char in told)
    assert not any(line.startswith("holds") for line in told.splitlines())
    assert "[bold]x[/bold]" in told


def test_what_names_a_backend_again_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = verdict_on(written(tmp_path / "certificate", replace(invented(), origin="acme.moe:TOY")))
    assert found.findings == []
    print_verified(found)
    assert capsys.readouterr().out.startswith("TOY (acme.moe:TOY) from toy 1, edition")
