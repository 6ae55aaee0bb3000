"""Two checkouts in two processes: whose time is whose, and what a version that fails says. The checkouts are played."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conformance.gate.record import CellRecord, Record
from conformance.timing import two_processes
from conformance.timing.state import Watch
from conformance.timing.two_processes import MOST_KEPT, TwoProcessPairs, Version, WorkerFailed, record_apart

WORKER = """
import json, sys
for line in sys.stdin:
    asked = json.loads(line)
    if asked["verb"] == "dance":
        continue
    if asked["verb"] == "half":
        print('{"half": ', end="", flush=True)
        continue
    if asked["verb"] == "endless":
        while True:
            print("x" * 100_000, end="", flush=True)
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
        pytest.raises(WorkerFailed, match="A: its answer to 'make' is no object of JSON: \"a library's own words\""),
    ):
        sampler.pairs("loud", 2)


def test_no_answer_in_time_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a = Version("A", checkout(tmp_path / "a", 1.0))
    monkeypatch.setattr(two_processes, "SECONDS", 0.2)
    with pytest.raises(WorkerFailed, match=r"A: no answer to 'dance' within 0\.2 s: X"):
        a.ask("dance", cell="X")
    a.close()


def test_half_a_line_is_no_answer(tmp_path: Path) -> None:
    a = Version("A", checkout(tmp_path / "a", 1.0))
    with pytest.raises(WorkerFailed, match=r"A: no answer to 'half' within 0\.2 s"):
        a.ask("half", 0.2)
    assert a._process.wait(10) < 0
    a.close()


def test_a_line_without_an_end_is_not_read_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(two_processes, "MOST_BYTES", 1 << 20)
    a = Version("A", checkout(tmp_path / "a", 1.0))
    with pytest.raises(WorkerFailed, match="A: its process ended with status -9"):
        a.ask("endless", 60.0)
    a.close()


def test_what_is_no_checkout_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WorkerFailed, match=r"no conformance/timing/worker.py: expected a checkout of this project"):
        Version("A", tmp_path)


def test_another_protocol_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WorkerFailed, match="times by protocol 9, not 2"):
        Version("A", checkout(tmp_path, 1.0, protocol=9))


# -- what the processes are asked --

RECORDED = Record(
    {"driver": "1"}, {"X one": CellRecord("memory", 0.1, 0.001, 7, 16, 0)}, {"memory": 10.0, "compute": 20.0}, 1e6
)
ANSWER = {"record": json.loads(RECORDED.to_json()), "state": {"slower clocks": "none"}}


ASKED = "asked = json.loads(line)"
NOTED = """
    note(asked)
    if asked["verb"] == "record":
        if RECORD is not None:
            print(RECORD, flush=True)
        continue
"""
NOTE = """
import json
def note(what):
    with open(NOTES, "a") as sink:
        sink.write(json.dumps([NAME, what]) + "\\n")
"""


def noting(folder: Path, notes: Path, record: object = ANSWER) -> Path:
    """A checkout whose worker writes down, with its name, what it is asked and that it ends; a record may be None."""
    path = checkout(folder, 1.0) / "conformance" / "timing" / "worker.py"
    text = path.read_text()
    assert ASKED in text
    answer = None if record is None else json.dumps(record)
    given = f"NOTES, NAME, RECORD = {str(notes)!r}, {folder.name!r}, {answer!r}\n"
    path.write_text(f'{given}{NOTE}{text.replace(ASKED, ASKED + NOTED)}\nnote("ended")\n')
    return folder


def noted(notes: Path) -> list[list[Any]]:
    """[name of the checkout, what it was asked] each, in the order of time."""
    return [json.loads(line) for line in notes.read_text().splitlines()]


def test_a_record_comes_from_a_process_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notes = tmp_path / "notes"
    monkeypatch.setattr(two_processes, "HERE", noting(tmp_path / "here", notes))
    monkeypatch.setattr(two_processes, "opened_here", lambda: 1)
    assert record_apart(("X one", "Y two"), {"X one": (40, 2)}) == (RECORDED, {"slower clocks": "none"})
    asked = {"verb": "record", "cells": ["X one", "Y two"], "planted": {"X one": [40, 2]}, "ours": 2}
    assert noted(notes) == [["here", {"verb": "hello"}], ["here", asked], ["here", "ended"]]


def test_nothing_is_planted_unless_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notes = tmp_path / "notes"
    monkeypatch.setattr(two_processes, "HERE", noting(tmp_path / "here", notes))
    monkeypatch.setattr(two_processes, "opened_here", lambda: 0)
    record_apart(["X one"])
    assert noted(notes)[1] == ["here", {"verb": "record", "cells": ["X one"], "planted": {}, "ours": 1}]


