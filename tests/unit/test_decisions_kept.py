"""The kept file: what it holds comes back, what is wrong with it is said, and what is accepted is logged."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from conformance.decisions import kept as kept_module
from conformance.decisions.changes import difference
from conformance.decisions.decided import Decided, DecisionsError
from conformance.decisions.kept import ACCEPT, FILE, Entry, Kept, OtherGrid, read
from conformance.decisions.review import accept, review
from tests.unit.decision_grids import SMALL, activations, specified

REASON = "TRITON loses silu"


@pytest.fixture(scope="module")
def before() -> Decided:
    return specified(SMALL)


@pytest.fixture(scope="module")
def after() -> Decided:
    with activations("TRITON", drop="silu")():
        return specified(SMALL)


@pytest.fixture(scope="module")
def first(before: Decided, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A table of the small grid."""
    made = tmp_path_factory.mktemp("first") / "decisions.json"
    accept(before, "the first", made, SMALL, date="2026-01-31")
    return made.read_bytes()


@pytest.fixture
def path(tmp_path: Path, first: bytes) -> Path:
    """A file with that table."""
    made = tmp_path / "decisions.json"
    made.write_bytes(first)
    return made


def edited(path: Path, change: Any) -> str:
    told = json.loads(path.read_text())
    change(told)
    return json.dumps(told)


# -- round trip --


def test_what_is_written_is_read_back(path: Path, before: Decided) -> None:
    kept = read(path, SMALL)
    assert kept.render() == path.read_text(encoding="ascii")
    assert not any(map(len, kept.table.expand(SMALL).differs(before)))
    assert kept.log == (Entry("2026-01-31", "the first", kept.cells, ("the first table",)),)


def test_the_kept_file_is_what_is_rendered() -> None:
    assert read().render().encode() == FILE.read_bytes()


def test_no_file_is_left_beside_it(path: Path, after: Decided) -> None:
    accept(after, REASON, path, SMALL)
    assert [found.name for found in path.parent.iterdir()] == ["decisions.json"]


# -- acceptance --


def test_unreviewed_change_is_told_with_the_command_that_accepts_it(path: Path, after: Decided) -> None:
    found = review(after, path, SMALL)
    assert found
    assert "activation = silu: TRITON [R8] -> " in str(found)
    assert ACCEPT in str(found)


def test_accepted_change_is_kept_and_logged(path: Path, after: Decided) -> None:
    found = review(after, path, SMALL)
    entry = accept(after, f"  {REASON}\n", path, SMALL, date="2026-02-01")
    assert entry == Entry("2026-02-01", REASON, found.difference.cells, found.difference.texts)
    assert not review(after, path, SMALL)
    assert [(e.date, e.reason) for e in read(path, SMALL).log] == [("2026-01-31", "the first"), ("2026-02-01", REASON)]


def test_there_and_back_gives_the_same_rules(path: Path, before: Decided, after: Decided) -> None:
    rules = read(path, SMALL).table
    accept(after, "there", path, SMALL)
    assert read(path, SMALL).table != rules
    accept(before, "and back", path, SMALL)
    assert read(path, SMALL).table == rules


def test_nothing_to_accept_is_refused_and_nothing_written(path: Path, before: Decided) -> None:
    text = path.read_text()
    with pytest.raises(DecisionsError, match="nothing to accept"):
        accept(before, "no change", path, SMALL)
    assert path.read_text() == text


@pytest.mark.parametrize("reason", ["", " \n\t"])
def test_empty_reason_is_refused(path: Path, after: Decided, reason: str) -> None:
    text = path.read_text()
    with pytest.raises(DecisionsError, match="--reason is empty"):
        accept(after, reason, path, SMALL)
    assert path.read_text() == text


def test_new_grid_is_accepted_with_the_log(path: Path, before: Decided) -> None:
    cells = read(path, SMALL).cells
    entry = accept(Decided(before.labels[:2]), "fewer products", path, SMALL[:2])
    told = f"another grid than before, then of {cells:,} cells; by the rules kept for that one"
    assert (entry.cells, entry.changes) == (0, (f"{told}, nothing differs",))
    assert [e.reason for e in read(path, SMALL[:2]).log] == ["the first", "fewer products"]


def test_new_grid_hides_no_change_of_decisions(path: Path, before: Decided, after: Decided) -> None:
    found = difference(Decided(before.labels[:2]), Decided(after.labels[:2]), SMALL[:2])
    entry = accept(Decided(after.labels[:2]), "fewer products", path, SMALL[:2])
    assert entry.cells == found.cells > 0
    assert entry.changes[1:] == found.texts


