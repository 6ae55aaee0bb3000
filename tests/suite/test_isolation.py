"""A backend from outside the tree that ends its process: no run of `pytest` ends early, and none as a success."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.suite.running import QUICK, results_of, run_suite

ENDS = '''
"""Backends that end their process with status 0."""
import os
import threading

from fp8moe.backends.torch_experts import TorchExperts


class InApply(TorchExperts):
    """Where a batch has one token."""

    def apply(self, hidden, weights, ids, **kwargs):
        if len(hidden) == 1:
            print("this is the last of it")
            os._exit(0)
        return super().apply(hidden, weights, ids, **kwargs)


class InConstructor(TorchExperts):
    def __init__(self, config, quant, weights):
        os._exit(0)


class InThread(TorchExperts):
    def apply(self, hidden, weights, ids, **kwargs):
        thread = threading.Thread(target=lambda: os._exit(0))
        thread.start()
        thread.join()
        return super().apply(hidden, weights, ids, **kwargs)


class InC(TorchExperts):
    def apply(self, hidden, weights, ids, **kwargs):
        import ctypes

        ctypes.CDLL(None).exit(0)


def ends_last():
    threading.main_thread().join()
    os._exit(0)


class AtTheEnd(TorchExperts):
    """Right, and a thread of its outlives all others."""

    def __init__(self, config, quant, weights):
        super().__init__(config, quant, weights)
        threading.Thread(target=ends_last).start()


class Right(TorchExperts):
    def apply(self, hidden, weights, ids, **kwargs):
        print("one call")
        return super().apply(hidden, weights, ids, **kwargs)
'''


@pytest.fixture(scope="module")
def vendor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an installed package: two of its backends have entry points, the others a place in its module."""
    folder = tmp_path_factory.mktemp("vendor")
    (folder / "ends.py").write_text(ENDS)
    about = folder / "ends-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: ends\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[fp8moe.backends]\nIN_APPLY = ends:InApply\nRIGHT = ends:Right\n")
    return folder


def judged(folder: Path, names: Sequence[str], *options: str) -> subprocess.CompletedProcess[str]:
    return run_suite(folder, *QUICK, *(f"--fp8moe-backend={name}" for name in names), *options)


@pytest.fixture(scope="module")
def isolated(vendor: Path) -> subprocess.CompletedProcess[str]:
    names = ("IN_APPLY", "ends:InConstructor", "ends:InThread", "ends:InC", "ends:AtTheEnd", "RIGHT")
    return judged(vendor, names, "--fp8moe-report=isolated.json", "--junit-xml=isolated.xml")


def test_each_is_its_own_failure(isolated: subprocess.CompletedProcess[str], vendor: Path) -> None:
    assert isolated.returncode == 1, isolated.stdout + isolated.stderr
    for name in ("IN_APPLY", "InConstructor", "InThread", "InC"):
        assert re.search(rf"^{name} +FAIL 1", isolated.stdout, re.MULTILINE), name
        told = rf"^FAILED computes\.equivalence {name} v1:M=\d+: it ended the process with status 0"
        assert re.search(told, isolated.stdout, re.MULTILINE), name
    for name in ("AtTheEnd", "RIGHT"):
        assert re.search(rf"^{name} +ok \d+", isolated.stdout, re.MULTILINE), name
    assert re.search(r"4 failed, 2 passed", isolated.stdout)
    assert "in a worker process: IN_APPLY, InConstructor, InThread, InC, AtTheEnd, RIGHT\n" in isolated.stdout
    assert "v1:M=1: it ended the process with status 0; it printed last: 'this is the last of it'" in isolated.stdout
    assert 'name="test_pinned[IN_APPLY-block]"' in (vendor / "isolated.xml").read_text()


def test_what_it_prints_is_captured(isolated: subprocess.CompletedProcess[str]) -> None:
    _, _, captured = isolated.stdout.partition("Captured stdout call")
    assert captured.startswith(" ---")
    assert "\nthis is the last of it\n" in captured
    assert "one call" not in isolated.stdout  # of a test that passed


@pytest.fixture(scope="module")
def here(vendor: Path) -> subprocess.CompletedProcess[str]:
    names = ("IN_APPLY", "ends:AtTheEnd", "RIGHT")
    return judged(vendor, names, "--fp8moe-no-isolate", "--fp8moe-report=here.json", "-s")


def test_in_pytests_own_process_it_is_a_failure_too(here: subprocess.CompletedProcess[str]) -> None:
    """Of a call in the main thread the run is told to its end, after which a thread changes its status no more."""
    assert here.returncode == 1, here.stdout + here.stderr
    assert "in pytest's own process, which it can end: IN_APPLY (--fp8moe-no-isolate, --pdb or --trace)" in here.stdout
    told = r"^FAILED computes\.equivalence IN_APPLY v1:M=1: apply raised SystemExit: os\._exit\(0\) .* at ends\.py:\d+$"
    assert re.search(told, here.stdout, re.MULTILINE), here.stdout
    assert "1 failed, 2 passed" in here.stdout


def test_a_worker_says_the_same_of_a_right_one(
    isolated: subprocess.CompletedProcess[str], here: subprocess.CompletedProcess[str], vendor: Path
) -> None:
    figures = []
    for name, done in (("isolated.json", isolated), ("here.json", here)):
        results = json.loads((vendor / name).read_text())["results"]
        assert done.stdout
        figures.append([{k: v for k, v in r.items() if k != "measured"} for r in results if r["backend"] == "RIGHT"])
        assert len([r for r in results_of(vendor / name) if r[0] == "RIGHT" and r[2] == "passed"]) > 50
    assert figures[0] == figures[1]


def test_a_thread_ends_a_run_as_a_failure(vendor: Path) -> None:
    """Under a debugger's option, with which nothing is isolated."""
    done = judged(vendor, ["ends:InThread"], "--pdb")
    assert done.returncode == 1, done.stdout + done.stderr
    place = r"by a thread at \S+ends\.py:\d+, during \S+::test_pinned\[InThread-block\] \(call\)"
    told = rf"^fp8moe: os\._exit\(0\) was called, .*{place}, computes\.equivalence of InThread on v1:\S+; .* status 1$"
    assert re.search(told, done.stderr, re.MULTILINE), done.stderr


def test_limits_hold_for_every_backend_where_asked_for(vendor: Path) -> None:
    done = judged(vendor, ["TorchExperts", "RIGHT"], "--fp8moe-isolate")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "in a worker process: TorchExperts, RIGHT\n" in done.stdout


def test_a_worker_judges_the_code_that_this_process_has(vendor: Path, tmp_path: Path) -> None:
    """pytest puts the folders of what it collects in front of `sys.path`, where a module may have the same name."""
    front = tmp_path / "front"
    front.mkdir()
    (front / "ends.py").write_text(ENDS.replace("one call", "other code"))
    (front / "test_front.py").write_text("def test_nothing():\n    pass\n")
    done = judged(vendor, ["RIGHT"], str(front), "-rP")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "in a worker process: RIGHT\n" in done.stdout
    assert "one call" in done.stdout
    assert "other code" not in done.stdout


def test_a_failure_says_that_a_worker_has_seen_it(isolated: subprocess.CompletedProcess[str]) -> None:
    """Once for each of the four; where CI is set, pytest does not cut its summary, which repeats it."""
    failures, _, _ = isolated.stdout.partition(" fp8moe conformance ")
    assert failures.count("no conftest.py and no fixture: --fp8moe-no-isolate has it here") == 4
