"""The documentation's site: it builds without a warning, stands alone, and its parts say what is wrong with them."""

from __future__ import annotations

import json
import re
from html import unescape
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

from tests.docs.conftest import PAGES, SOURCE, Page

pytest.importorskip("mkdocs", reason="the site is built with mkdocs, of the extra `docs`")

OUTSIDE = re.compile(r"""(?:url\(\s*["']?|@import\s+["'])(?:https?:)?//""")


def test_it_has_every_page_and_finds_them(site: Path, pages: dict[str, Page]) -> None:
    assert set(pages) == PAGES | {"404"}
    index = json.loads((site / "search/search_index.json").read_text(encoding="utf-8"))
    assert {entry["location"].split("#")[0].removesuffix(".html") or "index" for entry in index["docs"]} == PAGES
    assert "insert:" not in "".join(page.source for page in pages.values())


def test_every_link_resolves(site: Path, pages: dict[str, Page]) -> None:
    followed = 0
    for page in pages.values():
        for address in {*page.links, *page.loads}:
            parts = urlsplit(address)
            if parts.scheme or parts.netloc:
                assert (parts.scheme, address in page.loads) == ("https", False), f"{page.file.name}: {address}"
                continue
            place = unquote(parts.path)
            file = site / place[1:] if place.startswith("/") else page.file.parent / place
            target = page.file if not place else file / "index.html" if file.is_dir() else file
            assert target.is_file(), f"{page.file.name}: {address}"
            if parts.fragment and target.suffix == ".html":
                assert parts.fragment in pages[target.stem].ids, f"{page.file.name}: {address}"
            followed += 1
    assert followed > 100


def test_nothing_is_loaded_from_elsewhere(site: Path, pages: dict[str, Page]) -> None:
    loads = {address for page in pages.values() for address in page.loads}
    assert any(address.endswith(".css") for address in loads)
    assert [address for address in loads if "//" in address] == []
    styles = {file: file.read_text(encoding="utf-8") for file in site.rglob("*.css")}
    assert len(styles) > 3
    assert [file.name for file, text in styles.items() if OUTSIDE.search(text)] == []
    assert OUTSIDE.search("src: url(https://fonts.example/a.woff2)")


@pytest.fixture
def hooks(monkeypatch: pytest.MonkeyPatch) -> Any:
    """As MkDocs loads them."""
    monkeypatch.syspath_prepend(str(SOURCE / "site"))
    return import_module("hooks")


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("<!-- insert: nonsense -->", "nonsense -->: expected one of accumulation-example, "),
        ("<!-- insert: readme No such heading -->", "No such heading"),
        ("<!-- insert: output fp8moe nothing -->", "exit status 64"),
        ("<!-- insert: output ls -->", "expected a command of fp8moe"),
        ("<!-- insert: rules at-work -->", "TypeError"),
    ],
)
def test_a_part_that_cannot_be_made_ends_the_build(line: str, told: str, hooks: Any) -> None:
    from mkdocs.exceptions import PluginError

    page = SimpleNamespace(file=SimpleNamespace(src_uri="some.md"))
    with pytest.raises(PluginError, match=r"^some\.md: ") as raised:
        hooks.on_page_markdown(f"# A page\n\n{line}\n", page=page)
    assert told in str(raised.value)


def test_texts_are_escaped(hooks: Any) -> None:
    from parts.markdown import code, prose, table, text

    hostile = "<b>_a_ | `x` [y](z) & *"
    assert set("<>_|`[]&*") & set(re.sub(r"&#\d+;", "", text(hostile))) == set()
    assert unescape(text(hostile)) == hostile
    assert prose("say `a|b` twice") == f"say {code('a|b')} twice"
    with pytest.raises(ValueError, match="2 cells below 1 heads"):
        table(("one",), [("a", "b")])
