"""Which looks at a device count for a sample, and whether a run was watched."""

from __future__ import annotations

import time

import pytest

from conformance.gate.samples import Flag
from conformance.timing import polls
from conformance.timing.polls import Poll
from conformance.timing.state import EVERY_S, Watch, unwatched


def look(at: float, *reasons: str) -> Poll:
    return Poll(at, 1980, 1980, frozenset(reasons), 1)


def test_the_last_look_before_a_sample_counts_however_long_ago() -> None:
    watch = Watch(polls=[look(0.0), look(1.0, polls.THERMAL), look(2.0)])
    assert watch.flags(1.5, 1.6) == Flag.THROTTLED
    assert watch.flags(0.5, 0.6) == 0
    assert watch.flags(2.5, 2.6) == 0


def test_looks_right_before_and_after_a_sample_count() -> None:
    watch = Watch(polls=[look(0.0), look(1.0, polls.BRAKE), look(1.0 + EVERY_S / 4), look(2.0)])
    near, far = EVERY_S / 2, EVERY_S * 2
    assert watch.flags(1.0 + near, 1.1) == Flag.THROTTLED  # the last but one before it, less than a poll ago
    assert watch.flags(1.0 + far, 1.1) == 0
    assert watch.flags(0.9, 1.0 - near) == Flag.THROTTLED
    assert watch.flags(0.9, 1.0 - far) == 0
    assert watch.flags(0.9, 1.1) == Flag.THROTTLED


def test_a_look_that_takes_longer_than_a_sample_still_counts() -> None:
    def slow() -> Poll:
        found = look(time.monotonic(), polls.THERMAL)
        time.sleep(5 * EVERY_S)
        return found

    with Watch(poll=slow) as watch:  # the first look ends before anything is timed
        begin = time.monotonic()
        assert begin - watch.polls[0].at > EVERY_S
        assert watch.flags(begin, begin + 1e-4) == Flag.THROTTLED


def test_times_of_a_device_that_was_watched_are_ground_for_a_verdict() -> None:
    assert unwatched(Watch(polls=[look(0.0, polls.THERMAL)]).told()) == ""
    assert unwatched({}) == ""


def test_times_of_a_device_that_was_not_watched_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("conformance.timing.state.poll_of_device", lambda: (None, "pynvml is not there"))
    with Watch() as watch:
        assert watch.flags(0.0, time.monotonic()) == 0
    assert unwatched(watch.told()) == "not watched: pynvml is not there"


def test_times_of_a_device_that_was_not_watched_to_the_end_are_none() -> None:
    looks = iter([look(time.monotonic())])

    def once() -> Poll:
        for found in looks:
            return found
        raise RuntimeError("GPU is lost")

    with Watch(poll=once) as watch:
        ends = time.monotonic() + 1
        while not watch.why_not and time.monotonic() < ends:
            time.sleep(0.001)
    assert unwatched(watch.told()) == "not watched to the end: the watch ended: RuntimeError: GPU is lost"
    assert watch.told()["SM clock, MHz"] == "1980 to 1980, median 1980"


@pytest.mark.parametrize(
    ("limits", "changed"), [((0, 1980, 1980), False), ((1980, 0, 1980), False), ((0, 1980, 1500), True)]
)
def test_a_limit_that_a_look_did_not_tell_has_not_changed(limits: tuple[int, ...], changed: bool) -> None:
    looks = [Poll(float(at), 1980, limit, frozenset(), 1) for at, limit in enumerate(limits)]
    assert Watch(polls=looks).flags(0.0, 2.0) == (Flag.CLOCKS_CHANGED if changed else 0)
