"""`fp8moe table`: the summary, the difference, the acceptance, and what is refused."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conformance.decisions.decided import Decided
from conformance.decisions.kept import FILE, read
from conformance.selection.axes import DEVICES
from fp8moe.commands import table
from tests.unit.command_line import no_variables, run  # noqa: F401 (a fixture)
from tests.unit.decision_grids import as_specified

REFUSED = 64


@pytest.fixture
def decides_as_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "decide_grid", lambda **_: as_specified())


@pytest.fixture
def decides_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    """TRITON (code 7) by R8 (8) becomes MARLIN (9) wherever it is."""
    changed = (np.where(labels == 8 * 256 + 7, 8 * 256 + 9, labels) for labels in as_specified().labels)
    now = Decided(tuple(changed))
    monkeypatch.setattr(table, "decide_grid", lambda **_: now)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    made = tmp_path / "decisions.json"
    made.write_bytes(FILE.read_bytes())
    return made


def parsed(*arguments: str, status: int = 0) -> Any:
    return json.loads(run("table", "--json", *arguments, status=status).stdout)


def test_summary_has_a_row_a_device() -> None:
    told = parsed()
    assert list(told["devices"]) == list(DEVICES)
    assert sum(sum(outcomes.values()) for outcomes in told["devices"].values()) == told["cells"] == read().cells
    assert "DEEPGEMM" in told["devices"]["sm90"]
    assert "DEEPGEMM" not in told["devices"]["sm80"]
    assert told["log"][0]["reason"] == read().log[0].reason


def test_summary_is_a_table_that_people_read() -> None:
    text = run("table").stdout
    for device in (*DEVICES, "all"):
        assert re.search(rf"^│ {re.escape(device)} +│", text, re.MULTILINE), device
    assert f"{read().cells:,} cells in {len(read().table.rules)} rules" in text


def test_rules_in_words() -> None:
    lines = run("table", "--rules").stdout.splitlines()
    assert len(lines) == len(read().table.rules)
    assert lines[0] == "R1  TRITON: lora = yes"
    assert lines[-1] == "R9  NotImplementedError: nothing fits: anywhere else"


@pytest.mark.usefixtures("decides_as_kept")
def test_same_decisions_exit_with_0() -> None:
    assert f"every one of {read().cells:,} cells is decided as decisions.json says" in run("table", "--diff").stdout


@pytest.mark.usefixtures("decides_otherwise")
def test_other_decisions_exit_with_1(copy: Path) -> None:
    told = parsed("--diff", str(copy), status=1)
    (line,) = told["lines"]
    assert line["kept"] == [{"outcome": "TRITON", "rule": "R8", "cells": told["changed"]}]
    assert line["now"] == [{"outcome": "MARLIN", "rule": "R8", "cells": told["changed"]}]
    assert line["text"] == f"anywhere: TRITON [R8] -> MARLIN [R8] ({told['changed']:,} cells)"


@pytest.mark.usefixtures("decides_as_kept")
def test_nothing_to_accept_is_refused(copy: Path) -> None:
    refused = run("table", "--write", "--reason", "no change", str(copy), status=REFUSED)
    assert "nothing to accept" in refused.stderr
    assert copy.read_bytes() == FILE.read_bytes()


def test_what_is_decided_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(table, "accept", lambda now, reason, path: asked.append((reason, path)) or read().log[0])
    monkeypatch.setattr(table, "decide_grid", lambda **_: as_specified())
    told = parsed("--write", "--reason", "because")
    assert asked == [("because", FILE)]
    assert told["reason"] == read().log[0].reason
    assert f"accepted, {read().log[0].cells:,} cells" in run("table", "--write", "--reason", "because").stdout


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--write"], "--write needs --reason"),
        (["--reason", "x"], "--reason goes with --write"),
        (["--diff", "--reason", "x"], "--reason goes with --write"),
        (["--diff", "--write", "--reason", "x"], "give one of them"),
        (["--write", "--reason", " "], "--reason is empty"),
    ],
)
def test_options_that_do_not_go_together(arguments: list[str], why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "decide_grid", lambda **_: pytest.fail("a minute's work before the refusal"))
    assert why in run("table", *arguments, status=REFUSED).stderr


@pytest.mark.parametrize("arguments", [[], ["--diff"], ["--rules"], ["--json"], ["--write", "--reason", "x"]])
def test_bad_file_is_refused_before_any_work(arguments: list[str], copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "decide_grid", lambda **_: pytest.fail("a minute's work before the refusal"))
    copy.write_text(copy.read_text()[:-9])
    assert "cut off or edited" in run("table", *arguments, str(copy), status=REFUSED).stderr
