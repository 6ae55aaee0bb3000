"""A gate run as a page: it needs nothing from outside, nothing escapes into its markup, every cell is in it."""

import re
import sys
from importlib.resources import files

import pytest

from conformance.gate.numerics import Change
from conformance.gate.result import Decisions, Status
from conformance.gate.shown import words
from conformance.gate.shown.page import page
from conformance.gate.verdicts import Mode, Outcome, RunVerdict
from conformance.pages import PageUnavailable
from fp8moe.texts import visible
from tests.unit.elements import Elements
from tests.unit.gate_runs import HOSTILE, change, days, run, verdicts, whole

NAMES = [f"TRITON v1:M={k}" for k in range(12)]


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_stay_text(name: str) -> None:
    result = run(
        verdicts([name] * 4), [change(name, kind) for kind in Change], Decisions(Status.FAILED, [name]), {name: name}
    )
    shown = Elements(page(result, days({name: 0.0}, {name: 0.1})))
    assert shown.rows == [visible(name)] * (4 + len(Change))
    assert not {"script", "img", "iframe", "a", "link", "b"} & set(shown.tags)
    assert not [one for one, _ in shown.attributes if one.startswith("on")]
    assert visible(name) in shown.texts


def test_page_refers_to_nothing_outside() -> None:
    text = page(whole(NAMES), days({"a": 0.0}, {"a": 0.1}))
    shown = Elements(text)
    assert not [
        (name, value) for name, value in shown.attributes if name in ("src", "href", "srcset", "action", "data")
    ]
    assert not re.findall(r"@import|url\(|@font-face", text)
    addresses = set(re.findall(r"https?://[^\s\"'<]+", text))
    assert addresses == {"http://www.w3.org/2000/svg"}  # a name, which no browser fetches
    assert "default-src 'none'" in text


def test_identifiers_are_there_once_and_labels_find_them() -> None:
    shown = Elements(page(whole(NAMES), days({"a": 0.0}, {"a": 0.1})))
    found = [value for name, value in shown.attributes if name == "id"]
    assert len(found) == len(set(found))
    wanted = [one for name, value in shown.attributes if name == "aria-labelledby" for one in value.split()]
    assert wanted
    assert set(wanted) <= set(found)


def test_page_has_every_part_and_cell() -> None:
    result = whole(NAMES)
    text = page(result, days({"a": 0.0}, {"a": 0.1}))
    shown = Elements(text)
    assert sorted(shown.rows) == sorted(NAMES * 2)
    assert shown.tags.count("svg") == 2
    for said in (words.headline(result), words.found(result, "speed"), words.speed_note(result), result.device):
        assert said in " ".join(shown.texts)
    assert text.count('class="is-slower"') == 3
    assert text.count('class="is-worse"') == 3
    assert "prefers-color-scheme: dark" in text
    assert "<!doctype html>" in text[:20]


@pytest.mark.parametrize("status", Status)
def test_every_status_has_its_word(status: Status) -> None:
    outcomes = {Status.PASSED: Outcome.SAME, Status.FAILED: Outcome.SLOWER, Status.INCONCLUSIVE: Outcome.INCONCLUSIVE}
    result = run(verdicts(NAMES, (outcomes[status],)) if status in outcomes else None)
    shown = Elements(page(result))
    assert words.STATUSES[status] in shown.texts
    assert ("class", f"status is-{status.value}") in shown.attributes
    assert shown.tags.count("svg") == (status in outcomes)
    assert "numerics was not asked for" in "".join(shown.texts)


def test_empty_parts() -> None:
    shown = Elements(page(run(RunVerdict(Mode.STORED, (), 0.0, 0.005), [], Decisions(Status.PASSED)), []))
    assert "svg" not in shown.tags
    assert "no change" in shown.texts
    assert "passed" in shown.texts


def test_a_huge_run_is_whole_in_its_tables() -> None:
    names = [f"acme.moe:AcmeExperts v1:E=256,k=8,H=7168,I=2048,M={k}" for k in range(500)]
    shown = Elements(page(whole(names)))
    assert sorted(shown.rows) == sorted(names * 2)
    assert any("440 cells more" in said for said in shown.texts)


def test_without_jinja_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(PageUnavailable, match=re.escape("pip install fp8moe[report]")):
        page(whole(NAMES))


def test_templates_are_part_of_the_package() -> None:
    found = {entry.name for entry in (files("conformance.gate.shown") / "templates").iterdir()}
    assert {"page.html.j2", "page.css.j2"} <= found
