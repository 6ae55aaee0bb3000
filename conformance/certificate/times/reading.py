"""Times from a certificate, or from the process that takes them: untrusted. Each field of its type and range, and no
other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from conformance.certificate.times.kept import (
    BEFORE,
    FAILED,
    FORMAT,
    NOT_TAKEN,
    ROUNDS,
    TAKEN,
    WITHOUT_STATE,
    TimedCase,
    Times,
)
from conformance.timing.polls import POWER_CAP, SLOWED
from conformance.timing.side_by_side import ROUNDS as EACH

LEAST_US, MOST_US = 1e-3, 1e9
MOST_CASES, MOST_BACKENDS, MOST_NAME = 500, 64, 500
MOST_COUNT, MOST_REASON = 1_000_000, 2_000
REASONS = {*SLOWED, POWER_CAP}
DEVICE = {"name", "kind", "architecture"}
RATES = {"bandwidth", "fp8", "sixteen_bit", "source"}


def status_from(told: Any) -> Times:
    """Whether there are any, by the evidence.

    Args:
        told: None in certificates of before.

    Raises:
        ValueError: it is none.
    """
    if told is None:
        return Times(NOT_TAKEN, BEFORE)
    _keys("times", told, {"status", "reason"})
    status, reason = told["status"], told["reason"]
    if status not in (TAKEN, NOT_TAKEN, FAILED) or not isinstance(reason, str) or bool(reason) == (status == TAKEN):
        raise ValueError(f"times={str(told)[:80]!r}: expected taken, or not taken or failed with a reason")
    return Times(status, reason)


def rounds_from(told: Mapping[str, Any]) -> Times:
    """
    Args:
        told: what `rounds.json` holds.

    Raises:
        ValueError: it is none; the text names the place.
    """
    if told.get("format") not in (FORMAT, WITHOUT_STATE):
        raise ValueError(f"{ROUNDS}: format={str(told.get('format'))[:80]!r}: expected {FORMAT} or {WITHOUT_STATE}")
    _keys(ROUNDS, told, {"format", "device", "rates", "cases"})
    device = device_from(f"{ROUNDS}: device", told["device"])
    _keys(f"{ROUNDS}: rates", told["rates"], RATES)
    cases = told["cases"]
    if not isinstance(cases, list) or len(cases) > MOST_CASES:
        raise ValueError(f"{ROUNDS}: cases: expected a list of at most {MOST_CASES}")
    watched = told["format"] == FORMAT
    found = [case_from(f"{ROUNDS}: cases[{number}]", case, watched) for number, case in enumerate(cases)]
    return Times(TAKEN, "", device, told["rates"], found)


def device_from(where: str, told: Any) -> Mapping[str, str]:
    """Name, kind and architecture; raises as `rounds_from`."""
    _keys(where, told, DEVICE)
    for name, value in told.items():
        _text(f"{where}.{name}", value)
    found: Mapping[str, str] = told
    return found


def case_from(where: str, told: Any, watched: bool = True) -> TimedCase:
    """One case; raises as `rounds_from`.

    Args:
        watched: it has the device's state.
    """
    _keys(where, told, {"case", "selected", "us", "absent"} | ({"state"} if watched else set()))
    if watched:
        _state(f"{where}: state", told["state"])
    _text(f"{where}: case", told["case"])
    if told["selected"] != "":
        _text(f"{where}: selected", told["selected"])
    for name in ("us", "absent"):
        if not isinstance(told[name], dict) or len(told[name]) > MOST_BACKENDS:
            raise ValueError(f"{where}: {name}: expected an object of at most {MOST_BACKENDS} backends")
        for backend in told[name]:
            _text(f"{where}: {name}", backend)
    for backend, us in told["us"].items():
        if not isinstance(us, list) or len(us) != EACH or not all(map(_is_time, us)):
            raise ValueError(f"{where}: us[{backend[:80]!r}]: expected {EACH} times of {LEAST_US:g} to {MOST_US:g} us")
    for backend, why in told["absent"].items():
        if not isinstance(why, str) or not why:
            raise ValueError(f"{where}: absent[{backend[:80]!r}]: expected a reason")
    return TimedCase(**told)


def _state(where: str, told: Any) -> None:
    _keys(where, told, {"sm_mhz", "slower", "processes", "unwatched"})
    clocks, slower = told["sm_mhz"], told["slower"]
    if not isinstance(clocks, list) or len(clocks) != 2 or not all(map(_is_count, clocks)):
        raise ValueError(f"{where}: sm_mhz={str(clocks)[:80]}: expected the least and the largest, integers")
    if not isinstance(slower, list) or sorted(REASONS & set(map(str, slower))) != sorted(map(str, slower)):
        raise ValueError(f"{where}: slower={str(slower)[:80]}: expected some of {', '.join(sorted(REASONS))}")
    if not _is_count(told["processes"]):
        raise ValueError(f"{where}: processes={str(told['processes'])[:80]}: expected an integer of at least 0")
    if not isinstance(told["unwatched"], str) or len(told["unwatched"]) > MOST_REASON:
        raise ValueError(f"{where}: unwatched: expected a text of at most {MOST_REASON} characters")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MOST_COUNT


def _is_time(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and LEAST_US <= value <= MOST_US


def _text(where: str, value: Any) -> None:
    if not isinstance(value, str) or not 0 < len(value) <= MOST_NAME:
        raise ValueError(f"{where}={str(value)[:80]!r}: expected a text of at most {MOST_NAME} characters")


def _keys(where: str, told: Any, expected: set[str]) -> None:
    if not isinstance(told, dict) or told.keys() != expected:
        raise ValueError(f"{where}: expected an object of {', '.join(sorted(expected))}, and nothing else")
