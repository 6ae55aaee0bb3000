"""Timing for the gate without a device: what is launched in which order, and whose time is whose.

The device's clock is played here; that the real one is used rightly shows on a GPU.
"""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from conformance.cases import Case
from conformance.gate.samples import Flag
from conformance.performs import Floor
from conformance.timing import graphs, polls, worker
from conformance.timing.cells import LAUNCHED_US, MOST_CALLS, MOST_PLACES, TimedCell, calls_for, kind_of, places_for
from conformance.timing.graphs import CaptureFailed, Unrolled, replays
from conformance.timing.memory import Memory
from conformance.timing.polls import Poll
from conformance.timing.samplers import DevicePairs, DeviceRounds
from conformance.timing.shared import Given
from conformance.timing.state import Watch
from conformance.timing.yardsticks import COMPUTE, LAUNCH, MEMORY


class Clock:
    """The device's, in milliseconds; whatever is launched moves it."""

    now = 0.0
    launched: list[str] = []  # noqa: RUF012 (one device)


class Event:
    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = Clock.now

    def elapsed_time(self, end: Event) -> float:
        return end.at - self.at


@pytest.fixture(autouse=True)
def played_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    Clock.now, Clock.launched = 0.0, []


def takes(name: str, us: float) -> Callable[[], None]:
    def call() -> None:
        Clock.now += us / 1e3
        Clock.launched.append(name)

    return call


def graph(name: str, us: float, count: int = 10) -> Unrolled:
    found = Unrolled([takes(name, us)], count, capture=False)
    Clock.launched.clear()
    return found


def test_a_graph_goes_through_its_calls_in_turn() -> None:
    made = Unrolled([takes("x", 1), takes("y", 1)], 5, capture=False)
    Clock.launched.clear()
    made.launch()
    assert Clock.launched == ["x", "y", "x", "y", "x"]
    assert made.method == "5 eager calls"


def test_what_capture_raises_names_its_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    class Capturing:
        def __init__(self, graph: object, pool: object = None) -> None: ...

        def __enter__(self) -> None: ...

        def __exit__(self, *error: object) -> None: ...

    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", Capturing)

    def raises() -> None:
        raise RuntimeError("no kernel image\nand more")

    with pytest.raises(CaptureFailed, match=r"RuntimeError: no kernel image$"):
        graphs.captured(raises)


def test_replays_have_their_own_times_and_the_first_is_launched_once_more() -> None:
    a, b = graph("a", 3), graph("b", 5)
    found = replays([a, b, a])
    assert [round(one.us, 6) for one in found] == [30, 50, 30]
    assert Clock.launched == ["a"] * 20 + ["b"] * 10 + ["a"] * 10
    assert found[0].begin < found[0].end <= found[1].begin + 1e-9
    assert found[2].end <= time.monotonic()


@pytest.mark.parametrize("count", [2, 6])
def test_pairs_swap_their_order_and_keep_their_sides(count: int) -> None:
    a, b = graph("a", 3), graph("b", 5)
    sampler = DevicePairs({"cell": lambda: (a, b)}, Watch(poll=quiet))
    with sampler.watch:
        found = sampler.pairs("cell", count)
    np.testing.assert_allclose(found.a_us, 30)
    np.testing.assert_allclose(found.b_us, 50)
    assert not found.flags.any()
    taken = "".join(Clock.launched[::10])
    assert taken.endswith("abba")
    assert found.spent_us == pytest.approx(10 * sum({"a": 3, "b": 5}[one] for one in taken))


def test_graphs_of_unlike_numbers_of_calls_are_not_compared() -> None:
    sampler = DevicePairs({"cell": lambda: (graph("a", 3, 10), graph("b", 3, 11))}, Watch(poll=quiet))
    with pytest.raises(ValueError, match="cell: graphs of 10 and 11 calls"):
        sampler.pairs("cell", 2)


def test_few_graphs_are_kept_and_the_last_asked_for_stay() -> None:
    made: list[str] = []

    def make(name: str) -> Callable[[], tuple[Unrolled, Unrolled]]:
        def made_now() -> tuple[Unrolled, Unrolled]:
            made.append(name)
            return graph(name, 1), graph(name, 1)

        return made_now

    with Watch(poll=quiet) as watch:
        sampler = DevicePairs({name: make(name) for name in "vwxyz"}, watch)
        for name in "vwxyvzvw":
            sampler.pairs(name, 2)
    assert "".join(made) == "vwxyzw"


def test_rounds_go_forwards_and_backwards() -> None:
    from conformance.timing.cells import Prepared

    sticks = {MEMORY: graph("m", 7), COMPUTE: graph("c", 11)}
    cells = {"cell": lambda: Prepared(graph("x", 2), MEMORY, Memory(0, 0), Given([], torch.empty(0)))}
    with Watch(poll=quiet) as watch:
        sampler = DeviceRounds(cells, sticks, {"device": "played"}, watch)
        assert sampler.yardstick("cell") == MEMORY
        found = sampler.rounds("cell", 4)
    np.testing.assert_allclose(found.cell_us, 20)
    np.testing.assert_allclose(found.yardsticks_us[MEMORY], 70)
    np.testing.assert_allclose(found.yardsticks_us[COMPUTE], 110)
    assert "".join(Clock.launched[::10]).endswith("xmccmxxmccmx")


# -- the device's own word --


