"""How much longer: in words that claim no more than is known, on a terminal and where there is none."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Callable
from contextlib import suppress

import pytest

from conformance.at_work import AtWork
from conformance.remaining import Remaining
from fp8moe.commands.progress import duration, is_watched, progress, time_left


class Clock:
    """A clock that is set."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_what_is_left_takes_as_long_for_its_cost() -> None:
    clock = Clock()
    remaining = Remaining([("a", 1), ("a", 3), ("b", 6)], clock)
    assert remaining.seconds is None
    clock.now += 2.0
    remaining.ran("a", 1)
    assert remaining.seconds == 18.0
    clock.now += 3.0
    remaining.ran("a", 3)
    assert remaining.seconds == 7.5  # 5 s for 4, and 6 are left
    remaining.drop("b")
    assert remaining.seconds == 0.0


def test_what_runs_on_after_its_group_was_dropped() -> None:
    clock = Clock()
    remaining = Remaining([("a", 2), ("a", 2), ("b", 4)], clock)
    clock.now += 1.0
    remaining.ran("a", 2)
    remaining.drop("a")
    remaining.ran("a", 2)  # another process had begun it
    assert 0.0 < (remaining.seconds or 0.0) <= 1.0


def test_it_is_said() -> None:
    assert (time_left(None), time_left(61.4)) == ("", "about 0:01:01 left")
    assert duration(3600.0) == "1:00:00"


def test_lines_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("TOY [x]", every=0.0) as tell:
        tell(1, 3000, "a", None)
        tell(2000, 3000, "b", 75.0)
    with progress("TOY", every=60.0) as tell:
        tell(1, 2, "a", 1.0)
    err = capsys.readouterr().err.splitlines()
    assert err == ["TOY [x]: 1 of 3,000 in 0:00:00", "TOY [x]: 2,000 of 3,000 in 0:00:00, about 0:01:15 left"]


def test_what_takes_longest_is_known() -> None:
    clock = Clock()
    at_work = AtWork(clock)
    assert at_work.longest is None
    with at_work.on("a"):
        clock.now += 2.0
        with at_work.on("b"):
            clock.now += 3.0
            assert at_work.longest == ("a", 5.0)
    with suppress(ZeroDivisionError), at_work.on("c"):
        raise ZeroDivisionError
    assert at_work.longest is None


def waited(what: str, shown: Callable[[], str], text: str) -> None:
    """Until a progress of it, in which nothing comes to its end but one result, has told a text."""
    at_work = AtWork()
    with progress(what, at_work, every=0.0, long=0.0, looks=0.01) as tell, at_work.on("equivalence v1:M=[9]"):
        tell(3, 88, "computes.equivalence", 75.0)
        until = time.monotonic() + 20.0
        while text not in shown():
            assert time.monotonic() < until, shown()
            time.sleep(0.01)


def test_what_is_waited_for_is_named_in_lines(capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[str] = []

    def shown() -> str:
        seen.append(capsys.readouterr().err)
        return "".join(seen)

    waited("TOY", shown, "TOY: 3 of 88 in 0:00:00, 0:00:00 on equivalence v1:M=[9]\n" * 2)  # more than by the result


def test_what_is_waited_for_is_named_beside_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = terminal(monkeypatch)
    waited(LONG, screen.getvalue, "\N{HORIZONTAL ELLIPSIS}")
    shown = screen.getvalue()
    assert f"{LONG}: 3 of 88 in 0:00:00, 0:00:00 on equivalence v1:M=[9]\n" in shown
    assert "0:00:00 on equivalence" in shown.split("\r")[-1]
    assert "left" not in shown.split("\r")[-1]


def test_nothing_is_named_that_has_not_taken_long(capsys: pytest.CaptureFixture[str]) -> None:
    at_work = AtWork()
    with progress("TOY", at_work, every=0.0, looks=0.01) as tell, at_work.on("equivalence v1:M=9"):
        tell(3, 88, "computes.equivalence", 75.0)
        time.sleep(0.05)
    assert capsys.readouterr().err == "TOY: 3 of 88 in 0:00:00, about 0:01:15 left\n"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Standard error on a terminal of 80 columns, as some CI systems give to their jobs, too."""
    made = Terminal()
    monkeypatch.setattr(sys, "stderr", made)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("CI", raising=False)
    return made


LONG = "acme_moe.experts.blackwell:AcmeMoeBlockScaledExperts, certify, shard 3/8"


@pytest.mark.parametrize(("name", "value"), [("CI", "true"), ("TERM", "dumb")])
def test_whole_lines_in_a_log(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    log = terminal(monkeypatch)
    monkeypatch.setenv(name, value)
    assert not is_watched()
    with progress(LONG, every=0.0) as tell:
        tell(2000, 3000, "computes.relation.scale_code_exchange", 75.0)
    assert log.getvalue() == f"{LONG}: 2,000 of 3,000 in 0:00:00, about 0:01:15 left\n"


def test_a_bar_leaves_the_figures_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = terminal(monkeypatch)
    assert is_watched()
    with progress(LONG) as tell:
        tell(2000, 3000, "computes.relation.scale_code_exchange", 75.0)
    shown = screen.getvalue().split("\r")[-1]
    assert "2000/3000" in shown
    assert "about 0:01:15 left" in shown
    assert "\N{HORIZONTAL ELLIPSIS}" in shown
