"""`fp8moe certify` and `fp8moe verify` on a real run, of a small edition."""

from __future__ import annotations

import gzip
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from conformance.certificate.statement import EVIDENCE
from conformance.certificate.times.kept import FAILED, Times
from conformance.editions import edition
from conformance.report import Report
from conformance.shards import InvalidShard, Shard, gathered
from fp8moe import __version__
from fp8moe.cli import app
from tests.unit.certificates import SMALL, cases_of, invented

SCOPE = "takes 1 of 10 schemes: block (silu alone); does not take tensor_static, "
BACKEND = "tests.unit.certificates:BlockAlone"


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("fp8moe.commands.certify", "conformance.certificate.verifying"):
        monkeypatch.setattr(f"{module}.edition", lambda name: SMALL if name == SMALL.edition else edition(name))
    monkeypatch.setattr("conformance.certificate.verifying.verify.__defaults__", (None, lambda name: SMALL))


def run(*arguments: object) -> tuple[int, str]:
    found = CliRunner().invoke(app, [str(each) for each in arguments])
    return found.exit_code, found.output


def test_from_a_run_to_a_certificate_that_holds(tmp_path: Path) -> None:
    out = tmp_path / "certificate"
    asked = ("certify", BACKEND, "--device", "cpu", "--edition", SMALL.edition, "--out", out)
    status, told = run(*asked, "--budget", 0)
    assert status == 2
    assert "no certificate yet" in told
    assert not out.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["certificate.partial.json.gz"]

    status, told = run(*asked)
    assert (status, "goes on with" in told, "certificate of edition test.1" in told) == (0, True, True), told
    assert "times: not taken: of a cpu device" in told
    assert SCOPE in told
    assert [path.name for path in tmp_path.iterdir()] == ["certificate"]

    status, told = run("verify", out)
    assert (status, "Not proven" in told) == (0, True), told
    assert SCOPE in told.splitlines()[-2]
    assert told.splitlines()[-1] == "holds: the backend passed"
    assert "note  times not taken: of a cpu device" in told

    status, told = run("verify", out, "--spot-check", 3)
    assert status == 0, told
    # Of those that it may draw one is not applicable.
    assert re.search("3 cases run again on this device: (3 with the same bits|2 with the same bits, 1 refused)", told)

    evidence = json.loads(gzip.decompress((out / EVIDENCE).read_bytes()))
    assert evidence["release"] == {"distribution": "fp8moe", "version": __version__, "why": ""}
    cases_of(evidence)[0]["digest"] = "0" * 16
    (out / EVIDENCE).write_bytes(gzip.compress(json.dumps(evidence).encode()))
    status, told = run("verify", out)
    assert (status, "the evidence's file has changed" in told) == (1, True), told

    status, told = run(*asked)
    assert (status, "is there already; remove it, or give another --out" in " ".join(told.split())) == (64, True), told