def quiet() -> Poll:
    return Poll(time.monotonic(), 1980, 1980, frozenset(), 1)


def watched(**fields: Any) -> int:
    polls = iter([quiet()])
    watch = Watch(poll=lambda: next(polls, Poll(**(vars(quiet()) | {"at": time.monotonic()} | fields))))
    with watch:
        while len(watch.polls) < 3:
            time.sleep(0.001)
        return watch.flags(watch.polls[1].at, watch.polls[-1].at)


def test_what_a_poll_says_is_a_flag() -> None:
    assert watched() == 0
    assert watched(reasons=frozenset({polls.THERMAL})) == Flag.THROTTLED
    assert watched(reasons=frozenset({polls.POWER_CAP})) == 0
    assert watched(limit_mhz=1500) == Flag.CLOCKS_CHANGED
    assert watched(processes=2, reasons=frozenset({polls.SLOWDOWN})) == Flag.SHARED | Flag.THROTTLED


def test_without_nvml_nothing_is_watched_and_that_is_told() -> None:
    with Watch() as watch:
        assert watch.flags(0.0, time.monotonic()) == 0
    assert watch.told()["device state"].startswith(
        "not watched: there is NVML for" if torch.version.cuda is None else "not"
    )


def test_what_was_seen_is_told() -> None:
    watch = Watch(polls=[quiet(), Poll(1.0, 1700, 1980, frozenset({polls.POWER_CAP}), 0)])
    assert watch.told() == {
        "SM clock, MHz": "1700 to 1980, median 1980",
        "slower clocks": "power cap",
        "processes on the device": "1",
    }


# -- cells --


def test_a_cell_has_a_name_that_reads_back() -> None:
    cell = TimedCell("acme.moe:Acme", str(Case(tokens=3)))
    assert TimedCell.parse(cell.name) == cell
    with pytest.raises(ValueError, match="expected BACKEND CASE"):
        TimedCell.parse("TRITON")


def test_calls_follow_from_the_floor_alone() -> None:
    assert calls_for(1e5) == 1
    assert calls_for(100.0) == 10
    assert calls_for(0.0) == calls_for(LAUNCHED_US) == MOST_CALLS


def test_the_kind_of_work_follows_from_the_floor() -> None:
    assert kind_of(Floor(5.0, "flops")) == LAUNCH
    assert kind_of(Floor(50.0, "flops")) == COMPUTE
    assert kind_of(Floor(50.0, "bytes")) == MEMORY


def test_a_worker_answers_in_lines_and_survives_a_wrong_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "a played device")
    asked = [{"verb": "hello"}, {"verb": "replay", "cell": "none", "times": 1}, {"verb": "dance"}]
    answers = io.StringIO()
    worker.serve(io.StringIO("\n".join(map(json.dumps, asked)) + "\n"), answers)
    hello, replay, dance = map(json.loads, answers.getvalue().splitlines())
    assert (hello["protocol"], hello["device"]) == (worker.PROTOCOL, "a played device")
    assert replay == {"error": "KeyError: 'none'"}
    assert dance == {"error": "KeyError: 'dance'"}


# -- places --


class Played:
    """A graph, and the number of its pool."""

    pools = 0

    def __init__(self, call: Callable[[], None], beside: Played | None) -> None:
        Clock.launched.clear()
        call()
        self.calls = "".join(Clock.launched)
        if beside is None:
            Played.pools += 1
        self.pool = Played.pools if beside is None else beside.pool

    def replay(self) -> None:
        Clock.launched.append(self.calls)


def test_calls_are_spread_over_places_and_launches_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "captured", Played)
    calls = [takes(name, 1) for name in "xyz"]
    one = Unrolled(calls, 5, places=11, more=1)
    assert [[played.calls for played in row] for row in one.graphs] == [["x", "y", "z", "x", "yz"]] * 2
    assert len({played.pool for row in one.graphs for played in row}) == 10
    two = Unrolled(calls, 5, places=3, beside=one)
    assert [[played.pool for played in row] for row in two.graphs] == [
        [played.pool for played in row] for row in one.graphs
    ]
    assert [[played.calls for played in row] for row in two.graphs] == [["x", "y", "z", "x", "y"]] * 2


def test_each_graph_of_a_sequence_goes_through_its_places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "captured", Played)
    made = {name: Unrolled([takes(name, 1)], 1, places=2) for name in "ab"}
    for name, graph_ in made.items():
        for number, (played,) in enumerate(graph_.graphs):
            played.calls = f"{name}{number}"  # type: ignore[misc]
    Clock.launched.clear()
    replays([made[name] for name in "abbaab"], turn=3)
    assert Clock.launched == ["a1", "a1", "b1", "b0", "a0", "a1", "b1"]


def test_places_follow_from_the_case_alone() -> None:
    small, large = Case(tokens=4), Case(tokens=4096, top_k=2, hidden=4096, inter=896)
    assert places_for(small) == MOST_PLACES
    assert places_for(large) == (1 << 30) // (4096 * 2 * (3 * 896 + 4096) * 4) == 4
    assert places_for(replace(large, tokens=1 << 20)) == 1


def test_a_pair_of_other_graphs_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "captured", Played)
    made = [Unrolled([takes("x", 1)], 5, places=places) for places in (5, 15, 1)]
    assert [one.method for one in made] == [f"5 calls in {told} graphs" for told in ("1 x 5", "3 x 5", "1 x 1")]
