"""The documentation's site, built once for all tests that look at it."""

from __future__ import annotations

import os
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "docs"
PAGES = {"index", "quick-start", "guide", "vendors", "reading-a-report", "bounds", "kill-score"}
PAGES |= {"selector", "options", "support"}


class Page(HTMLParser):
    """One page: its text, its headings, its code, its ids, and the addresses that it loads and links to."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.file = file
        self.source = file.read_text(encoding="utf-8")
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.code: list[str] = []
        self.headings: list[str] = []
        self.words = ""
        self._open: list[str] = []
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.ids.update(filter(None, (given.get("id"),)))
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        elif tag == "link":
            self.loads.append(given["href"])
        self.loads += [given[name] for name in ("src", "srcset", "poster", "data") if name in given and tag != "a"]
        if tag == "code":
            self.code.append("")
        elif tag in ("h1", "h2", "h3"):
            self.headings.append("")
        if tag in ("code", "h1", "h2", "h3"):
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if self._open and tag == self._open[-1]:
            self._open.pop()

    def handle_data(self, data: str) -> None:
        self.words += data
        if "code" in self._open:
            self.code[-1] += data
        if self._open and self._open[0] != "code":
            self.headings[-1] += data


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its folder."""
    folder = tmp_path_factory.mktemp("site")
    path = os.pathsep.join(entry for entry in sys.path if entry)
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "-f",
        f"{SOURCE}/site/mkdocs.yml",
        "-d",
        f"{folder}",
    ]
    env = {**os.environ, "PYTHONPATH": path}
    ended = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return folder


@pytest.fixture(scope="session")
def pages(site: Path) -> dict[str, Page]:
    """By the name of the file, without its ending."""
    return {file.stem: Page(file) for file in sorted(site.glob("*.html"))}