def test_a_record_that_fails_names_the_process_and_leaves_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notes = tmp_path / "notes"
    failed = {"error": "CaptureFailed: X one"}
    monkeypatch.setattr(two_processes, "HERE", noting(tmp_path / "here", notes, failed))
    with pytest.raises(WorkerFailed, match=r"^the process that times: CaptureFailed: X one$"):
        record_apart(["X one"])
    assert noted(notes)[-1] == ["here", "ended"]


def test_a_record_has_a_time_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(two_processes, "HERE", noting(tmp_path / "here", tmp_path / "notes", None))
    monkeypatch.setattr(two_processes, "SECONDS", 5.0)
    monkeypatch.setattr(two_processes, "RECORD_SECONDS", 0.2)
    with pytest.raises(WorkerFailed, match=r"^the process that times: no answer to 'record' within 0\.2 s"):
        record_apart(["X one"])


def test_without_a_second_version_the_first_ends(tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    with pytest.raises(WorkerFailed, match="expected a checkout of this project"):
        Version.pair(noting(tmp_path / "A", notes), tmp_path / "nothing")
    assert noted(notes) == [["A", {"verb": "hello"}], ["A", "ended"]]
    a, b = Version.pair(noting(tmp_path / "A2", notes), noting(tmp_path / "B2", notes))
    assert (a.name, b.name) == ("A", "B")
    for version in (a, b):
        version.close()


def test_the_cell_asked_for_least_lately_makes_room_in_b_first(tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    a, b = (Version(name, noting(tmp_path / name, notes)) for name in "AB")
    names = [f"cell {number}" for number in range(MOST_KEPT + 2)]
    cells = {name: (f"X {name}", f"Y {name}") for name in names}
    with TwoProcessPairs(cells, (a, b), Watch(polls=[])) as sampler:
        for name in [*names[:MOST_KEPT], names[0], *names[MOST_KEPT:], names[0]]:
            sampler.pairs(name, 2)
    made_or_dropped = [(who, asked["verb"], asked["cell"]) for who, asked in noted(notes) if "cell" in asked]
    made_or_dropped = [one for one in made_or_dropped if one[1] != "replay"]

    def made(name: str) -> list[tuple[str, str, str]]:
        return [("A", "make", f"X {name}"), ("B", "make", f"Y {name}")]

    def dropped(name: str) -> list[tuple[str, str, str]]:
        return [("B", "drop", f"Y {name}"), ("A", "drop", f"X {name}")]

    expected = [one for name in names[:MOST_KEPT] for one in made(name)]
    for leaves, comes in zip(names[1:3], names[MOST_KEPT:], strict=True):  # the first was asked for again
        expected += [*dropped(leaves), *made(comes)]
    assert made_or_dropped == expected
    assert [who for who, asked in noted(notes) if asked == "ended"] == ["B", "A"]


def test_b_works_on_what_a_gives_and_is_the_one_that_is_made_slower(tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    a, b = (Version(name, noting(tmp_path / name, notes)) for name in "AB")
    cells = {"cell": ("X one", "Y one"), "slower": ("X two", "Y two")}
    with TwoProcessPairs(cells, (a, b), Watch(polls=[]), {"slower": (40, 2)}) as sampler:
        for name in cells:
            sampler.pairs(name, 2)
    made = [(who, asked) for who, asked in noted(notes) if "count" in asked]
    assert made == [
        ("A", {"verb": "make", "cell": "X one", "count": None, "more": 0, "given": None}),
        ("B", {"verb": "make", "cell": "Y one", "count": 20, "more": 0, "given": "memory of X one"}),
        ("A", {"verb": "make", "cell": "X two", "count": 40, "more": 0, "given": None}),
        ("B", {"verb": "make", "cell": "Y two", "count": 40, "more": 2, "given": "memory of X two"}),
    ]


def test_pairs_take_turns_at_the_same_places(tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    a, b = (Version(name, noting(tmp_path / name, notes)) for name in "AB")
    with TwoProcessPairs({"cell": ("X one", "Y one")}, (a, b), Watch(polls=[])) as sampler:
        sampler.pairs("cell", 4)
    replayed = [(who, asked["turn"]) for who, asked in noted(notes) if "turn" in asked]
    warm = [(who, turn) for turn in range(two_processes.WARM) for who in "AB"]
    assert replayed == [*warm, *(("A", 0), ("B", 0), ("B", 1), ("A", 1), ("A", 2), ("B", 2), ("B", 3), ("A", 3))]
