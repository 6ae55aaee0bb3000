"""The pages of certificates in a real, headless browser: read, spoken, by keyboard, light and dark, narrow, alone."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from conformance.certificate.page import comparison, page
from conformance.certificate.verifying import Verified, verify
from conformance.gate.shown import svg
from tests.unit.browser import CONTRAST, Browser, browser_or_skip
from tests.unit.certificates import SMALL, cases_of, forged, invented, written
from tests.unit.gate_runs import HOSTILE
from tests.unit.timed_certificates import CASES, times, with_times

HEADLINES = {
    "passed": "fp8moe certificate: TOY passed",
    "failed": "fp8moe certificate: TOY failed",
    "hostile": "does not hold",
    "two": "fp8moe certificates side by side: TOY passed, TOY failed",
    "timed": "fp8moe certificate: TOY passed",
    "timed two": "fp8moe certificates side by side: TOY passed, TOY passed",
}


def small(folder: Path) -> Verified:
    return verify(folder, editions=lambda _name: SMALL)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser_or_skip(tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    passed, failed = written(folder / "a"), written(folder / "b", invented(failing=2))
    hostile = written(folder / "c", invented(failing=len(HOSTILE)))

    def change(evidence: dict[str, object]) -> None:
        report = evidence["report"]
        assert isinstance(report, dict)
        report["device"] = "<img src=https://b.example/x onerror=alert(1)>"
        for check, name in zip(cases_of(evidence), HOSTILE, strict=False):
            check["case"], check["reason"], check["reproduce"] = name, f"{name}<script>alert(1)</script>", name

    forged(hostile, change)
    made = {
        "passed": page(small(passed)),
        "failed": page(small(failed)),
        "hostile": page(small(hostile)),
        "two": comparison(small(passed), small(failed)),
    }
    timed = small(with_times(folder / "d", times(len(CASES))))
    made |= {"timed": page(timed), "timed two": comparison(timed, small(with_times(folder / "e")))}
    for name, text in made.items():
        (folder / f"{name}.html").write_text(text, encoding="utf-8")
    return {name: folder / f"{name}.html" for name in made}


@pytest.fixture(params=HEADLINES)
def opened(request: pytest.FixtureRequest, browser: Browser, pages: dict[str, Path]) -> Browser:
    browser.scheme("light")
    browser.width(1200)
    browser.open(pages[request.param])
    browser.name = request.param
    return browser


def test_it_says_the_verdict_and_is_alone(opened: Browser) -> None:
    assert HEADLINES[opened.name] in opened.value("document.querySelector('h1').innerText")
    assert HEADLINES[opened.name] in opened.value("document.title") or "two" in opened.name
    asked = [request["request"]["url"] for request in opened.told("Network.requestWillBeSent")]
    assert asked == [opened.value("location.href")]
    complaints = (
        "Log.entryAdded",
        "Runtime.consoleAPICalled",
        "Runtime.exceptionThrown",
        "Page.javascriptDialogOpening",
    )
    assert [opened.told(name) for name in complaints] == [[], [], [], []]
    assert opened.value("document.querySelectorAll('script, img, iframe, link, form').length") == 0
    assert opened.value("document.compatMode") == "CSS1Compat"


def test_its_policy_is_in_force(opened: Browser) -> None:
    """A script that got onto the page all the same would not run, nor would an image be fetched."""
    added = "document.body.append(Object.assign(document.createElement('{}'), {})), undefined"
    opened.value(added.format("script", "{text: 'window.ran = true'}"))
    assert opened.value("window.ran === undefined")
    opened.value(added.format("img", "{src: 'https://a.example/x.png'}"))
    assert opened.value("document.images.length") == 1
    opened.wait("Log.entryAdded")
    assert all("Content Security Policy" in event["entry"]["text"] for event in opened.told("Log.entryAdded"))
    assert not [
        event for event in opened.told("Network.responseReceived") if event["response"]["url"].startswith("https")
    ]


def test_what_a_reader_of_the_screen_is_told(opened: Browser) -> None:
    spoken = opened.spoken()
    roles = [role for role, _ in spoken]
    for landmark in ("banner", "main", "contentinfo", "navigation"):
        assert roles.count(landmark) == 1, landmark
    assert any(role == "heading" and HEADLINES[opened.name] in name for role, name in spoken)
    named = {"region", "navigation", "image", "table", "article", "link", "heading"}
    assert [(role, name) for role, name in spoken if role in named and not name.strip()] == []
    assert {"region", "table", "columnheader", "rowheader", "image"} <= set(roles)
    levels = opened.value("[...document.querySelectorAll('h1, h2, h3, h4')].map(each => +each.tagName[1])")
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))


def test_every_stop_of_the_keyboard_is_seen(opened: Browser) -> None:
    script = "[...document.querySelectorAll('a, summary, [tabindex]')].filter(each => each.checkVisibility()).length"
    wanted = opened.value(script)
    stops = []
    for _ in range(wanted):
        opened.press("Tab")
        stops.append(
            opened.value("((each) => [each.tagName, getComputedStyle(each).outlineStyle])(document.activeElement)")
        )
    assert all(name != "BODY" and outline != "none" for name, outline in stops)
    opened.value("document.querySelector('nav a').click()")
    assert re.fullmatch("#[a-z-]+", opened.value("location.hash"))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_both_schemes_can_be_read(scheme: str, opened: Browser) -> None:
    opened.scheme(scheme)
    ground = {"light": svg.LIGHT, "dark": svg.DARK}[scheme]["ground"]
    rgb = ", ".join(str(int(ground[place : place + 2], 16)) for place in (1, 3, 5))
    assert opened.value("getComputedStyle(document.body).backgroundColor") == f"rgb({rgb})"
    opened.value("document.querySelectorAll('details').forEach(each => each.open = true)")
    assert opened.value(CONTRAST) == []


def test_it_reflows_on_a_narrow_screen(opened: Browser) -> None:
    """WCAG 2.2, 1.4.10: at 320 pixels nothing but wide tables scrolls sideways, each within its own frame."""
    opened.width(320)
    assert opened.value("document.documentElement.scrollWidth") <= 320


def test_bars_are_drawn_in_both_schemes(opened: Browser) -> None:
    """In the palette's blue, as long as the words beside them say."""
    if "timed" not in opened.name:
        assert opened.value("document.querySelectorAll('.f8-bar').length") == 0
        return
    for scheme, palette in (("light", svg.LIGHT), ("dark", svg.DARK)):
        opened.scheme(scheme)
        fill = opened.value("getComputedStyle(document.querySelector('.f8-bar-part')).fill")
        colour = palette["faster"]
        assert fill == f"rgb({', '.join(str(int(colour[place : place + 2], 16)) for place in (1, 3, 5))})"
    bar = "document.querySelector('#times ~ .wide td .f8-bar')"
    assert opened.value(f"{bar}.closest('td').innerText.trim()") == "33.3%"
    part, whole = (
        opened.value(f"{bar}.querySelector('{of}').getBoundingClientRect().width")
        for of in (".f8-bar-part", ".f8-bar-whole")
    )
    assert abs(part / whole - 0.333) < 1 / whole
