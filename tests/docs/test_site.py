"""The documentation's site: it builds without a warning, stands alone, and has all that the code has."""

from __future__ import annotations

import inspect
import json
import re
from html import unescape
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import typer

from conformance import plugin
from conformance.results import Evidence, Status
from fp8moe import selector
from fp8moe.cli import app
from fp8moe.envs import SELECTOR_VARIABLES
from fp8moe.platforms import PLATFORMS
from fp8moe.registry import SEED_ORDER, Reason
from tests.docs.conftest import SOURCE, Page

pytest.importorskip("mkdocs", reason="the site is built with mkdocs, of the extra `docs`")

DOTTED = re.compile(r"(?P<module>(?:fp8moe|conformance)(?:\.[a-z_0-9]+)*)(?::(?P<name>[A-Za-z_0-9.]+))?")
OUTSIDE = re.compile(r"""(?:url\(\s*["']?|@import\s+["'])(?:https?:)?//""")
REPORTS = SOURCE.parent / "reports"
PAGES = {"index", "quick-start", "guide", "vendors", "reading-a-report", "bounds", "kill-score"}
PAGES |= {"selector", "options", "support"}


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


def commands() -> dict[str, Any]:
    group: Any = typer.main.get_command(app)
    return dict(group.commands)


@pytest.mark.parametrize("name", commands())
def test_the_reference_has_every_option_of_a_command(name: str, pages: dict[str, Page]) -> None:
    page = pages["options"]
    assert f"fp8moe {name}" in page.headings
    after = page.source.split(f'<h3 id="fp8moe-{name}">')[1]
    section = after.split("<h3")[0].split("<h2")[0]
    options = [option for given in commands()[name].params for option in (*given.opts, *given.secondary_opts)]
    long = [option for option in options if option.startswith("--")]
    assert [option for option in long if option not in section] == []
    assert len(section.split("<tr>")) > len(commands()[name].params)  # a row each, and the head


def test_the_reference_has_every_option_of_pytest_and_every_variable(pages: dict[str, Page]) -> None:
    told = " ".join(pages["options"].code)
    options = set(re.findall(r'"(--fp8moe-[a-z-]+)"', inspect.getsource(plugin.pytest_addoption)))
    assert len(options) >= 12
    markers = re.findall(r'"markers", "(\w+):', inspect.getsource(plugin.pytest_configure))
    assert [name for name in (*options, *markers, *SELECTOR_VARIABLES) if name not in told] == []
    for name in {*re.findall(r"FP8MOE_[A-Z_]+", sources("fp8moe"))}:
        assert name in told, name


def sources(package: str) -> str:
    folder = Path(str(import_module(package).__file__)).parent
    return "\n".join(file.read_text(encoding="utf-8") for file in folder.rglob("*.py"))


def test_the_reference_has_every_exit_status(pages: dict[str, Page]) -> None:
    section = pages["options"].source.split('id="exit-statuses"')[1].split("<h2")[0]
    rows = dict(re.findall(r"<td><code>fp8moe ([\w-]+)</code></td>\s*<td>(.*?)</td>", section))
    assert list(rows) == list(commands())
    for name, command in commands().items():
        statuses = re.findall(r"(\d+):\s", command.help.partition("Exit status")[2])
        assert re.findall(r"(\d+): ", rows[name]) == statuses, name


def test_the_selectors_page_has_every_rule_in_order(pages: dict[str, Page]) -> None:
    source = inspect.getsource(selector)
    deciding = set(re.findall(r'"(R\d[a-c]?)"', source))
    assert {"R1", "R3b", "R9"} <= deciding
    table = pages["selector"].source.partition("<table>")[2].partition("</table>")[0]
    rules = re.findall(r"<strong>(R\d[a-c]?)</strong>", table)
    assert rules == sorted(rules)
    assert {f"R{number}" for number in range(1, 10)} | deciding <= set(rules)


def test_the_selectors_page_has_every_backend_device_and_reason(pages: dict[str, Page]) -> None:
    page = pages["selector"]
    names = [name for name, _, _ in SEED_ORDER]
    assert [heading for heading in page.headings if heading in names] == names
    assert [name for name in PLATFORMS if name not in page.code] == []
    assert [reason.value for reason in Reason if reason.value not in page.code] == []


def test_a_report_is_read_in_the_words_of_the_code(pages: dict[str, Page]) -> None:
    told = pages["reading-a-report"].code
    assert [word.value for word in (*Status, *Evidence) if word.value not in told] == []


@pytest.mark.parametrize("name", sorted(PAGES - {"vendors"}))
def test_what_a_page_names_is_there(name: str, pages: dict[str, Page]) -> None:
    """Functions, classes and modules in the text."""
    named = [found for code in pages[name].code if (found := DOTTED.fullmatch(code))]
    assert len(named) > {"bounds": 20, "selector": 10}.get(name, -1)
    for found in named:
        value: Any = import_module(found["module"]) if is_module(found["module"]) else None
        owner, _, attribute = found["module"].rpartition(".")
        if value is None:
            value = getattr(import_module(owner), attribute)
        for part in (found["name"] or "").split("."):
            value = getattr(value, part) if part else value


def is_module(name: str) -> bool:
    try:
        import_module(name)
    except ModuleNotFoundError:
        return False
    return True


def test_the_kill_score_is_that_of_the_newest_reports(pages: dict[str, Page]) -> None:
    if not REPORTS.is_dir():
        pytest.skip("a source distribution has no kept runs")
    page = pages["kill-score"]
    newest = max((REPORTS / "cpu").glob("*-zoo"))
    found = [content for file in newest.glob("*.json") if (content := json.loads(file.read_text(encoding="utf-8")))]
    assert found
    assert f"reports/cpu/{newest.name}" in page.words
    scores = re.findall(r"<td>(\d+)</td>\s*<td>(\d+)</td>\s*<td>[\d.]+%</td>", page.source)
    for content in found:
        for score in content["score"].values():
            assert not score["mutants"] or (str(score["mutants"]), str(score["killed"])) in scores
    families = page.source.partition('id="by-family"')[2].split("<h3")[1:]
    assert len(families) == len(scores)
    for score, section in zip(scores, families, strict=True):
        rows = re.findall(r"<td>(\d+)</td>\s*<td>(\d+)</td>", section)
        assert tuple(str(sum(map(int, column))) for column in zip(*rows, strict=True)) == score
        assert "zoo --score" in section


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
        ("<!-- insert: output fp8moe explain --platform nothing -->", "exit status 64"),
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
