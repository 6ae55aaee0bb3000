"""Ids that earlier versions wrote: each is still understood and means the same; one of a later version is told so."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conformance import kept_text
from conformance.axes import AXES
from conformance.cases import KEYS, LONGEST, Case, InvalidCase
from conformance.models import MODELS
from conformance.strategies import cases
from conformance.vocabulary import CHOICES, NEWER

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "data" / "golden_case_fields.jsonl"
DEFAULTS = {field.name: field.default for field in fields(Case)}


def golden() -> list[tuple[str, dict[str, Any]]]:
    """Lines are added to the file and never changed."""
    lines = [json.loads(line) for line in GOLDEN.read_text(encoding="utf-8").splitlines()]
    return [(line["id"], line["fields"]) for line in lines]


def test_each_id_means_what_it_meant() -> None:
    for text, meant in golden():
        found = asdict(Case.parse(text))
        assert {name: found[name] for name in meant} == meant, text
        later = found.keys() - meant.keys()  # fields that an older id does not know have their defaults
        assert {name: found[name] for name in later} == {name: DEFAULTS[name] for name in later}, text
        assert Case.parse(str(Case.parse(text))) == Case.parse(text)


def test_every_value_of_every_axis_is_among_them() -> None:
    found = [Case.parse(text) for text, _ in golden()]
    for axis, values in AXES.items():
        assert set(values) <= {getattr(case, axis) for case in found}, axis
    for name, values in CHOICES.items():
        assert set(values) == {getattr(case, name) for case in found}, name
    assert {str(case.model).partition(":")[0] for case in found if case.model} == set(MODELS)
    assert len(found) > 200


def test_every_case_of_the_kept_reports_is_understood() -> None:
    reports = [*ROOT.glob("reports/*/*/certify_*.json.gz"), *ROOT.glob("reports/*/*/triton_quick.json")]
    if not reports:
        pytest.skip("needs a checkout: the kept reports are in no distribution")
    ids = {
        check["case"]
        for path in reports
        for check in json.loads(kept_text.read_text(path))["checks"]
        if "case" in check
    }
    assert len(ids) > 1000
    for text in ids:
        assert str(Case.parse(text)) == text


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("v2:M=16", ["starts with 'v1'"]),
        ("v17:anything at all", ["starts with 'v1'"]),
        ("v1:M=3,topology=ring", ["'topology'", "'ring'"]),
        ("v1:M=3,law=of_tomorrow_morning", ["law", "'of_tomorrow_morning'"]),
        ("v1:M=3,scheme=mxfp4x", ["scheme", "'mxfp4x'"]),
        ("v1:M=3,model=gpt-7-large:tp8", ["model", "'gpt-7-large:tp8'"]),
        ("v1:M=3,layout=transposed_twice", ["layout", "'transposed_twice'"]),
    ],
)
def test_what_a_later_version_may_have_written(text: str, told: list[str]) -> None:
    with pytest.raises(InvalidCase) as caught:
        Case.parse(text)
    assert NEWER in str(caught.value)
    assert all(part in str(caught.value) for part in told), str(caught.value)


@pytest.mark.parametrize("text", ["v1:sede=1", "v1:law=unifrom", "v1:model=deepsek-v3:tp8", "M=16", "v1:M=-1"])
def test_a_slip_of_the_pen_is_no_newer_version(text: str) -> None:
    with pytest.raises(InvalidCase) as caught:
        Case.parse(text)
    assert NEWER not in str(caught.value)


# -- whatever is given as an id --

PIECES = (
    *"=,:+-._ \x00é٣",
    "v1:",
    "v2:",
    "off",
    "on",
    "4:1",
    "deepseek-v3:tp8",
    "9" * 30,
    "1e9",
    *KEYS,
    *KEYS.values(),
)


def is_told(text: str) -> None:
    found, error = None, ""
    try:
        found = Case.parse(text)
    except InvalidCase as refused:
        error = str(refused)
    assert len(error) < 3 * LONGEST
    assert found is None or Case.parse(str(found)) == found


@given(st.one_of(st.text(), st.lists(st.sampled_from(PIECES), max_size=12).map("".join).map("v1:{}".format)))
@settings(max_examples=500, deadline=None)
def test_any_text(text: str) -> None:
    is_told(text)


@given(
    cases(small=False, fnuz=True), st.lists(st.tuples(st.integers(0, 250), st.integers(0, 9), st.sampled_from(PIECES)))
)
@settings(max_examples=500, deadline=None)
def test_an_id_with_mistakes(case: Case, edits: list[tuple[int, int, str]]) -> None:
    text = str(case)
    for at, gone, piece in edits:
        text = text[:at] + piece + text[at + gone :]
    is_told(text)


@pytest.mark.parametrize("text", ["v1:" + "M=1," * 10_000, "v1:" + "x" * 5_000_000, "v" + "1" * 5_000_000 + ":M=1"])
def test_a_text_without_end(text: str) -> None:
    is_told(text)
