"""A run that a signal ends: SIGTERM, as a CI system's cancel or `docker stop` sends it, keeps what Ctrl-C keeps."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import fp8moe

ROOT = Path(fp8moe.__file__).parents[1]
SOON = 30.0
"""Seconds: a case at work has 240, and is not waited for."""
BACKEND = """
import os, pathlib, time
from tests.unit.certificates import BlockAlone

CALLS = pathlib.Path("calls")

class Slow(BlockAlone):
    def apply(self, *args, **kwargs):
        if not pathlib.Path("fast").exists():
            with CALLS.open("a") as file:
                file.write(f"{os.getpid()}\\n")
            if len(CALLS.read_text().splitlines()) > 12:
                pathlib.Path("stuck").touch()
                time.sleep(1000)
        return super().apply(*args, **kwargs)
"""


def started(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    path = os.pathsep.join([str(ROOT), str(folder)])
    (folder / "slow_vendor.py").write_text(BACKEND)
    return subprocess.Popen(
        [sys.executable, "-m", "fp8moe", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def until(condition: Any, seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


CHECK = ("check", "slow_vendor:Slow", "--device", "cpu", "--report", "report.json")
CERTIFY = ("certify", "slow_vendor:Slow", "--device", "cpu", "--out", "certificate")


@pytest.mark.parametrize(
    ("numbers", "status"),
    [
        ([signal.SIGTERM], 143),
        ([signal.SIGINT], 2),
        ([signal.SIGINT, signal.SIGTERM], 143),  # as GitHub's runners send them
        ([signal.SIGTERM, signal.SIGTERM, signal.SIGINT], 143),
    ],
    ids=lambda value: "-".join(each.name for each in value) if isinstance(value, list) else None,
)
def test_what_was_run_is_kept(numbers: list[signal.Signals], status: int, tmp_path: Path) -> None:
    run = started(tmp_path, *CHECK)
    until((tmp_path / "stuck").exists)
    pids = {int(line) for line in (tmp_path / "calls").read_text().split()}
    begun = time.monotonic()
    for number in numbers:
        run.send_signal(number)
        time.sleep(0.01)
    out, err = run.communicate(timeout=SOON)
    assert run.returncode == status, err
    assert time.monotonic() - begun < SOON
    assert "it was interrupted" in out
    assert "Traceback" not in err
    until(lambda: all(map(is_gone, pids)), 10.0)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["verdict"] == "incomplete"
    passed = [check["case"] for check in report["checks"] if check["status"] == "passed" and check.get("case")]
    assert passed
    assert not [check for check in report["checks"] if check["status"] == "failed"]

    if numbers == [signal.SIGTERM]:
        (tmp_path / "fast").touch()
        again = started(tmp_path, *CHECK, "--resume", "report.json")
        out, err = again.communicate(timeout=300)
        assert (again.returncode, out.splitlines()[-1].split(":")[0]) == (0, "passed"), out + err


def test_a_certificate_is_gone_on_with(tmp_path: Path) -> None:
    run = started(tmp_path, *CERTIFY)
    until((tmp_path / "stuck").exists)
    run.send_signal(signal.SIGTERM)
    _, err = run.communicate(timeout=SOON)
    assert run.returncode == 143, err
    assert "the same command goes on with it" in err
    assert (tmp_path / "certificate.partial.json.gz").exists()
    assert not (tmp_path / "certificate").exists()


def test_before_there_is_anything_to_keep(tmp_path: Path) -> None:
    (tmp_path / "slow_import.py").write_text("import pathlib, time\npathlib.Path('stuck').touch()\ntime.sleep(1000)\n")
    run = started(tmp_path, "check", "slow_import:Class", "--device", "cpu", "--report", "report.json")
    until((tmp_path / "stuck").exists)
    run.send_signal(signal.SIGTERM)
    _, err = run.communicate(timeout=SOON)
    assert (run.returncode, err) == (143, "fp8moe: interrupted\n")
    assert not (tmp_path / "report.json").exists()
