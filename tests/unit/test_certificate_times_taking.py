"""How a certificate's times are taken: in processes that may fail, within a time, and never at the checks' expense."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from conformance.cases import Case
from conformance.certificate.times import taking
from conformance.certificate.times.kept import FAILED, NOT_TAKEN, TAKEN, Times
from conformance.certificate.times.taking import take
from conformance.performs import Work
from conformance.timing import worker
from conformance.timing.side_by_side import Contenders, SideBySide
from conformance.timing.two_processes import Version, WorkerFailed
from tests.unit.certificates import invented
from tests.unit.timed_certificates import CASES, H200, STATE, on_h200, rounds, timed

Answer = Callable[[Case, bool], dict[str, Any]]


def answer(case: Case, alone: bool = False, **changed: Any) -> dict[str, Any]:
    """Of a process in which all goes well."""
    one = timed(CASES.index(case))
    us = {name: each for name, each in one.us.items() if not alone or name == "TOY"}
    left = ["TRITON"] if alone else []
    told = {
        "selected": one.selected,
        "us": us,
        "absent": dict(one.absent),
        "left": left,
        "device": H200,
        "state": STATE,
    }
    return told | changed


@dataclass
class Played:
    """Processes, and the time that they take: ten seconds for a case, five to start.

    Args:
        answers: what they say to a case, or raise.
    """

    answers: Answer = answer
    now: float = 0.0
    started: int = 0
    closed: int = 0

    def start(self, left: float) -> Played:
        assert left > 0
        self.started += 1
        self.now += 5
        return self

    def ask(self, verb: str, seconds: float | None = None, **given: Any) -> dict[str, Any]:
        assert (verb, given["backend"], given["target"]) == ("beside", "TOY", "cuda")
        assert seconds is not None
        if seconds < 10:
            self.now += seconds
            raise WorkerFailed("no answer in time")
        self.now += 10
        return self.answers(Case.parse(given["case"]), given["alone"])

    def close(self) -> None:
        self.closed += 1


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Times, Played]]:
    def taken(answers: Answer = answer, seconds: float = 1e4) -> tuple[Times, Played]:
        processes = Played(answers)
        monkeypatch.setattr(taking, "CLOCK", lambda: processes.now)
        found = take(on_h200(), seconds, processes.start)
        assert processes.closed == processes.started
        return found, processes

    return taken


Taken = Callable[..., tuple[Times, Played]]


def test_every_case_in_one_process(played: Taken) -> None:
    found, processes = played()
    assert (found.status, found.reason, found.device) == (TAKEN, "", H200)
    assert [one.case for one in found.cases] == list(map(str, CASES))
    assert processes.started == 1


def test_the_time_is_kept(played: Taken) -> None:
    """5 s to start, 4 cases, and what is stopped in the fifth is not counted."""
    found, processes = played(seconds=48)
    assert (found.status, len(found.cases), processes.now) == (TAKEN, 4, 48)
    found, processes = played(seconds=12)
    assert (found.status, found.reason) == (FAILED, "TOY has no time: the time was over")
    assert processes.now == 12


def test_another_backend_that_ends_the_process(played: Taken) -> None:
    """The case is timed once more, with the backend alone, and the next one with all of them again."""

    def answers(case: Case, alone: bool) -> dict[str, Any]:
        if case == CASES[1] and not alone:
            raise WorkerFailed("its process ended with status -11")
        return answer(case, alone)

    found, processes = played(answers)
    assert (found.status, len(found.cases), processes.started) == (TAKEN, len(CASES), 2)
    one = found.cases[1]
    assert set(one.us) == {"TOY"}
    assert one.absent["TRITON"] == "with all of them the case failed: its process ended with status -11"
    assert all(set(each.us) == {"TOY", "TRITON"} for each in found.cases if each is not one)


def test_the_backend_itself_ends_the_process(played: Taken) -> None:
    def ends(case: Case, alone: bool) -> dict[str, Any]:
        raise WorkerFailed(f"status {-11 if alone else -9}")

    found, processes = played(ends)
    assert found == Times(FAILED, "TOY has no time: status -9; and alone: status -11")
    assert processes.started == 2 * len(CASES)

    found, _ = played(lambda case, alone: ends(case, alone) if case == CASES[1] else answer(case, alone))
    assert (found.status, len(found.cases)) == (TAKEN, len(CASES))
    assert found.cases[1].absent == {"TOY": "status -9; and alone: status -11"}


@pytest.mark.parametrize(
    "wrong",
    [
        {"us": {"TOY": [0.0] * 16}},
        {"us": {"TOY": rounds(50.0)[:3]}},
        {"us": "fast"},
        {"absent": {"MARLIN": 3}},
        {"absent": None},
        {"left": 7},
        {"device": {"name": "NVIDIA H200"}},
        {"selected": ["TRITON"]},
    ],
)
def test_an_answer_that_is_none(wrong: dict[str, Any], played: Taken) -> None:
    """A backend runs in the process, and may have answered in its place."""
    found, _ = played(lambda case, alone: answer(case, alone, **wrong), 100)
    assert found.status == FAILED
    assert "the process gave no times" in found.reason
    found, _ = played(lambda case, alone: answer(case, alone, **({} if alone else wrong)), 100)
    assert (found.status, set(found.cases[0].us)) == (TAKEN, {"TOY"})
    found, _ = played(lambda case, alone: {}, 100)
    assert found.status == FAILED


def test_no_process_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def start(left: float) -> Played:
        asked.append(left)
        raise WorkerFailed("torch is broken")

    found = take(on_h200(), 50.0, start)
    assert found == Times(FAILED, "TOY has no time: no process that could time: torch is broken")
    assert len(asked) == 1


def test_faster_than_the_floor_is_told(played: Taken) -> None:
    def fast(name: str) -> Answer:
        def answers(case: Case, alone: bool) -> dict[str, Any]:
            told = answer(case, alone)
            return told | {"us": told["us"] | ({name: rounds(0.5)} if case == CASES[2] else {})}

        return answers

    found, _ = played(fast("TOY"))
    assert (found.status, found.cases) == (FAILED, ())
    assert found.reason.startswith("TOY took 0.5")
    assert found.reason.endswith(str(CASES[2]))

    found, _ = played(fast("TRITON"))
    assert found.status == TAKEN
    assert "TRITON took 0.5" in found.cases[2].absent["TRITON"]
    assert set(found.cases[2].us) == {"TOY"}


def test_a_device_that_the_checks_did_not_run_on(played: Taken) -> None:
    found, _ = played(lambda case, alone: answer(case, alone, device=H200 | {"name": "NVIDIA H100 80GB HBM3"}))
    assert found.status == FAILED
    assert "the checks ran on 'NVIDIA H200'" in found.reason


@pytest.mark.parametrize(
    ("changed", "seconds", "told"),
    [
        ({}, 0, "--times 0"),
        ({"target": "cpu"}, 9, "of a cpu device"),
        ({"target": "xpu"}, 9, "of a xpu device"),
        ({"device": "NVIDIA H200 MIG 1g.18gb"}, 9, "the rates of NVIDIA H200 MIG 1g.18gb are not known"),
        ({"takes": {"tensor_128": ("silu",)}}, 9, "no published layer"),
        ({"takes": {"block": ("gelu",)}}, 9, "no published layer"),
    ],
)
def test_why_none_are_taken(changed: dict[str, Any], seconds: float, told: str) -> None:
    def start(left: float) -> Played:
        raise AssertionError("a process was started")

    found = take(on_h200(**changed), seconds, start)
    assert (found.status, found.files({})) == (NOT_TAKEN, {})
    assert told in found.reason
    assert take(invented(), 9, start).status == NOT_TAKEN  # "a GPU" has no rates


def test_a_real_process_without_a_gpu() -> None:
    """It ends with an error, and this one goes on."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    found = take(on_h200(), 100.0)
    assert (found.status, found.reason.startswith("TOY has no time: no process that could time: ")) == (FAILED, True)


