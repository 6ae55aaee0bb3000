"""The pieces of a self-contained SVG: its colours for light and dark, text, shapes, and a mark for each outcome."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from html import escape

from conformance.gate.verdicts import Outcome
from fp8moe.texts import clipped, visible

LIGHT: Mapping[str, str] = {
    "ground": "#ffffff",
    "ink": "#1b1f24",
    "muted": "#57606a",
    "grid": "#d0d7de",
    "band": "#e3eaf2",
    "slower": "#b3400a",
    "inconclusive": "#7a3e9d",
    "faster": "#0a5fa8",
    "same": "#57606a",
}
DARK: Mapping[str, str] = {
    "ground": "#0d1117",
    "ink": "#e6edf3",
    "muted": "#9da7b1",
    "grid": "#30363d",
    "band": "#1f2b39",
    "slower": "#ff9566",
    "inconclusive": "#d2a8ff",
    "faster": "#6cb6ff",
    "same": "#9da7b1",
}
"""Vermilion, purple and blue differ with any of the common colour deficiencies; marks and words say the same."""
CHAR = 6.7
"""Width of a monospaced character at 11 pixels; 0.6 of the size in the common fonts, and a little."""
LINE = 15.0
"""Height of a line of text."""
MARKS: Mapping[Outcome, str] = {
    Outcome.SLOWER: "M-4,-5.5 L6,0 L-4,5.5 Z",
    Outcome.FASTER: "M4,-5.5 L-6,0 L4,5.5 Z",
    Outcome.INCONCLUSIVE: "M0,-5.5 L5.5,0 L0,5.5 L-5.5,0 Z",
    Outcome.SAME: "M-4,0 a4,4 0 1,0 8,0 a4,4 0 1,0 -8,0 Z",
}
"""A triangle that points to more or to less time, a hollow diamond, a disc; around the origin."""

_SIZES = "text{font:12px system-ui,sans-serif;fill:currentColor}.f8-mono{font:11px ui-monospace,monospace}"
_SIZES += ".f8-strong{font-weight:600}.f8-title{font-size:15px;font-weight:600}"


def document(name: str, size: tuple[float, float], title: str, told: str, body: Sequence[str]) -> str:
    """An SVG that stands alone or in a page.

    Args:
        name: of its identifiers, which a page with several of them has to keep apart.
        size: width and height, pixels.
        title, told: what a reader of the screen hears instead of the picture.
    """
    width, height = size
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="f8-plot" viewBox="0 0 {_n(width)} {_n(height)}" '
        f'width="{_n(width)}" height="{_n(height)}" role="img" aria-labelledby="{name}-title {name}-told">\n'
        f'<title id="{name}-title">{safe(title)}</title>\n<desc id="{name}-told">{safe(told)}</desc>\n'
        f"<style>{_colours(LIGHT)}{_SIZES}@media (prefers-color-scheme:dark){{{_colours(DARK)}}}</style>\n"
        f'<rect class="f8-ground" width="100%" height="100%" fill="currentColor"/>\n' + "\n".join(body) + "\n</svg>\n"
    )


def _colours(palette: Mapping[str, str]) -> str:
    """One class a role, which sets the colour alone: shapes take it as their fill or stroke."""
    return "".join(f".f8-{role}{{color:{colour}}}" for role, colour in palette.items())


def safe(text: str) -> str:
    """Text as a part of XML."""
    return escape(visible(text))


def text(x: float, y: float, said: str, style: str = "f8-ink", anchor: str = "start") -> str:
    """One line, its baseline at y."""
    return f'<text class="{style}" x="{_n(x)}" y="{_n(y)}" text-anchor="{anchor}">{safe(said)}</text>'


def line(x1: float, y1: float, x2: float, y2: float, style: str = "f8-grid", more: str = "") -> str:
    """A straight one, a pixel wide unless `more`, further attributes, says otherwise."""
    ends = f'x1="{_n(x1)}" y1="{_n(y1)}" x2="{_n(x2)}" y2="{_n(y2)}"'
    return f'<line class="{style}" {ends} stroke="currentColor"{" " * bool(more)}{more}/>'


def box(x: float, y: float, width: float, height: float, style: str) -> str:
    """A filled rectangle."""
    extent = f'x="{_n(x)}" y="{_n(y)}" width="{_n(width)}" height="{_n(height)}"'
    return f'<rect class="{style}" {extent} fill="currentColor"/>'


def mark(x: float, y: float, outcome: Outcome) -> str:
    """What an outcome looks like."""
    hollow = outcome is Outcome.INCONCLUSIVE
    ground = 'class="f8-ground" fill="currentColor"' if hollow else 'fill="currentColor"'
    ring = f'<path d="{MARKS[outcome]}" fill="none" stroke="currentColor" stroke-width="1.6"/>' if hollow else ""
    return (
        f'<g class="f8-{outcome.value}" transform="translate({_n(x)} {_n(y)})">'
        f'<path d="{MARKS[outcome]}" {ground}/>{ring}</g>'
    )


def columns(said: str) -> int:
    """How many columns of a monospaced font a text takes: letters of East Asia take two."""
    return sum(2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in said)


def wrapped(said: str, width: int, most: int) -> list[str]:
    """Lines of so many columns, broken behind a comma, blank, colon or slash where one is near; the last may be cut."""
    rest, lines = visible(said), list[str]()
    while rest:
        end = _fits(rest, width)
        if end < len(rest):
            breaks = [rest.rfind(char, 0, end) + 1 for char in ", :/"]
            end = max(breaks) if max(breaks) > end // 2 else end
        lines.append(rest[:end].rstrip())
        rest = rest[end:].lstrip()
        if len(lines) == most and rest:
            lines[-1] = clipped(lines[-1] + "…", _fits(lines[-1] + "…", width))
            break
    return lines or [""]


def _fits(said: str, width: int) -> int:
    """How many characters fit into so many columns; at least one."""
    taken = 0
    for number, char in enumerate(said):
        taken += columns(char)
        if taken > width:
            return max(number, 1)
    return len(said)


def _n(number: float) -> str:
    """Tenths of a pixel, with no trailing zeros."""
    return f"{number:.1f}".removesuffix(".0")
