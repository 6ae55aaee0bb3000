"""Certificates with times, for tests: of an invented run on a device whose rates are known; how they are changed."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from conformance.certificate.statement import EVIDENCE, enveloped, statement_of
from conformance.certificate.times.kept import ROUNDS, TABLE, TAKEN, TimedCase, Times, planned
from conformance.certificate.times.reading import rounds_from
from conformance.certificate.writing import STATEMENT_FILE, write_certificate
from conformance.editions import target_of
from conformance.performs import floor_of, work_of_case
from conformance.rates import RATES
from conformance.report import Report
from tests.unit.certificates import DEVICE, SMALL, TAKES, evidence_in, invented, surroundings

H200 = {"name": "NVIDIA H200", "kind": "cuda", "architecture": "sm90"}
RATE = RATES[H200["name"]]
STATE = {"sm_mhz": [1830, 1980], "slower": ["power cap"], "processes": 1, "unwatched": ""}
ABSENT = {"MARLIN": "its library is not installed"}
CASES = planned(TAKES, target_of("cuda"))


def on_h200(**fields: Any) -> Report:
    return replace(invented(), **{"device": H200["name"], **fields})


def rounds(us: float) -> list[float]:
    """Of a backend that takes so long, within 1%."""
    return [round(us * (1 + 0.01 * float(np.cos(number))), 4) for number in range(16)]


@lru_cache
def timed(number: int) -> TimedCase:
    """Of the invented backend: three times the floor, of TRITON: four times, which is selected."""
    case = CASES[number]
    floor = floor_of(work_of_case(case), RATE, case.scheme).us
    us = {"TRITON": rounds(4 * floor), "TOY": rounds(3 * floor)}
    return TimedCase(str(case), "TRITON", us, ABSENT, STATE)


def times(count: int = 3) -> Times:
    return Times(TAKEN, "", H200, asdict(RATE), [timed(number) for number in range(count)])


def with_times(folder: Path, kept: Times | None = None, key: Path | None = None) -> Path:
    where = surroundings() | {"device": DEVICE | H200}
    write_certificate(folder, on_h200(), SMALL.edition, where, key, kept or times())
    return folder


def forged_times(folder: Path, change: Callable[[dict[str, Any]], object], *, restated: bool = True) -> None:
    """Changes what `rounds.json` holds; `restated`: with a table and a statement of their own about it."""
    told = json.loads((folder / ROUNDS).read_text())
    change(told)
    (folder / ROUNDS).write_text(json.dumps(told))
    if restated:
        with suppress(ValueError):  # where no such table can be made the old one stays
            (folder / TABLE).write_bytes(rounds_from(told).files(on_h200().versions)[TABLE])
        restate(folder)


def restate(folder: Path, files: Sequence[str] = (ROUNDS, TABLE)) -> None:
    """A statement on the files as they are now."""
    evidence = evidence_in(folder)
    digests = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in (EVIDENCE, *files)}
    report = Report.from_json(json.dumps(evidence["report"]))
    statement = statement_of(report, evidence["edition"], evidence["suite"], digests.pop(EVIDENCE), digests)
    (folder / STATEMENT_FILE).write_text(json.dumps(enveloped(statement)))


def statement_in(folder: Path) -> dict[str, Any]:
    envelope = json.loads((folder / STATEMENT_FILE).read_text())
    found: dict[str, Any] = json.loads(base64.b64decode(envelope["payload"]))
    return found
