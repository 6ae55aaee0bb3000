"""A run that was not finished is gone on with only by the code that it was begun with: no results of two backends come
to one verdict."""

from __future__ import annotations

import gzip
import importlib
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from conformance.backend_code import code_of, difference
from conformance.contain import SubjectRef, Worker
from conformance.contain.hosting import shutdown
from conformance.editions import edition
from conformance.report import Report
from conformance.shards import InvalidShard, gathered
from fp8moe.cli import app
from tests.unit.certificates import SMALL, BlockAlone, invented

HONEST = "from tests.unit.certificates import BlockAlone\n\nclass Experts(BlockAlone):\n    pass\n"
BROKEN = f"{HONEST}    def apply(self, *args, **kwargs):\n        return super().apply(*args, **kwargs) * 3\n"


@pytest.fixture(params=["module", "package"])
def source(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Of a backend in a loose file, and in a module of a package whose class another module has."""
    monkeypatch.syspath_prepend(str(tmp_path / "path"))
    folder = tmp_path / "path" / ("" if request.param == "module" else "edited_vendor")
    folder.mkdir(parents=True)
    if request.param == "package":
        (folder / "__init__.py").write_text("from edited_vendor.experts import Experts\n")
    file = folder / ("edited_vendor.py" if request.param == "module" else "experts.py")
    file.write_text(HONEST)
    importlib.invalidate_caches()
    (tmp_path / "out").mkdir()
    shutdown()  # of the workers' server, which keeps the path that it was started with
    yield file
    shutdown()
    for name in [name for name in sys.modules if name.partition(".")[0] == "edited_vendor"]:
        del sys.modules[name]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fp8moe.commands.certify.edition", lambda name: SMALL if name == "test.1" else edition(name))


def run(*arguments: object) -> tuple[int, str]:
    found = CliRunner().invoke(app, [str(each) for each in arguments])
    return found.exit_code, found.output


def certify(out: Path, *more: object) -> tuple[int, str]:
    backend = "edited_vendor:Experts"
    return run("certify", backend, "--device", "cpu", "--edition", "test.1", "--out", out / "c", *more)


def code_here() -> dict[str, str]:
    with Worker("cpu") as worker:
        return dict(
            code_of(worker, SubjectRef.named("edited_vendor:Experts"), ["edited_vendor", BlockAlone.__module__]).told
        )


def test_a_broken_backend_has_no_certificate_by_what_another_one_passed(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    kept, old = out / "c.partial.json.gz", out / "c.partial.json.gz.old"
    check = ("check", "edited_vendor:Experts", "--device", "cpu", "--seed", SMALL.seed)
    assert run(*check, "--report", kept)[0] == 0  # as if it had been ended before its certificate
    first = Report.from_json(gzip.decompress(kept.read_bytes()))
    assert any(check.case and check.status.value == "passed" for check in first.checks)
    assert first.code == code_here()
    source.write_text(BROKEN)

    status, told = run(*check, "--resume", kept)
    assert status == 64
    assert f"--resume {kept}: a report of other code than is here: the SHA-256 of its source and compiled" in told
    assert told.rstrip().endswith("run it from the start")

    status, told = certify(out, "--budget", 0)
    assert status == 2, told
    assert f"does not go on with {kept}, which is moved to {old}: the SHA-256 of its source" in told
    again = Report.from_json(gzip.decompress(kept.read_bytes()))
    assert not any(check.case for check in again.checks)
    assert Report.from_json(gzip.decompress(old.read_bytes())) == first
    source.write_text(HONEST)
    assert f"moved to {old}1: " in certify(out, "--budget", 0)[1]
    assert "does not go on" not in certify(out, "--budget", 0)[1]


def test_one_from_before_code_was_recorded_is_read_and_not_gone_on_with(source: Path, tmp_path: Path) -> None:
    kept = tmp_path / "out" / "c.partial.json.gz"
    certify(kept.parent, "--budget", 0)
    told = json.loads(gzip.decompress(kept.read_bytes()))
    del told["code"]
    kept.write_bytes(gzip.compress(json.dumps(told).encode()))
    assert Report.from_json(json.dumps(told)).code == {}
    assert "it tells no code of the backend: an earlier fp8moe made it" in certify(kept.parent, "--budget", 0)[1]
    assert source.exists()


def test_pieces_of_two_backends_make_no_certificate(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    pieces = [out / f"c.shard-{number}-of-2.json.gz" for number in (1, 2)]
    given = [each for piece in pieces for each in ("--shards", piece)]
    assert certify(out, "--shard", "1/2")[0] == 0
    source.write_text(BROKEN)
    certify(out, "--shard", "2/2", "--budget", 0)
    status, told = certify(out, *given)
    assert (status, "shard 2/2: other code of the backend beside shard 1/2: the SHA-256" in told) == (64, True), told
    certify(out, "--shard", "1/2", "--budget", 0)
    for piece in pieces:  # as if both had passed before the edit
        told_there = json.loads(gzip.decompress(piece.read_bytes()))
        told_there["code"]["sha256"] = "0" * 64
        told_there["checks"] = [check for check in told_there["checks"] if check["status"] != "not_run"]
        piece.write_bytes(gzip.compress(json.dumps(told_there).encode()))
    status, told = certify(out, *given)
    assert (status, "--shards: a report of other code than is here" in told) == (64, True), told
    assert not list(out.glob("*partial*"))


def test_pieces_from_before_code_was_recorded() -> None:
    report = replace(invented(), shard="1/2", code={})
    with pytest.raises(InvalidShard, match=r"shard 1/2: other code of the backend: it tells no code"):
        gathered([report, replace(report, shard="2/2")])


def test_what_is_in_the_digest(source: Path) -> None:
    before = code_here()
    assert before["package"] == f"edited_vendor, {BlockAlone.__module__}"  # that of its base
    cache = source.parent / "__pycache__"
    cache.mkdir(exist_ok=True)
    (cache / "x.py").write_text("")
    (source.parent / "notes.txt").write_text("")
    assert difference(before, code_here()) == ""
    (source.parent / "kernels.so").write_bytes(b"\x7fELF")
    is_package = source.name == "experts.py"  # of a loose file it is the file alone
    assert bool(difference(before, code_here())) == is_package
    assert "distribution's version was '1', and is '2'" in difference(
        {**before, "version": "1"}, {**before, "version": "2"}
    )


def test_what_is_beyond_the_most_counts_by_its_size(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("conformance.backend_code.MOST_BYTES", 10)
    before = code_here()
    source.write_text(HONEST.replace("pass", "None"))
    assert code_here() == before
    source.write_text(BROKEN)
    assert code_here() != before


def test_own_backends_have_the_suites_digest() -> None:
    with Worker("cpu") as worker:
        found = code_of(worker, SubjectRef.named("TorchExperts"), ["fp8moe.backends.torch_experts"]).told
    assert (found["package"], found["sha256"]) == ("fp8moe", found["suite"])


def test_what_is_edited_while_it_is_run_has_no_verdict(source: Path, tmp_path: Path) -> None:
    """Nor is it gone on with, edited back or not."""
    report = tmp_path / "out" / "r.json"
    check = ("check", "edited_vendor:Experts", "--device", "cpu", "--report", report)
    source.write_text(f"import pathlib\npathlib.Path(__file__).open('a').write('\\n')\n{HONEST}")
    status, told = run(*check)
    assert status == 2, told
    name = f"edited_vendor/{source.name}"
    assert f"{name} changed while it was run; what passed does not count, run it again" in told
    found = Report.from_json(report.read_text())
    assert (found.code, found.verdicts["computes"]) == ({}, "incomplete")
    assert not any(check.case for check in found.checks)
    assert "it tells no code of the backend" in run(*check, "--resume", report)[1]
