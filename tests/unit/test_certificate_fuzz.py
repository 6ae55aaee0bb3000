"""Whatever stands in a certificate's files, verifying ends with findings, and raises nothing."""

from __future__ import annotations

import copy
import gzip
import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conformance.certificate.page import page
from conformance.certificate.statement import EVIDENCE
from conformance.certificate.times.judged import summary
from conformance.certificate.times.kept import ROUNDS
from conformance.certificate.verifying import verify
from conformance.certificate.writing import STATEMENT_FILE
from conformance.report_junit import of_certificate
from tests.unit.certificates import SMALL, evidence_in, invented, written
from tests.unit.hostile import ANYTHING, bytes_changed, places, put
from tests.unit.timed_certificates import times, with_times

SETTINGS = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


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


@given(data=st.data(), which=st.sampled_from([EVIDENCE, STATEMENT_FILE]), inside=st.booleans())
@SETTINGS
def test_a_file_with_mistakes(data: st.DataObject, which: str, inside: bool, folder: Path) -> None:
    kept = (folder / which).read_bytes()
    packed = inside and which == EVIDENCE
    content = data.draw(bytes_changed(gzip.decompress(kept) if packed else kept))
    (folder / which).write_bytes(gzip.compress(content, mtime=0) if packed else content)
    try:
        found = verify(folder, editions=lambda name: SMALL)
        assert found.holds <= ((folder / which).read_bytes() == kept or which == STATEMENT_FILE)
        if found.certificate is not None:
            ElementTree.fromstring(of_certificate(found).encode())
    finally:
        (folder / which).write_bytes(kept)
