"""Regret without a device: who could have been selected, who was faster, and by how much; times are made up here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pytest

from conformance.cases import Case
from conformance.performs import Work
from conformance.plan import Target
from conformance.results import Evidence, Status
from conformance.timing import regrets
from conformance.timing.regrets import CHECK, regret_lines, regret_result
from conformance.timing.side_by_side import Contenders, SideBySide, contenders, regret
from fp8moe.platforms import PLATFORMS

CASE = Case(model="qwen3-30b-a3b:tp1", tokens=64, law="router")
BARE = Target("cuda", PLATFORMS["h100"].with_libraries(), "cpu")
FULL = Target("cuda", PLATFORMS["h100"], "cpu")


def steady(us: float, count: int = 16) -> np.ndarray:
    return us * (1 + 1e-3 * np.cos(np.arange(count)))


TIMES = SideBySide({"A": steady(100.0), "B": steady(80.0), "C": steady(81.0)}, {"D": "not installed"}, Work(0, 0), {})


def test_without_libraries_ours_alone_can_run_and_the_others_are_named() -> None:
    who = contenders(CASE, BARE)
    assert (who.selected, who.eligible) == ("TRITON", ("TRITON",))
    assert {"DEEPGEMM", "FLASHINFER_CUTLASS", "MARLIN"} <= set(who.absent)


def test_with_all_of_them_nobody_is_absent() -> None:
    who = contenders(CASE, FULL)
    assert who.absent == {}
    assert {"TRITON", "DEEPGEMM"} <= set(who.eligible)


def test_the_regret_of_a_slower_one_has_its_interval() -> None:
    found = regret(TIMES, "A")
    assert found.best == "B"
    assert found.low < found.value < found.high
    assert abs(found.value - 0.25) < found.high - found.low


def test_the_fastest_has_none() -> None:
    assert regret(TIMES, "B").value == 0.0


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> None:
    def played(case: Case, names: Sequence[str], absent: Mapping[str, str]) -> SideBySide:
        assert list(names) == ["A", "B", "C"]
        return TIMES

    monkeypatch.setattr(regrets, "contenders", lambda case, target: Contenders("A", ("A", "B", "C"), {}))
    monkeypatch.setattr(regrets, "side_by_side", played)


@pytest.mark.usefixtures("played")
def test_a_result_tells_all_times() -> None:
    result = regret_result(CASE, "A", BARE)
    assert (result.check, result.status, result.evidence) == (CHECK, Status.PASSED, Evidence.HARDWARE)
    assert result.reason == "beside A, B, C; best: B; absent: D, not installed"
    assert result.measured["B_us"] < result.measured["C_us"] < result.measured["A_us"]
    (line,) = regret_lines([result])
    assert line.startswith("regret of the selected backend over 1 case: median 2")
    assert line.endswith(f"in A {CASE}")


def test_where_one_alone_can_run_there_is_no_regret_and_that_is_told_once() -> None:
    result = regret_result(CASE, "TRITON", BARE)
    assert result.status is Status.NOT_APPLICABLE
    (line,) = regret_lines([result, result])
    assert line.startswith("no regret of TRITON: it alone can run here; absent: FLASHINFER_CUTLASS, its library is not")
    assert line.endswith("(2 cases)")
