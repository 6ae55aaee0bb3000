"""`fp8moe show --html FILE`: what is there already stays, unless it is an earlier page."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.certificates import SMALL, written
from tests.unit.command_line import no_variables, run  # noqa: F401 (a fixture)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("conformance.certificate.verifying.verify.__defaults__", (None, lambda _name: SMALL))


@pytest.mark.parametrize("mine", ["notes of mine", "<!doctype html>\n<title>mine</title>", ""])
def test_another_file_stays(mine: str, tmp_path: Path) -> None:
    folder, out = str(written(tmp_path / "certificate")), tmp_path / "page.html"
    out.write_text(mine)
    done = run("show", folder, "--html", str(out), status=64)
    assert "page.html: is there already, and no such page; name another, or give --overwrite" in done.stderr
    assert out.read_text() == mine
    run("show", folder, "--html", str(out), "--overwrite")
    assert "fp8moe certificate: <bdi>TOY</bdi>" in out.read_text(encoding="utf-8")


def test_an_earlier_page_is_written_again(tmp_path: Path) -> None:
    first, second = (str(written(tmp_path / name)) for name in ("first", "second"))
    out = tmp_path / "page.html"
    for arguments in ((first,), (first, second), (first,)):
        run("show", *arguments, "--html", str(out))
