"""What `fp8moe certify` makes of a run that has ended: a certificate of a whole one alone, and no work is lost."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from conformance.certificate.times.kept import NOT_TAKEN, Times
from conformance.left import left_reason
from conformance.planned import BadRequest
from conformance.report import Report
from conformance.results import CheckResult, Status
from conformance.shards import FAILED_BEFORE
from fp8moe.commands.certify import end, partial, status_of_certify
from fp8moe.commands.check import write_report
from fp8moe.commands.files import NotWritten
from tests.unit.certificates import SMALL, invented, surroundings
from tests.unit.command_line import run


def left(why: str, report: Report) -> Report:
    reason = left_reason(why, 9, "relations")
    one = CheckResult("computes", "computes.relation.chunks (relations)", Status.NOT_RUN, "TOY", "block", reason=reason)
    return replace(report, checks=[*report.checks, one])


def ended(report: Report, out: Path, unwritten: NotWritten | None = None) -> None:
    end(report, SMALL, out, surroundings, None, lambda: Times(NOT_TAKEN, "none were asked for"), unwritten)


def refuses(*_: object, **__: object) -> None:
    raise BadRequest("resume: a report of other versions; run it from the start")


def test_what_cannot_be_gone_on_with_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No option has named it, and the remedy is what there is to do about it."""
    kept = partial(tmp_path / "c")
    asked = ("certify", "TorchExperts", "--device", "cpu", "--out", str(tmp_path / "c"))
    monkeypatch.setattr("fp8moe.commands.check.check_backend", refuses)
    write_report(kept, invented())
    assert f"fp8moe: {kept}: a report of other versions; run it from the start\n" in run(*asked, status=64).stderr
    told = run("check", "TorchExperts", "--resume", str(kept), status=64).stderr
    assert told.startswith(f"fp8moe: --resume {kept}: a report of other versions")
    kept.write_bytes(b"no gzip")
    told = run(*asked, status=64).stderr
    assert f"fp8moe: {kept}: {kept.name} is no whole gzip file" in told
    assert told.endswith("it is no run to go on with: move it away, and the same command starts afresh\n")


@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("why", ["the budget of 3 s was spent", "it was interrupted", "it hangs: 3 cases in a row"])
def test_a_run_that_was_stopped_has_none(
    why: str, failing: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A failure is a verdict, and yet no reason to throw away what the rest of the cases would be gone on with from."""
    out, report = tmp_path / "certificate", left(why, invented(failing))
    write_report(partial(out), report)
    ended(report, out)
    assert "no certificate yet: what was run is in" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [partial(out).name]
    assert status_of_certify(report) == (1 if failing else 2)


@pytest.mark.parametrize(("failing", "status"), [(0, 0), (1, 1)])
def test_a_whole_run_has_one(failing: int, status: int, tmp_path: Path) -> None:
    out, report = tmp_path / "certificate", invented(failing)
    report = left(FAILED_BEFORE, report) if failing else report
    write_report(partial(out), report)
    ended(report, out)
    assert [path.name for path in tmp_path.iterdir()] == ["certificate"]
    assert status_of_certify(report) == status


def test_a_certificate_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_arguments: object) -> None:
        raise OSError(28, "No space left on device")

    out, report = tmp_path / "certificate", invented()
    write_report(partial(out), report)
    monkeypatch.setattr("fp8moe.commands.certify.write_certificate", refused)
    with pytest.raises(
        NotWritten, match=r"could not be written \(No space left on device\); with what is in .*partial"
    ):
        ended(report, out)
    assert partial(out).exists()


def test_a_run_that_is_kept_elsewhere(tmp_path: Path) -> None:
    kept, out = tmp_path / "kept.json", tmp_path / "certificate"
    unwritten = NotWritten("it is kept elsewhere", kept)
    kept.touch()
    with pytest.raises(NotWritten, match="it is kept elsewhere"):
        ended(left("it was interrupted", invented()), out, unwritten)
    assert kept.exists()
    ended(invented(), out, unwritten)
    assert [path.name for path in tmp_path.iterdir()] == ["certificate"]
