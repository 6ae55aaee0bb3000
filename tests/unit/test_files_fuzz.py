"""Whatever a report, a baseline of the gate, a measured table or a decision table holds: it is read, or refused by the
one error of its own; nothing hangs, and memory is bounded."""

from __future__ import annotations

import gzip
import json
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conformance import kept_text
from conformance.decisions import kept
from conformance.decisions.decided import DecisionsError
from conformance.gate import baseline as gate_baseline
from conformance.gate.baseline import BadBaseline, Baseline
from conformance.gate.record import Record
from conformance.recorded import recorded
from conformance.report import Report
from conformance.report_junit import of_report
from conformance.untrusted import MOST_UNPACKED, Malformed
from fp8moe.measured import file as measured_file
from fp8moe.measured.rows import InvalidMeasuredTable
from fp8moe.measured.table import MeasuredTable
from tests.unit.certificates import invented
from tests.unit.hostile import TEXTS, as_json, bytes_changed, is_told, values_changed
from tests.unit.measured_tables import LAYER, rows_of, table_of
from tests.unit.test_gate_baseline import BASELINE

SECONDS = 20.0
"""Of one file: that nothing hangs; a file that is refused takes far less."""
SETTINGS = settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def small_report() -> dict[str, Any]:
    told: dict[str, Any] = json.loads(invented(failing=1).to_json())
    told["checks"], told["excluded"] = told["checks"][:4], told["excluded"][:2]
    told["checks"][2] |= {"statistics": {"E1": 0.5}, "measured": {"ratio": "inf"}, "scope": "all"}
    return told


def suite_report() -> dict[str, Any]:
    told = small_report()
    return {"format": 1, "target": "cpu", "device": {"name": "a CPU"}, "cells": [], "results": told["checks"]}


def decisions() -> dict[str, Any]:
    """The kept table's first rules and entries."""
    told: dict[str, Any] = json.loads(kept.FILE.read_text(encoding="utf-8"))
    return {**told, "rules": told["rules"][:3], "log": told["log"][:2]}


def read_report(path: Path) -> None:
    report = Report.from_json(kept_text.read_text(path))
    assert Report.from_json(report.to_json()).verdicts == report.verdicts
    of_report(report)
    recorded(path)


def read_baseline(path: Path) -> None:
    found = Baseline.load(path)
    found.check_comparable(found)
    assert all(isinstance(name, str) for name in found.backends)
    assert Baseline.load(path).to_json() == found.to_json()


def read_measured(path: Path) -> None:
    found = MeasuredTable.load(path)
    assert MeasuredTable.loads(found.dumps()) == found


def read_decisions(path: Path) -> None:
    kept.read_any_grid(path).table.adapted()
    kept.read(path).render()


def signed(name: str, digest: Callable[[dict[str, Any]], str]) -> Callable[[Any], Any]:
    """Gives a value the digest that whoever can write the file can write."""

    def sign(value: Any) -> Any:
        if not isinstance(value, dict) or name not in value:
            return value
        bare = {key: each for key, each in value.items() if key != name}
        return {**bare, name: digest(bare)}

    return sign


@dataclass(frozen=True)
class Kind:
    """
    Args:
        valid: what such a file holds.
        read: it, and all that is derived from it at once.
        error: the one that refuses it.
        sign: with the digest of what it holds.
    """

    name: str
    valid: Any
    read: Callable[[Path], None]
    error: type[Exception]
    sign: Callable[[Any], Any] = lambda value: value


KINDS = {
    kind.name: kind
    for kind in (
        Kind("report.json", small_report(), read_report, Malformed),
        Kind("report.json.gz", small_report(), read_report, Malformed),
        Kind("suite.json", suite_report(), lambda path: recorded(path) and None, Malformed),
        Kind(
            "baseline.json",
            json.loads(BASELINE.to_json()),
            read_baseline,
            BadBaseline,
            signed(gate_baseline.DIGEST, gate_baseline._digest),
        ),
        Kind(
            "measured.json",
            json.loads(table_of(rows_of(LAYER, {"TRITON": {1: 23.5, 16: 99}})).dumps()),
            read_measured,
            InvalidMeasuredTable,
            signed("digest", measured_file.digest_of),
        ),
        Kind("decisions.json", decisions(), read_decisions, DecisionsError, signed("digest", kept._digest)),
    )
}
every_kind = pytest.mark.parametrize("name", KINDS)


