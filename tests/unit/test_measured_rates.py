"""What a device reaches: measured once, kept, and measured anew where the kept file is of something else or not whole.

The measurement is played here; that the real one is near the data sheet shows on a GPU.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import platformdirs
import pytest

from conformance.rates import Rates
from conformance.timing import measured_rates as module
from conformance.timing.graphs import Replay
from conformance.timing.measured_rates import CALLS, COPY_BYTES, GEMM, REPLAYS, MeasuredRates, kept_in, measured_rates

H200 = {"device": "NVIDIA H200 MIG 1g.18gb", "driver": "580.95", "torch": "2.13.0", "cuda": "13.0"}
FIRST, SECOND = (4.21e12, 1.45e15, 7.4e14), (4.19e12, 1.44e15, 7.3e14)


class Device:
    """The one that is measured here; each time it reaches something else."""

    def __init__(self) -> None:
        self.setting = dict(H200)
        self.reached = [FIRST, SECOND]
        self.measured = 0

    def measure(self) -> tuple[float, float, float]:
        self.measured += 1
        return self.reached[self.measured - 1]


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Device]:
    found = Device()
    monkeypatch.setattr(module, "_measure", found.measure)
    monkeypatch.setattr(module, "setting", lambda: dict(found.setting))
    monkeypatch.setattr(platformdirs, "user_cache_path", lambda name: tmp_path / "cache" / name)
    measured_rates.cache_clear()
    yield found
    measured_rates.cache_clear()


def again() -> MeasuredRates:
    """As a later process asks."""
    measured_rates.cache_clear()
    return measured_rates()


def reached(rates: MeasuredRates) -> tuple[float, float, float]:
    return rates.copy, rates.fp8, rates.sixteen_bit


def test_it_is_measured_once_and_kept_for_every_later_run(device: Device, tmp_path: Path) -> None:
    before = datetime.now(timezone.utc).replace(microsecond=0)
    first = measured_rates()
    assert (first.setting, reached(first)) == (H200, FIRST)
    assert before <= datetime.fromisoformat(first.date) <= datetime.now(timezone.utc)
    assert measured_rates() is first
    assert again() == first
    assert device.measured == 1
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [kept_in()]
    assert kept_in() == tmp_path / "cache" / "fp8moe" / "rates-NVIDIA-H200-MIG-1g-18gb.json"


@pytest.mark.parametrize("changed", ["driver", "torch", "cuda"])
def test_with_another_driver_or_version_it_is_measured_anew(device: Device, changed: str) -> None:
    measured_rates()
    device.setting[changed] = "another"
    found = again()
    assert (found.setting, reached(found)) == (H200 | {changed: "another"}, SECOND)
    assert again() == found
    assert device.measured == 2


def test_each_device_has_a_file_of_its_own(device: Device) -> None:
    measured_rates()
    device.setting["device"] = "NVIDIA H100"
    assert reached(again()) == SECOND
    device.setting["device"] = H200["device"]
    assert reached(again()) == FIRST
    assert device.measured == 2


def edited(**changes: Any) -> Callable[[Path], None]:
    """Changes fields of the file; a field that becomes `...` is left out."""

    def edit(path: Path) -> None:
        content = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({name: value for name, value in content.items() if value is not ...}))

    return edit


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda path: path.unlink(), id="removed"),
        pytest.param(lambda path: path.write_text(""), id="empty"),
        pytest.param(lambda path: path.write_text(path.read_text()[:-20]), id="truncated"),
        pytest.param(lambda path: path.write_bytes(b"\xff\xfe"), id="no text"),
        pytest.param(lambda path: path.write_text("[1, 2]"), id="a list"),
        pytest.param(lambda path: path.write_text("null"), id="nothing"),
        pytest.param(edited(format=0), id="an older format"),
        pytest.param(edited(copy=float("inf")), id="an infinite rate"),
        pytest.param(edited(date=7), id="no date"),
        pytest.param(edited(fp8=...), id="a figure is missing"),
        pytest.param(edited(fp4=1.0), id="a figure more"),
        pytest.param(edited(setting=...), id="no setting"),
        pytest.param(edited(setting="an H200"), id="setting in one word"),
        *(pytest.param(edited(**{name: 0.0}), id=f"{name} zero") for name in ("copy", "fp8", "sixteen_bit")),
        pytest.param(edited(copy=-4.2e12), id="negative"),
        pytest.param(edited(copy=float("nan")), id="not a number"),
        pytest.param(edited(copy="fast"), id="a word"),
        pytest.param(edited(copy=None), id="none"),
    ],
)
def test_a_file_that_is_not_whole_or_not_ours_is_measured_anew(device: Device, spoil: Callable[[Path], None]) -> None:
    measured_rates()
    spoil(kept_in())
    found = again()
    assert reached(found) == SECOND
    assert again() == found
    assert device.measured == 2


def test_a_file_that_is_whole_is_what_is_told(device: Device) -> None:
    measured_rates()
    edited(date="2026-11-20T08:00:00+00:00", copy=4.256e12)(kept_in())
    assert reached(again()) == (4.256e12, *FIRST[1:])
    assert device.measured == 1


def test_it_is_told_in_words_and_with_a_floor() -> None:
    found = MeasuredRates(H200, "2026-11-29T01:02:03+00:00", 4.214e12, 1.4507e15, 7.4e14)
    assert found.told == (
        "measured on 2026-11-29: a copy of 1 GiB at 4.21 TB/s, "
        "GEMMs of 8192 x 8192 x 8192 at 1451 (FP8) and 740 (bf16) TFLOP/s"
    )
    assert found.rates == Rates(4.214e12, 1.4507e15, 7.4e14, found.told)


def test_what_is_measured_is_work_over_the_typical_time_of_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {"copy": 0.5e-3, "fp8": 0.75e-3, "bf16": 1.5e-3}

    def copy_call(size: int, device: str) -> str:
        assert (size, device) == (COPY_BYTES, "cuda")
        return "copy"

    def gemm_call(*given: object, fp8: bool) -> str:
        assert given == (GEMM, GEMM, GEMM, "cuda")
        return "fp8" if fp8 else "bf16"

    def unrolled(calls: list[str], count: int, *, capture: bool) -> tuple[str, int]:
        (call,) = calls
        assert capture == (call != "copy")
        return call, count

    def replays(sequence: list[tuple[str, int]]) -> list[Replay]:
        us = [seconds[call] * 1e6 * count for call, count in sequence]
        return [Replay(one * (100 if number == 0 else 1), 0.0, 0.0) for number, one in enumerate(us)]  # the first waits

    for played in (copy_call, gemm_call, replays):
        monkeypatch.setattr(module, played.__name__, played)
    monkeypatch.setattr(module, "Unrolled", unrolled)
    copy, fp8, sixteen_bit = module._measure()
    assert copy == pytest.approx(2 * COPY_BYTES / seconds["copy"])
    assert fp8 == pytest.approx(2 * GEMM**3 / seconds["fp8"])
    assert sixteen_bit == pytest.approx(2 * GEMM**3 / seconds["bf16"])
    assert CALLS > 1
    assert REPLAYS > 2
