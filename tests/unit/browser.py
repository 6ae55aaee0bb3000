"""A headless Chromium for tests of pages, over the pipe of its DevTools: without a library, and without a port."""

from __future__ import annotations

import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
OPTIONS = ("--headless", "--remote-debugging-pipe", "--no-sandbox", "--disable-gpu", "--no-first-run")
START = """
import os, sys
reads, writes = int(sys.argv[1]), int(sys.argv[2])
os.dup2(reads, 3)
os.dup2(writes, 4)
os.execvp(sys.argv[3], sys.argv[3:])
"""
"""The browser reads from descriptor 3 and writes to 4."""
SECONDS = 60.0
KEYS = {"Tab": 9, "Enter": 13, "Shift": 16, "k": 75}
"""Their codes."""
CONTRAST = """
(() => {
    const linear = part => (part /= 255) <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
    const light = colour => {
        const [red, green, blue] = colour.match(/[\\d.]+/g).map(Number).map(linear);
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
    };
    const ground = element => {
        for (let each = element; each; each = each.parentElement) {
            const colour = getComputedStyle(each).backgroundColor;
            if (colour !== "rgba(0, 0, 0, 0)") return colour;
        }
    };
    const low = [];
    const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (walk.nextNode()) {
        const element = walk.currentNode.parentElement;
        if (!walk.currentNode.data.trim() || element.closest("style, title, desc")) continue;
        const both = [light(getComputedStyle(element).color), light(ground(element))].sort((a, b) => b - a);
        const ratio = (both[0] + 0.05) / (both[1] + 0.05);
        if (ratio < 4.5) low.push(`${ratio.toFixed(2)} ${walk.currentNode.data.trim().slice(0, 60)}`);
    }
    return low;
})()
"""
"""Texts whose contrast is below what WCAG 2.2 asks for at level AA (1.4.3), by its formula."""


class NoBrowser(RuntimeError):
    """None that is installed, or it does not answer."""


def installed() -> str:
    """
    Raises:
        NoBrowser: there is none on PATH.
    """
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        raise NoBrowser(f"no browser on PATH: {', '.join(NAMES)}")
    return found


class Browser:
    """One page of a browser of its own.

    Args:
        folder: for its profile.
    """

    def __init__(self, folder: Path) -> None:
        reads, self._to = _pipe()
        self._from, writes = _pipe()
        command = [installed(), *OPTIONS, f"--user-data-dir={folder}", "about:blank"]
        self._process = subprocess.Popen(
            [sys.executable, "-c", START, str(reads), str(writes), *command],
            pass_fds=(reads, writes),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(reads)
        os.close(writes)
        self._rest, self._number, self._session = b"", 0, ""
        self.events: list[dict[str, Any]] = []
        """All that were told, the oldest first."""
        self.name = ""
        """Of what it shows, for the tests."""

    def __enter__(self) -> Browser:
        try:
            target = self.ask("Target.createTarget", url="about:blank")["targetId"]
            self._session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
            for domain in ("Page", "Runtime", "Log", "Network", "Accessibility"):
                self.ask(f"{domain}.enable")
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *_of_what: object) -> None:
        self._end()

    def _end(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._to)
        os.close(self._from)

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A command of the DevTools protocol, and its answer.

        Raises:
            NoBrowser: there is none in time.
            AssertionError: it is an error.
        """
        self._number += 1
        told = {"id": self._number, "method": method, "params": parameters}
        told |= {"sessionId": self._session} if self._session else {}
        try:
            os.write(self._to, json.dumps(told).encode() + b"\0")
        except OSError as error:
            raise NoBrowser(f"the browser has ended: {error}") from None
        until = time.monotonic() + SECONDS
        while True:
            found = self._next(until)
            if found.get("id") == self._number:
                assert "error" not in found, f"{method}: {found['error']}"
                answer: dict[str, Any] = found["result"]
                return answer
            self.events.append(found)

    def wait(self, method: str) -> None:
        """Until such an event is told, unless one was."""
        until = time.monotonic() + SECONDS
        while not self.told(method):
            self.events.append(self._next(until))

    def told(self, method: str) -> list[dict[str, Any]]:
        """What such events said so far."""
        return [event["params"] for event in self.events if event.get("method") == method]

    def open(self, file: Path) -> None:
        """Shows a file, and waits until it is loaded; events of before are forgotten."""
        self.visit(file.as_uri())

    def visit(self, address: str) -> None:
        """Likewise, what is at an address."""
        self.events.clear()
        self.ask("Page.navigate", url=address)
        self.wait("Page.loadEventFired")

    def scheme(self, name: str) -> None:
        """The reader's wish: "light" or "dark"."""
        self.ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": name}])

    def width(self, pixels: int) -> None:
        self.ask("Emulation.setDeviceMetricsOverride", width=pixels, height=800, deviceScaleFactor=1, mobile=False)

    def press(self, key: str) -> None:
        for kind in ("rawKeyDown", "keyUp"):
            self.ask("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=KEYS[key])

    def write(self, words: str) -> None:
        """Types them into what has the focus."""
        for letter in words:
            self.ask("Input.dispatchKeyEvent", type="keyDown", key=letter, text=letter)
            self.ask("Input.dispatchKeyEvent", type="keyUp", key=letter)

    def value(self, script: str) -> Any:
        """Of an expression on the page, which its own policy does not stop."""
        found = self.ask("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def spoken(self) -> list[tuple[str, str]]:
        """Role and name of everything that a reader of the screen is told of."""
        nodes = self.ask("Accessibility.getFullAXTree")["nodes"]
        return [(node["role"]["value"], node.get("name", {}).get("value", "")) for node in nodes if not node["ignored"]]

    def _next(self, until: float) -> dict[str, Any]:
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._from], [], [], max(until - time.monotonic(), 0))
            more = os.read(self._from, 1 << 20) if ready else b""
            if not more:
                raise NoBrowser("the browser does not answer" if not ready else "the browser has ended")
            self._rest += more
        first, _, self._rest = self._rest.partition(b"\0")
        found: dict[str, Any] = json.loads(first)
        return found


@contextmanager
def browser_or_skip(profile: Path) -> Iterator[Browser]:
    """For a fixture: the tests of a machine without a browser are skipped, with what is missing as the reason."""
    try:
        with Browser(profile) as found:
            yield found
    except NoBrowser as error:
        pytest.skip(str(error))


def _pipe() -> tuple[int, int]:
    """Both ends, of descriptors that are out of the browser's way."""
    ends = os.pipe()
    moved = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in ends]
    for end in ends:
        os.close(end)
    return moved[0], moved[1]