def is_read(kind: Kind, content: bytes, folder: Path) -> bool:
    path = folder / kind.name
    path.write_bytes(gzip.compress(content, 1, mtime=0) if path.suffix == ".gz" else content)
    return is_told(lambda: kind.read(path), kind.error)


@every_kind
def test_a_valid_one_is_read(name: str, tmp_path: Path) -> None:
    kind = KINDS[name]
    assert is_read(kind, as_json(kind.sign(kind.valid)), tmp_path)


@every_kind
@given(data=st.data())
@SETTINGS
def test_other_values(name: str, data: st.DataObject, tmp_path: Path) -> None:
    kind = KINDS[name]
    is_read(kind, as_json(kind.sign(data.draw(values_changed(kind.valid)))), tmp_path)


@every_kind
@given(data=st.data())
@SETTINGS
def test_a_file_with_mistakes(name: str, data: st.DataObject, tmp_path: Path) -> None:
    kind = KINDS[name]
    is_read(kind, data.draw(bytes_changed(as_json(kind.sign(kind.valid)))), tmp_path)


@every_kind
@given(content=st.binary(max_size=200))
@settings(SETTINGS, max_examples=60)
def test_any_bytes(name: str, content: bytes, tmp_path: Path) -> None:
    assert not is_read(KINDS[name], content, tmp_path)


@every_kind
def test_what_is_deep_long_or_twice(name: str, tmp_path: Path) -> None:
    for text in TEXTS:
        begin = time.monotonic()
        assert not is_read(KINDS[name], text, tmp_path), text[:40]
        assert time.monotonic() - begin < SECONDS, text[:40]


@every_kind
def test_a_key_that_stands_twice(name: str, tmp_path: Path) -> None:
    kind = KINDS[name]
    first = next(iter(kind.valid))
    text = as_json(kind.sign(kind.valid)).decode()
    twice = f'{{"{first}": {json.dumps(kind.valid[first])}, {text[1:]}'
    assert not is_read(kind, twice.encode(), tmp_path)


@every_kind
def test_a_text_as_its_file(name: str, tmp_path: Path) -> None:
    kind, path = KINDS[name], tmp_path / name
    for content in (b"\x1f\x8b", gzip.compress(b"{}")[:-4], b"\x00" * 1000):
        path.write_bytes(content)
        assert not is_told(lambda: kind.read(path), kind.error)


@every_kind
def test_memory_is_bounded(name: str, tmp_path: Path) -> None:
    """A file that is larger than any of ours is not read to its end; packed or not."""
    kind, path = KINDS[name], tmp_path / name
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(bytes(4 * MOST_UNPACKED), 1))
    else:
        with path.open("wb") as file:
            file.truncate(4 * MOST_UNPACKED)
    tracemalloc.start()
    try:
        assert not is_told(lambda: kind.read(path), kind.error)
        assert tracemalloc.get_traced_memory()[1] < 3 * MOST_UNPACKED
    finally:
        tracemalloc.stop()


def test_a_record_of_times_is_one(tmp_path: Path) -> None:
    """What the gate takes a logarithm of, or divides by, is positive."""
    valid = json.loads(BASELINE.to_json())["speed"][0]
    for place, value in (
        (("yardsticks_us", "memory"), 0),
        (("yardsticks_us", "memory"), -1.0),
        (("cells", "X c", "spread"), -1.0),
        (("cells", "X c", "freedom"), 0),
        (("cells", "X c", "trouble"), 1 << 20),
        (("cells", "X c", "rounds"), True),
        (("cells", "X c", "yardstick"), "none of them"),
    ):
        told = json.loads(json.dumps(valid))
        at = told
        for step in place[:-1]:
            at = at[step]
        at[place[-1]] = value
        with pytest.raises(ValueError, match="measure the baseline anew"):
            Record.from_json(json.dumps(told))
