"""The site in a real, headless browser: what it loads, the search and the navigation by keyboard, light and dark."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from threading import Thread

import pytest

from tests.unit.browser import CONTRAST, SECONDS, Browser, browser_or_skip

pytest.importorskip("mkdocs", reason="the site is built with mkdocs, of the extra `docs`")

PAGES = ("index", "bounds", "selector", "options", "reading-a-report")
WITH_CODE = ("guide", "vendors", "quick-start")
TITLES = {"index": "fp8moe", "selector": "The selector's rules - fp8moe"}
FOCUS = "((each) => [each.tagName, each.innerText, each.getAttribute('href')])(document.activeElement)"


class Quiet(SimpleHTTPRequestHandler):
    """Says nothing."""

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    """Of a server on this machine alone, since a page that is a file may not fetch the search's index."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site))) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser_or_skip(tmp_path_factory.mktemp("profile")) as found:
        yield found


def until(browser: Browser, script: str) -> None:
    """Waits for what a page does by itself."""
    end = time.monotonic() + SECONDS
    while not browser.value(script):
        assert time.monotonic() < end, f"{script} is still false: {browser.value('document.body.innerText')[:500]}"
        time.sleep(0.02)


@pytest.mark.parametrize("name", PAGES)
def test_a_page_stands_alone(name: str, browser: Browser, address: str) -> None:
    browser.width(1200)
    browser.visit(f"{address}/{name}.html")
    assert browser.value("document.title").endswith("fp8moe")
    assert browser.value("document.title") == TITLES.get(name, browser.value("document.title"))
    until(browser, "document.readyState === 'complete'")
    asked = [request["request"]["url"] for request in browser.told("Network.requestWillBeSent")]
    assert len(asked) > 5
    assert [url for url in asked if not url.startswith((address, "data:"))] == []
    assert browser.told("Runtime.exceptionThrown") == []
    assert [told for told in browser.told("Log.entryAdded") if told["entry"]["level"] != "info"] == []


@pytest.mark.parametrize("name", PAGES)
def test_what_a_reader_of_the_screen_is_told(name: str, browser: Browser, address: str) -> None:
    browser.width(1200)
    browser.visit(f"{address}/{name}.html")
    spoken = browser.spoken()
    roles = [role for role, _ in spoken]
    assert [roles.count(landmark) for landmark in ("main", "contentinfo", "navigation")] == [1, 1, 1]
    assert {"table", "columnheader", "cell"} <= set(roles) or name == "index"
    named = {"navigation", "link", "button", "heading", "image"}
    assert [(role, words) for role, words in spoken if role in named and not words.strip()] == []
    levels = browser.value("[...document.querySelectorAll('main :is(h1, h2, h3, h4)')].map(each => +each.tagName[1])")
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", [*PAGES, *WITH_CODE])
def test_both_schemes_can_be_read(name: str, scheme: str, browser: Browser, address: str) -> None:
    browser.scheme(scheme)
    browser.visit(f"{address}/{name}.html")
    until(browser, f"document.documentElement.dataset.bsTheme === '{scheme}'")
    browser.value("document.querySelectorAll('.modal').forEach(each => each.remove())")
    assert browser.value(CONTRAST) == []


def test_it_is_searched_by_keyboard(browser: Browser, address: str) -> None:
    browser.visit(f"{address}/index.html")
    browser.press("k")
    until(browser, "document.activeElement.id === 'mkdocs-search-query'")
    browser.write("hulp")
    end = time.monotonic() + SECONDS
    while not browser.value("document.querySelectorAll('#mkdocs-search-results a').length"):
        assert time.monotonic() < end
        browser.press("Shift")  # a key that comes before the index is loaded finds nothing, and is not asked again
        time.sleep(0.02)
    found = browser.value("[...document.querySelectorAll('#mkdocs-search-results a')].map(each => each.href)")
    assert any("bounds.html" in url for url in found)
    browser.press("Tab")
    tag, _, target = browser.value(FOCUS)
    assert tag == "A"
    assert f"{address}/{target.removeprefix('./')}" in found


def test_the_keyboard_gets_past_the_navigation_and_into_it(browser: Browser, address: str) -> None:
    browser.width(1200)
    browser.visit(f"{address}/index.html")
    browser.press("Tab")
    assert browser.value(FOCUS)[2] == "#content"
    browser.press("Enter")
    until(browser, "location.hash === '#content' && document.activeElement.id === 'content'")
    browser.visit(f"{address}/index.html")
    stops = []
    for _ in range(30):
        browser.press("Tab")
        stops.append(browser.value(FOCUS))
    texts = [words.strip() for _, words, _ in stops]
    assert {"Quick start", "Explained", "Reference", "Search", "Next"} <= set(texts)
    assert all(tag != "BODY" for tag, *_ in stops[: texts.index("Search")])
    browser.value("document.querySelector('nav [data-bs-toggle=dropdown]').focus()")
    browser.press("Enter")
    until(browser, "document.querySelector('nav .dropdown-menu.show a').checkVisibility()")
    browser.press("Tab")
    assert browser.value(FOCUS)[1:] == ["Reading a report", "reading-a-report.html"]


def test_it_reflows_on_a_narrow_screen(browser: Browser, address: str) -> None:
    """WCAG 2.2, 1.4.10: at 320 pixels nothing but wide tables and code scrolls sideways, each within its own frame."""
    browser.width(320)
    for name in (*PAGES, *WITH_CODE):
        browser.visit(f"{address}/{name}.html")
        assert browser.value("document.documentElement.scrollWidth") <= 320, name


@pytest.mark.parametrize("name", [*PAGES, *WITH_CODE])
def test_no_box_is_empty(name: str, browser: Browser, address: str) -> None:
    browser.width(1200)
    browser.visit(f"{address}/{name}.html")
    assert browser.value("[...document.querySelectorAll('.card')].filter(each => !each.innerText.trim()).length") == 0
    assert browser.value("document.querySelectorAll('.bs-sidebar').length") == (name != "index")


@pytest.mark.parametrize("width", [320, 1200])
@pytest.mark.parametrize("name", WITH_CODE)
def test_wide_code_scrolls_to_its_very_end(name: str, width: int, browser: Browser, address: str) -> None:
    """The end of the longest line comes into the frame, with room behind it; where there is more, a shadow says so."""
    browser.width(width)
    browser.visit(f"{address}/{name}.html")
    found = browser.value(
        """[...document.querySelectorAll("main pre")].filter(each => each.scrollWidth > each.clientWidth).map(each => {
            each.scrollLeft = each.scrollWidth;
            const words = document.createTreeWalker(each, NodeFilter.SHOW_TEXT), text = document.createRange();
            const ends = [];
            while (words.nextNode()) {
                text.selectNodeContents(words.currentNode);
                ends.push(...[...text.getClientRects()].map(line => line.right));
            }
            const frame = each.getBoundingClientRect();
            return [frame.left + each.clientWidth - Math.max(...ends), getComputedStyle(each).backgroundAttachment];
        })"""
    )
    assert found
    assert all(2 <= room <= 20 and "local" in shadows for room, shadows in found), found


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_code_has_colours(scheme: str, browser: Browser, address: str) -> None:
    browser.scheme(scheme)
    browser.visit(f"{address}/vendors.html")
    until(browser, f"document.documentElement.dataset.bsTheme === '{scheme}'")
    kinds = ("k", "nf", "sd", "mi", "n")
    script = "[...{}].map(kind => getComputedStyle(document.querySelector(`.highlight .${{kind}}`)).color)"
    colours = browser.value(script.format(list(kinds)))
    assert len(set(colours)) == len(kinds)
