"""Files that commands write: what is refused before any work, and what becomes of work whose file cannot be written."""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path

import pytest

from conformance.report import Report
from fp8moe.cli import app
from fp8moe.commands.app import EXIT_NOT_WRITTEN
from fp8moe.commands.files import NotWritten, check_folders, write_whole
from fp8moe.commands.question import BadInput
from tests.unit.command_line import no_variables, run  # noqa: F401 (a fixture)

CHECK = ("check", "TorchExperts", "--device", "cpu", "--budget", "0")


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder on a full disk: a file can be made there, and nothing written into it; elsewhere there is room."""
    folder = tmp_path / "full"
    folder.mkdir()
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    write = Path.write_bytes

    def without_room(path: Path, data: bytes) -> int:
        if path.parent == folder:
            path.touch()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(path, data)

    monkeypatch.setattr(Path, "write_bytes", without_room)
    return folder


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="there is no /proc here")
@pytest.mark.parametrize("option", ["--report", "--junit"])
def test_a_place_that_only_a_trial_shows_to_take_nothing(option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_arguments: object, **_options: object) -> Report:
        raise AssertionError("it was run")

    monkeypatch.setattr("fp8moe.commands.check.check_backend", never)
    told = run(*CHECK, option, "/proc/x.json", status=64).stderr
    assert told.startswith(f"fp8moe: {option} /proc/x.json: it cannot be written (")
    assert told.endswith("); name a file that can\n")


def test_a_trial_leaves_nothing(tmp_path: Path) -> None:
    there = tmp_path / "there.json"
    there.write_text("before")
    check_folders({"--report": tmp_path / "new.json", "--junit": there})
    assert [path.name for path in tmp_path.iterdir()] == ["there.json"]
    assert there.read_text() == "before"


def test_a_full_disk_costs_no_finished_work(full: Path) -> None:
    path = full / "report.json"
    path.write_text("before")
    done = run(*CHECK, "--report", str(path), status=EXIT_NOT_WRITTEN)
    assert f"fp8moe: {path}: could not be written ({os.strerror(errno.ENOSPC)}); it is kept as " in done.stderr
    assert done.stdout.splitlines()[-1].startswith("incomplete: ")
    (kept,) = (full.parent / "temporary").iterdir()
    assert f"it is kept as {kept}: move it from there" in done.stderr
    assert Report.from_json(kept.read_text()).backend == "TorchExperts"
    assert (path.read_text(), [each.name for each in full.iterdir()]) == ("before", ["report.json"])
    run(*CHECK, "--resume", str(kept), status=2)


def test_one_file_that_cannot_be_written_does_not_cost_the_other(full: Path) -> None:
    junit = full.parent / "junit.xml"
    done = run(*CHECK, "--report", str(full / "report.json"), "--junit", str(junit), status=EXIT_NOT_WRITTEN)
    assert junit.read_text().startswith("<?xml")
    assert done.stderr.count("could not be written") == 1


def test_a_run_to_certify_is_kept(full: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ("certify", "TorchExperts", "--device", "cpu", "--budget", "0", "--out", str(full / "certificate"))
    told = run(*asked, status=EXIT_NOT_WRITTEN).stderr
    (kept,) = (full.parent / "temporary").iterdir()
    assert f"certificate.partial.json.gz: could not be written ({os.strerror(errno.ENOSPC)}); it is kept as" in told
    assert str(kept) in told
    assert list(full.iterdir()) == []
    assert kept.name.endswith(".json.gz")
    monkeypatch.undo()
    kept.rename(full / "certificate.partial.json.gz")
    assert "goes on with" in run(*asked, status=2).stderr


def test_where_no_place_takes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere(*_arguments: object, **_options: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", nowhere)
    monkeypatch.setattr("tempfile.mkstemp", nowhere)
    with pytest.raises(NotWritten, match="no other place took it either") as found:
        write_whole(tmp_path / "x", "text")
    assert found.value.kept is None


def test_a_reader_never_meets_half_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is what it was until it is what it is to be."""
    path = tmp_path / "report.json"
    path.write_text("before")
    seen = []
    write = Path.write_bytes

    def watched(made: Path, data: bytes) -> int:
        done = write(made, data)
        seen.append((made.parent, path.read_text()))
        return done

    monkeypatch.setattr(Path, "write_bytes", watched)
    run(*CHECK, "--report", str(path), status=2)
    assert seen == [(tmp_path, "before")]
    assert json.loads(path.read_text())["verdict"] == "incomplete"
    assert [each.name for each in tmp_path.iterdir()] == ["report.json"]


@pytest.mark.parametrize("code", [errno.EBUSY, errno.EACCES])
def test_a_file_that_can_only_be_written_in_place(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one that is mounted into a container by itself, or in a folder that takes no other."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    path = tmp_path / "report.json"
    path.write_text("before")
    refuse = "replace" if code == errno.EBUSY else "touch"  # when it is written, when it is tried

    def refused(*_arguments: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(Path, refuse, refused)
    check_folders({"--report": path})
    write_whole(path, "after")
    assert path.read_text() == "after"
    new = tmp_path / "new.json"
    if code == errno.EACCES:
        with pytest.raises(BadInput, match=os.strerror(code)):
            check_folders({"--report": new})
    else:
        with pytest.raises(NotWritten, match=os.strerror(code)):
            write_whole(new, "text")


def test_a_link_stays_one_and_a_pipe_is_written_to(tmp_path: Path) -> None:
    link, real, pipe = tmp_path / "link", tmp_path / "real", tmp_path / "pipe"
    link.symlink_to(real)
    check_folders({"--report": link})
    write_whole(link, "text")
    assert (link.is_symlink(), real.read_text()) == (True, "text")
    os.mkfifo(pipe)
    check_folders({"--report": pipe})
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_whole(pipe, "text")
    assert os.read(reader, 10) == b"text"
    os.close(reader)
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_links_that_lead_to_each_other(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(BadInput, match="it cannot be written"):
        check_folders({"--report": tmp_path / "a"})


def test_the_status_has_no_other_meaning() -> None:
    assert EXIT_NOT_WRITTEN == os.EX_IOERR
    assert f"{EXIT_NOT_WRITTEN}: a file could not" in " ".join(str(app.info.epilog).split())
