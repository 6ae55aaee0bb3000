"""Whatever stands in a certificate's files, verifying ends with findings, and raises nothing."""

from __future__ import annotations

import copy
import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conformance.certificate.page import page
from conformance.certificate.statement import EVIDENCE
from conformance.certificate.times.judged import summary
from conformance.certificate.times.kept import ROUNDS
from conformance.certificate.verifying import verify
from conformance.certificate.writing import STATEMENT_FILE
from tests.unit.certificates import SMALL, evidence_in, invented, written
from tests.unit.timed_certificates import times, with_times

ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20)
    | st.sampled_from(
        ["inf", "nan", "passed", "failed", "waived", "not_run", "v1:M=3", "", "block", "hardware", "cuda"]
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
SETTINGS = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in it; of a list the first few and the last."""
    yield path
    if isinstance(value, dict):
        for key in value:
            yield from places(value[key], (*path, key))
    elif isinstance(value, list):
        for index in sorted({*range(min(len(value), 4)), *range(max(len(value) - 1, 0), len(value))}):
            yield from places(value[index], (*path, index))


def put(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    for step in path[:-1]:
        value = value[step]
    value[path[-1]] = new
    return None


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("fuzz") / "certificate", invented(failing=1))


@pytest.fixture(scope="module")
def timed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_times(tmp_path_factory.mktemp("fuzz") / "timed", times(2))


@pytest.fixture(scope="module")
def evidence(folder: Path) -> dict[str, Any]:
    return evidence_in(folder)


@given(data=st.data())
@SETTINGS
def test_any_value_anywhere_in_the_evidence(data: st.DataObject, folder: Path, evidence: dict[str, Any]) -> None:
    changed = copy.deepcopy(evidence)
    path = data.draw(st.sampled_from(list(places(evidence))))
    whole = put(changed, path, data.draw(ANYTHING))
    (folder / EVIDENCE).write_bytes(gzip.compress(json.dumps(changed if whole is None else whole).encode()))
    found = verify(folder, editions=lambda name: SMALL)
    assert not found.holds  # the statement is about another file
    assert all(isinstance(text, str) for text in found.findings)


@given(data=st.data())
@SETTINGS
def test_any_value_anywhere_in_the_rounds(data: st.DataObject, timed: Path) -> None:
    kept = (timed / ROUNDS).read_bytes()
    changed = json.loads(kept)
    path = data.draw(st.sampled_from(list(places(changed))))
    whole = put(changed, path, data.draw(ANYTHING))
    told = json.dumps(changed if whole is None else whole).encode()
    (timed / ROUNDS).write_bytes(told)
    try:
        found = verify(timed, editions=lambda name: SMALL)
        assert not found.holds  # the statement is about another file
        if found.certificate is not None:
            page(found)
            summary(found.certificate.times, found.certificate.report)
    finally:
        (timed / ROUNDS).write_bytes(kept)


@given(content=st.binary(max_size=200), which=st.sampled_from([EVIDENCE, STATEMENT_FILE]), inside=st.booleans())
@SETTINGS
def test_any_bytes(content: bytes, which: str, inside: bool, folder: Path) -> None:
    kept = (folder / which).read_bytes()
    (folder / which).write_bytes(gzip.compress(content) if inside and which == EVIDENCE else content)
    try:
        assert not verify(folder, editions=lambda name: SMALL).holds
    finally:
        (folder / which).write_bytes(kept)
