"""Two checkouts in two processes: whose time is whose, and what a version that fails says. The checkouts are played."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from conformance.timing import two_processes
from conformance.timing.state import Watch
from conformance.timing.two_processes import TwoProcessPairs, Version, WorkerFailed

WORKER = """
import json, sys
for line in sys.stdin:
    asked = json.loads(line)
    if asked["verb"] == "dance":
        continue
    answer = {
        "hello": {"protocol": PROTOCOL, "versions": {}, "device": "played"},
        "make": {
            "count": asked.get("count") or 20,
            "method": "eager" if "EAGER" in asked.get("cell", "") else "graph",
            "given": f"memory of {asked.get('cell')}",
        },
        "drop": {},
        "replay": {"us": [US], "at": [[0.0, 0.0]]},
    }[asked["verb"]]
    if asked["verb"] == "make" and "BROKEN" in asked["cell"]:
        answer = {"error": "RuntimeError: no kernel image"}
    if asked["verb"] == "make" and "LOUD" in asked["cell"]:
        print("a library's own words", flush=True)
    if asked["verb"] == "make" and "DEAD" in asked["cell"]:
        sys.exit(7)
    print(json.dumps(answer), flush=True)
"""


def checkout(folder: Path, us: float, protocol: int = 2) -> Path:
    """A folder with a worker whose replays take so many microseconds."""
    timing = folder / "conformance" / "timing"
    timing.mkdir(parents=True)
    for package in (timing, timing.parent):
        (package / "__init__.py").write_text("")
    (timing / "worker.py").write_text(f"US = {us}\nPROTOCOL = {protocol}\n{WORKER}")
    return folder


def test_each_version_has_its_own_times(tmp_path: Path) -> None:
    a, b = Version("A", checkout(tmp_path / "a", 100.0)), Version("B", checkout(tmp_path / "b", 150.0))
    with TwoProcessPairs({"cell": ("X one", "Y one")}, (a, b), Watch(polls=[])) as sampler:
        assert sampler.processes == 2
        found = sampler.pairs("cell", 4)
    np.testing.assert_array_equal(found.a_us, [100.0] * 4)
    np.testing.assert_array_equal(found.b_us, [150.0] * 4)
    assert not found.flags.any()
    # Two warm pairs, and each replay is launched once more before it is timed.
    assert found.spent_us == 2 * (4 + 2) * 250.0


def test_what_a_version_answers_is_told_with_its_name(tmp_path: Path) -> None:
    a, b = Version("A", checkout(tmp_path / "a", 1.0)), Version("B", checkout(tmp_path / "b", 1.0))
    cells = {"broken": ("X", "BROKEN"), "mixed": ("X", "EAGER"), "dead": ("DEAD", "X")}
    with TwoProcessPairs(cells, (a, b), Watch(polls=[])) as sampler:
        with pytest.raises(WorkerFailed, match="B: RuntimeError: no kernel image"):
            sampler.pairs("broken", 2)
        with pytest.raises(WorkerFailed, match="mixed: A makes graph, B eager: such times are not compared"):
            sampler.pairs("mixed", 2)
        with pytest.raises(WorkerFailed, match="A: its process ended with status 7"):
            sampler.pairs("dead", 2)
    assert [version._process.poll() is None for version in (a, b)] == [False, False]


def test_an_answer_that_is_none_is_told(tmp_path: Path) -> None:
    a, b = Version("A", checkout(tmp_path / "a", 1.0)), Version("B", checkout(tmp_path / "b", 1.0))
    with (
        TwoProcessPairs({"loud": ("LOUD", "X")}, (a, b), Watch(polls=[])) as sampler,
        pytest.raises(WorkerFailed, match="A: its answer to 'make' is no JSON: \"a library's own words\""),
    ):
        sampler.pairs("loud", 2)


def test_no_answer_in_time_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a = Version("A", checkout(tmp_path / "a", 1.0))
    monkeypatch.setattr(two_processes, "SECONDS", 0.2)
    with pytest.raises(WorkerFailed, match=r"A: no answer to 'dance' within 0\.2 s: X"):
        a.ask("dance", cell="X")
    a.close()


def test_what_is_no_checkout_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WorkerFailed, match=r"no conformance/timing/worker.py: expected a checkout of this project"):
        Version("A", tmp_path)


def test_another_protocol_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WorkerFailed, match="times by protocol 9, not 2"):
        Version("A", checkout(tmp_path, 1.0, protocol=9))