def test_oldest_entries_lose_their_changes_where_the_file_grows_too_large(
    path: Path, after: Decided, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept_module, "BYTES_AT_MOST", len(path.read_text()) + 100)
    accept(after, "x" * 150, path, SMALL)
    assert len(path.read_text()) <= kept_module.BYTES_AT_MOST + 200
    log = read(path, SMALL).log
    assert [entry.reason for entry in log] == ["the first", "x" * 150]
    assert log[0].changes == ()
    monkeypatch.setattr(kept_module, "BYTES_AT_MOST", 100)
    with pytest.raises(DecisionsError, match="more than 100"):
        Kept(read(path, SMALL).table, "", 0, ()).write(path)


# -- bad files --


def cut(path: Path) -> str:
    return path.read_text()[:-200]


def rule_changed(path: Path) -> str:
    return path.read_text().replace('"by": "R8"', '"by": "R9"', 1)


def digest_lost(path: Path) -> str:
    return edited(path, lambda told: told.pop("digest"))


def signed(path: Path, change: Any) -> str:
    """Changed, with the digest of what it then holds."""

    def resign(told: Any) -> None:
        del told["digest"]
        change(told)
        told["digest"] = kept_module._digest(told)

    return edited(path, resign)


BAD = {
    "cut off": (cut, "cut off or edited, it is no JSON of ours .* restore it"),
    "empty": (lambda path: "", "cut off or edited"),
    "a merge left open": (lambda path: "<<<<<<< ours\n" + path.read_text(), "cut off or edited"),
    "edited": (rule_changed, "edited, its digest '.*' is not that of what it holds; restore it"),
    "log edited": (lambda path: path.read_text().replace("the first", "the second", 1), "edited, its digest"),
    "no digest": (digest_lost, "edited, its digest 'None'"),
    "a list": (lambda path: "[]", "no decision table, it holds no object"),
    "something else": (lambda path: '{"cells": 3}', "no decision table, its format is None"),
    "another version": (lambda path: edited(path, lambda t: t.update(version=9)), "its version is 9, and 1 is known"),
    "no rules": (lambda path: signed(path, lambda t: t.pop("rules")), "no table holds .KeyError: 'rules'"),
    "an outcome unknown": (
        lambda path: signed(path, lambda t: t["rules"][0].update(then="TURBO")),
        "outcome 'TURBO' is not one",
    ),
    "a value unknown": (
        lambda path: signed(path, lambda t: t["rules"][0].update(when={"device": ["sm999"]})),
        "axis 'device' has no value 'sm999'; restore it",
    ),
    "an axis unknown": (
        lambda path: signed(path, lambda t: t["rules"][0].update(when={"moon": ["full"]})),
        "no axis 'moon'",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_file_is_refused_with_what_is_wrong(path: Path, after: Decided, name: str) -> None:
    spoil, why = BAD[name]
    path.write_text(spoil(path), encoding="utf-8")
    text = path.read_bytes()
    with pytest.raises(DecisionsError, match=why) as caught:
        read(path, SMALL)
    assert str(path) in str(caught.value)
    with pytest.raises(DecisionsError):
        accept(after, REASON, path, SMALL)
    assert path.read_bytes() == text


def test_a_digest_that_cannot_be_printed_is_told_as_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = read()
    monkeypatch.setattr("conformance.decisions.kept.read_any_grid", lambda path: replace(kept, grid="\x1f\x1b[31m"))
    with pytest.raises(OtherGrid, match=r"digest \\x1f\\x1b\[31m, "):
        read()


def test_table_of_another_grid_is_refused() -> None:
    with pytest.raises(OtherGrid, match=f"of another grid .* make the table of this one with `{ACCEPT}`"):
        read(FILE, SMALL)


def test_no_file_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(DecisionsError, match=f"No such file.*make it with `{ACCEPT}`"):
        read(tmp_path / "none.json")
    with pytest.raises(DecisionsError, match="name a file that can be read"):
        read(tmp_path)
    (tmp_path / "latin").write_bytes(b"\xff\xfe{")
    with pytest.raises(DecisionsError, match="cut off or edited"):
        read(tmp_path / "latin")


def test_place_that_cannot_be_written_to_is_named(tmp_path: Path, before: Decided) -> None:
    with pytest.raises(DecisionsError, match="that can be written to is needed"):
        accept(before, REASON, tmp_path / "absent" / "decisions.json", SMALL)
