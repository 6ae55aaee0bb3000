"""What samplers may hand over: whole couples of positive times, flags that drop both orders alike."""

from __future__ import annotations

import numpy as np
import pytest

from conformance.gate.samples import Flag, Rounds, Samples, flags_in, valid_couples

TIMES, CLEAN = np.array([1.0, 2.0]), np.zeros(2, np.uint8)


def test_spent_time_has_everything() -> None:
    flags = np.array([Flag.THROTTLED, 0], np.uint8)
    assert Samples(TIMES, TIMES * 2, flags, 10.0).spent_us == 3 + 6 + 10
    assert Rounds(TIMES, {"a": TIMES, "b": TIMES * 3}, flags, 1.0).spent_us == 3 + 3 + 9 + 1


def test_a_flag_drops_the_whole_couple() -> None:
    flags = np.array([0, 0, Flag.SHARED, 0, 0, Flag.THROTTLED | Flag.SHARED, 0, 0], np.uint8)
    assert valid_couples(flags).tolist() == [True, True, False, False, False, False, True, True]
    assert flags_in(flags) == {Flag.SHARED: 2, Flag.THROTTLED: 1}


@pytest.mark.parametrize(
    ("a", "b", "flags", "told"),
    [
        (TIMES, np.array([1.0, 0.0]), CLEAN, r"b_us\[1\]: a positive time in microseconds, not 0.0"),
        (np.array([np.nan, 1.0]), TIMES, CLEAN, r"a_us\[0\]: a positive time in microseconds, not nan"),
        (TIMES, np.array([1.0, np.inf]), CLEAN, r"b_us\[1\]: a positive time in microseconds, not inf"),
        (TIMES, TIMES[:1], CLEAN, "arrays of one even length, not .*b_us"),
        (TIMES[:1], TIMES[:1], CLEAN[:1], "arrays of one even length"),
        (TIMES, TIMES, np.zeros(4, np.uint8), "arrays of one even length, not .*flags"),
    ],
)
def test_samples_say_which_time_is_none(a: np.ndarray, b: np.ndarray, flags: np.ndarray, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Samples(a, b, flags)


def test_rounds_say_which_yardstick_is_wrong() -> None:
    with pytest.raises(ValueError, match=r"yardsticks_us\['copy'\]\[0\]: a positive time in microseconds, not -1.0"):
        Rounds(TIMES, {"copy": np.array([-1.0, 1.0])}, CLEAN)
    with pytest.raises(ValueError, match="yardsticks_us: at least one yardstick, not none"):
        Rounds(TIMES, {}, CLEAN)


def test_overhead_is_a_time() -> None:
    with pytest.raises(ValueError, match="overhead_us: microseconds, 0 or more, not -1"):
        Samples(TIMES, TIMES, CLEAN, -1.0)