@pytest.mark.parametrize("raises", [False, True])
def test_times_that_fail_cost_the_checks_nothing(raises: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU whose process of times ends, or where our own code goes wrong: told, kept, and the verdict stays."""
    asked: list[float] = []

    def failed(report: Report, seconds: float) -> Times:
        asked.append(seconds)
        if raises:
            raise KeyError("what nobody thought of")
        return Times(FAILED, f"{report.origin} has no time: its process ended with status -11")

    monkeypatch.setattr("fp8moe.commands.certify.take", failed)
    out = tmp_path / "certificate"
    status, told = run("certify", BACKEND, "--device", "cpu", "--edition", SMALL.edition, "--out", out, "--times", 30)
    why = (
        "an error of the suite itself: KeyError: 'what nobody thought of'"
        if raises
        else f"{BACKEND} has no time: its process ended with status -11"
    )
    assert (status, asked, f"times: failed: {why}" in told) == (0, [30.0], True), told
    status, told = run("verify", out)
    assert (status, f"note  times failed: {why}" in told, "holds: the backend passed" in told) == (0, True, True), told


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--edition", "1999"), "--edition"),
        (("--device", "interpreter"), "--device interpreter: a certificate is of a run on cpu, cuda, rocm, xpu"),
        (("--times", "1e9"), "--times 1e+09: at most 3600 seconds"),
    ],
)
def test_what_is_refused(arguments: tuple[str, ...], told: str, tmp_path: Path) -> None:
    status, output = run("certify", BACKEND, "--out", tmp_path / "certificate", *arguments)
    output = " ".join(output.split())
    assert status == 64
    assert told in output
    assert list(tmp_path.iterdir()) == []


def test_without_a_gpu_the_cpu_is_to_be_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("fp8moe.commands.certify.device_name", lambda device: "interpreter")
    status, output = run("certify", BACKEND, "--out", tmp_path / "certificate")
    assert (status, output.startswith("fp8moe: no GPU is here, and no --device given: ")) == (64, True)


def test_an_edition_that_is_out_asks_for_the_level_certify() -> None:
    assert edition("2026.1").level == "certify"


def test_shards_come_to_the_same_certificate(tmp_path: Path) -> None:
    out = tmp_path / "certificate"
    asked = ("certify", BACKEND, "--device", "cpu", "--edition", SMALL.edition, "--out", out)
    pieces = [tmp_path / f"certificate.shard-{number}-of-2.json.gz" for number in (1, 2)]

    def of(*files: Path) -> list[object]:
        return [each for file in files for each in ("--shards", file)]

    assert run(*asked, "--shard", "1/2", "--budget", 0)[0] == 2
    status, told = run(*asked, *of(pieces[0]))
    assert (status, "not run to its end" in told) == (64, True), told
    for number in (1, 2):
        status, told = run(*asked, "--shard", f"{number}/2")
        assert (status, f"shard {number}/2: done, " in told, "incomplete" in told) == (0, True, False), told
        merged = f"merge all 2 with: fp8moe certify {BACKEND} --out {out} --device cpu --edition {SMALL.edition}"
        assert f"in {pieces[number - 1]}; {merged} --shards FILE ..." in told, told
    for files, wrong in (((pieces[0],), "missing are 2/2"), ((*pieces, pieces[0]), "each must be there once")):
        status, told = run(*asked, *of(*files))
        assert (status, wrong in told) == (64, True), told
    status, told = run(*asked, *of(*pieces))
    assert (status, "certificate of edition test.1" in told) == (0, True), told
    assert run("verify", out)[0] == 0

    reports = [json.loads(gzip.decompress(path.read_bytes())) for path in pieces]
    cases = [[(check["check"], check["case"]) for check in report["checks"] if check.get("case")] for report in reports]
    assert min(map(len, cases)) > 20
    assert not set(cases[0]) & set(cases[1])
    assert all(check["seconds"] > 0 for report in reports for check in report["checks"] if check.get("case"))


def test_shards_of_two_runs(tmp_path: Path) -> None:
    report = replace(invented(), shard="1/2")
    for changes in ({"seed": 8}, {"device": "another GPU"}, {"versions": {}}, {"backend": "OTHER"}):
        with pytest.raises(InvalidShard, match=next(iter(changes))):
            gathered([report, replace(report, shard="2/2", **changes)])
    with pytest.raises(InvalidShard, match="of no shard"):
        gathered([invented()])
    with pytest.raises(InvalidShard, match="different counts"):
        gathered([report, replace(report, shard="2/3")])
    assert gathered([report, replace(report, shard="2/2")]).shard == ""


@pytest.mark.parametrize("text", ["", "0/2", "3/2", "1/0", "1", "a/b", "1/2000", "-1/2", "1/2/3", "\u0661/\u0662"])
def test_what_is_no_shard(text: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidShard, match="expected K/N"):
        Shard.parse(text)
    assert run("certify", BACKEND, "--out", tmp_path / "x", "--device", "cpu", "--shard", text)[0] == 64