WORKER = """
import json, os, pathlib, sys, time
answers = json.loads(pathlib.Path(__file__).with_name("answers.json").read_text())
for line in sys.stdin:
    asked = json.loads(line)
    number = asked.get("case") and list(answers).index(asked["case"])
    if number == 1 and not asked["alone"]:
        os.abort()
    if number == 3:
        time.sleep(600)
    hello = {"protocol": 2, "versions": {}, "device": "played"}
    print(json.dumps(answers[asked["case"]][asked["alone"]] if asked["verb"] == "beside" else hello), flush=True)
"""


def test_real_processes_that_end_and_hang(tmp_path: Path) -> None:
    """The second case ends its process, and is timed alone in another; the fourth hangs until the time is over."""
    timing = tmp_path / "conformance" / "timing"
    timing.mkdir(parents=True)
    for package in (timing, timing.parent):
        (package / "__init__.py").write_text("")
    (timing / "worker.py").write_text(WORKER)
    both = {str(case): [answer(case, alone) for alone in (False, True)] for case in CASES}
    (timing / "answers.json").write_text(json.dumps(both))
    started: list[Version] = []

    def start(left: float) -> Version:
        started.append(Version("the process that times", tmp_path, left))
        return started[-1]

    begin = time.monotonic()
    found = take(on_h200(), 8.0, start)
    assert time.monotonic() - begin < 30
    assert (found.status, [set(one.us) for one in found.cases]) == (
        TAKEN,
        [{"TOY", "TRITON"}, {"TOY"}, {"TOY", "TRITON"}],
    )
    assert "its process ended with status -6" in found.cases[1].absent["TRITON"]
    assert len(started) == 2


def test_the_process_times_a_case_beside_the_others_or_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def played(case: Case, names: Sequence[str], absent: dict[str, str]) -> SideBySide:
        return SideBySide({name: np.full(16, 1 / 3) for name in names}, absent, Work(0, 0), {})

    monkeypatch.setattr(worker, "contenders", lambda case, target: Contenders("A", ("A", "B"), {"C": "not there"}))
    monkeypatch.setattr(worker, "side_by_side", played)
    monkeypatch.setattr(worker, "resolve_target", lambda name: name)
    monkeypatch.setattr(worker, "describe_device", lambda: SimpleNamespace(**H200))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    given = {"verb": "beside", "case": str(CASES[0]), "backend": "TOY", "target": "cuda"}
    asked = [given | {"alone": alone} for alone in (False, True)]
    answers = io.StringIO()
    worker.serve(io.StringIO("\n".join(map(json.dumps, asked)) + "\n"), answers)
    together, alone = map(json.loads, answers.getvalue().splitlines())
    assert (list(together["us"]), together["left"]) == (["A", "B", "TOY"], [])
    assert (list(alone["us"]), alone["left"]) == (["TOY"], ["A", "B"])
    assert together["us"]["TOY"] == [0.3333] * 16
    assert (together["selected"], together["absent"], together["device"]) == ("A", {"C": "not there"}, H200)
    assert together["state"].keys() == STATE.keys()
