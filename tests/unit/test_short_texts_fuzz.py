"""Whatever is given as a cell of the grid or of the gate, a split, a shard, a signature, or a report that a certificate
rests on: it is understood, or refused by the one error of its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from conformance.certificate.signing import is_by, signature_by
from conformance.certificate.statement import enveloped
from conformance.models import Split, SplitError
from conformance.report import Report
from conformance.selection.axes import AXES
from conformance.selection.cells import Cell
from conformance.shards import InvalidShard, Shard
from conformance.timing.cells import TimedCell
from fp8moe.measured import Certificate
from fp8moe.measured.rows import InvalidMeasuredTable, MeasuredDevice
from tests.unit.certificates import VERSIONS, invented
from tests.unit.hostile import ANYTHING, TEXTS, as_json, bytes_changed, is_told, values_changed

PIECES = (
    *("sel1:", "cls", "self", "names", "v1:", "M=16", "TRITON", "tp8", "ep64r3", "3/8", "9" * 500),
    *"=,:/ \x00é²\ud800",
    *(axis.name for axis in AXES),
    *(name for axis in AXES for name in axis.names[:2]),
)
PARSERS: dict[str, tuple[Callable[[str], object], type[Exception]]] = {
    "a cell of the grid": (Cell.parse, ValueError),
    "a timed cell": (TimedCell.parse, ValueError),
    "a split": (Split.parse, SplitError),
    "a shard": (Shard.parse, InvalidShard),
}
CELLS = st.lists(st.tuples(st.sampled_from(PIECES), st.sampled_from(PIECES)), max_size=4).map(
    lambda pairs: "sel1:" + ",".join(f"{axis}={value}" for axis, value in pairs)
)


@pytest.mark.parametrize("name", PARSERS)
@given(text=st.one_of(st.text(), st.lists(st.sampled_from(PIECES), max_size=6).map("".join), CELLS))
@example(text="sel1:cls=x")
@example(text="sel1:names=x,self=y")
@settings(max_examples=300, deadline=None)
def test_any_text(name: str, text: str) -> None:
    parse, error = PARSERS[name]
    is_told(lambda: parse(text), error, longest=20_000)


# -- a report that a measured table rests on --

DEVICE = MeasuredDevice("a GPU", "cuda", "sm90")


def passed() -> dict[str, Any]:
    told: dict[str, Any] = json.loads(invented().to_json())
    first, *others = told["checks"]
    return {**told, "checks": [first, *[check for check in others if "case" in check][:2]], "excluded": []}


def rests_on(content: bytes) -> bool:
    return is_told(lambda: Certificate.of_report(content, DEVICE, VERSIONS), InvalidMeasuredTable)


def test_such_a_report_is_taken() -> None:
    assert Report.from_json(as_json(passed())).verdict == "passed"
    assert rests_on(as_json(passed()))


@given(values_changed(passed()))
@settings(max_examples=200, deadline=None)
def test_a_report_with_other_values(told: Any) -> None:
    rests_on(as_json(told))


@given(st.one_of(st.binary(max_size=200), bytes_changed(as_json(passed()))))
@settings(max_examples=200, deadline=None)
def test_a_report_with_mistakes(content: bytes) -> None:
    rests_on(content)


def test_a_report_that_is_deep_or_long() -> None:
    assert not any(rests_on(text) for text in TEXTS)


# -- signatures --


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A private key and its public one."""
    ed25519 = pytest.importorskip("cryptography.hazmat.primitives.asymmetric.ed25519", reason="of fp8moe[sign]")
    from cryptography.hazmat.primitives import serialization

    private = ed25519.Ed25519PrivateKey.generate()
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption())
    folder = tmp_path_factory.mktemp("keys")
    (folder / "key").write_bytes(private.private_bytes(*form))
    public = private.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    (folder / "key.pub").write_bytes(public)
    return folder / "key", folder / "key.pub"


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_any_signature(data: st.DataObject, keys: tuple[Path, Path]) -> None:
    """None but the key's own over this payload is by it; nothing that stands there instead raises."""
    private, public = keys
    envelope = enveloped({"subject": "this"})
    right = signature_by(private, envelope)
    other = signature_by(private, enveloped({"subject": "another"}))
    wrong = [other, {"sig": right["sig"][:-4]}, {"sig": 3}, {}, [right["sig"]], right["sig"]]
    signatures = data.draw(st.lists(st.one_of(ANYTHING, st.sampled_from(wrong)), max_size=3))
    assert not is_by(public, {**envelope, "signatures": signatures})
    assert is_by(public, {**envelope, "signatures": [*signatures, right]})
