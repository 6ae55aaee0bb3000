"""The file of waivers: TOML of bounded size and depth, held to the rules of one waiver; nothing in it is executed."""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Iterable, Mapping
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from packaging.specifiers import InvalidSpecifier, SpecifierSet

from conformance.cases import InvalidCase
from conformance.waivers.patterns import CasePattern, matches
from conformance.waivers.waiver import FIELDS, Waiver, WaiverError, Waivers, utc_today
from fp8moe.counted import counted

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MOST_BYTES = 1 << 20
MOST_WAIVERS = 1000
MOST_DAYS = 180
MOST_DEPTH = 4
"""Of brackets within brackets; [[waiver]] has two."""
LONGEST_LINE = 4096
"""Characters: what a parser spends on one key or number grows as the square of its length."""
LONGEST = {"case": 500, "reason": 1000, "tracker": 500}
"""Characters of a field; of any other, LONGEST_FIELD."""
LONGEST_FIELD = 200
SHOWN = 80
TABLE = "waiver"
REMEDY = "write a smaller file; waivers are few"
_ISSUE = re.compile(r"(?:[\w.-]+(?:/[\w.-]+)*)?#\d+|[A-Za-z]\w*-\d+", re.ASCII)
_LEXEMES = re.compile(
    r"""(?P<skipped> \"{3}(?:\\.|[^\\])*?(?:\"{3,5}|\Z) | '{3}.*?(?:'{3,5}|\Z)
                   | "(?:\\.|[^"\\\n])*"? | '[^'\n]*'? | \#[^\n]* )
      | (?P<opens>[\[{]) | (?P<closes>[\]}])""",
    re.VERBOSE | re.DOTALL,
)
"""Strings and comments, as TOML has them, and brackets outside of them. A string that is never closed takes the rest
with it: the parser stops there, too. One of several lines may have two quotes of its own before the closing three."""


def read_waivers(path: str | Path, *, today: date | None = None) -> Waivers:
    """The waivers of a file.

    Raises:
        OSError: it cannot be read.
        WaiverError: (a ValueError) it breaks the rules; see `parse_waivers`.
    """
    with open(path, "rb") as file:
        content = file.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise WaiverError(f"{path}: more than {MOST_BYTES >> 20} MiB: {REMEDY}")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise WaiverError(f"{path}: byte {error.start} is not UTF-8: save the file as UTF-8") from None
    return parse_waivers(text, str(path), today=today)


def parse_waivers(text: str, source: str = "waivers", *, today: date | None = None) -> Waivers:
    """The waivers of a text. One that has expired is among them: whoever uses it has to look.

    Args:
        source: names the file in errors.
        today: that `expires` may lie at most 180 days from; None: today, UTC.

    Raises:
        WaiverError: (a ValueError) no TOML, larger or deeper than a file of waivers may be, or a waiver that breaks
            the rules: the first thing that is wrong, and what to do.
    """
    return waivers_from(_parsed(text, source), source, today=today)


def waivers_from(content: Mapping[str, Any], source: str, *, today: date | None = None) -> Waivers:
    """The waivers of what a file holds; as `parse_waivers`."""
    for key in content:
        if key != TABLE:
            raise WaiverError(f"{source}: {_unknown(key, (TABLE,))}; every waiver begins with [[{TABLE}]]")
    tables = content.get(TABLE, [])
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise WaiverError(f"{source}: {TABLE} is {_shown(tables)}: expected tables that begin with [[{TABLE}]]")
    if not tables:
        raise WaiverError(f"{source}: no [[{TABLE}]] in it: write one, or give no file")
    if len(tables) > MOST_WAIVERS:
        raise WaiverError(f"{source}: {counted(len(tables), 'waiver')}, at most {MOST_WAIVERS}: {REMEDY}")
    day = today or utc_today()
    found: dict[tuple[str, ...], Waiver] = {}
    for number, table in enumerate(tables, 1):
        waiver = _Fields(source, number, table).waiver(day)
        first = found.setdefault(tuple(waiver.told()[name] for name in FIELDS[:5]), waiver)
        if first is not waiver:
            raise WaiverError(
                f"{source}: waiver {number}: covers the same as waiver {first.number} "
                f"(check={waiver.check!r}, case={waiver.case!r}): remove one of the two"
            )
    return Waivers(source, tuple(found.values()))


def _parsed(text: str, source: str) -> dict[str, Any]:
    if len(text) > MOST_BYTES:
        raise WaiverError(f"{source}: more than {MOST_BYTES >> 20} MiB: {REMEDY}")
    for number, line in enumerate(text.split("\n"), 1):
        if len(line) > LONGEST_LINE:
            raise WaiverError(f"{source}: line {number} has {len(line)} characters, at most {LONGEST_LINE}: shorten it")
    depth = 0
    for lexeme in _LEXEMES.finditer(text):
        depth += {"opens": 1, "closes": -1}.get(lexeme.lastgroup or "", 0)
        if depth > MOST_DEPTH:
            where = text.count("\n", 0, lexeme.start()) + 1
            raise WaiverError(
                f"{source}: line {where}: more than {MOST_DEPTH} brackets within each other: a field is one string"
            )
    try:
        loaded: dict[str, Any] = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        told = _printable(str(error))
        raise WaiverError(f'{source}: no TOML ({told}): a field is NAME = "text", under [[{TABLE}]]') from None
    return loaded


class _Fields:
    """One table of the file on its way to a waiver."""

    def __init__(self, source: str, number: int, table: Mapping[str, Any]) -> None:
        self.source, self.number, self.table = source, number, table

    def waiver(self, today: date) -> Waiver:
        for key in self.table:
            if key not in FIELDS:
                raise WaiverError(f"{self.source}: waiver {self.number}: {_unknown(key, FIELDS)}")
        for name in FIELDS:
            if name not in self.table:
                raise WaiverError(
                    f"{self.source}: waiver {self.number}: {name} is missing: add {name} = {_EXAMPLE[name]}"
                )
        texts = {name: self._text(name) for name in FIELDS if name != "expires"}
        self._check_id(texts["check"])
        self._tracker(texts["tracker"])
        try:
            cases = CasePattern.parse(texts["case"])
        except InvalidCase as error:
            raise self._wrong("case", _printable(str(error))) from None
        try:
            versions = SpecifierSet(texts["backend_version"])
        except InvalidSpecifier:
            raise self._wrong("backend_version", 'expected a range of versions such as ">=1.2,<1.4"') from None
        return Waiver(number=self.number, **texts, expires=self._expires(today), cases=cases, versions=versions)

    def _wrong(self, name: str, expected: str) -> WaiverError:
        return WaiverError(f"{self.source}: waiver {self.number}: {name} = {_shown(self.table[name])}: {expected}")

    def _text(self, name: str) -> str:
        value = self.table[name]
        if not isinstance(value, str):
            raise self._wrong(name, f"expected a string such as {_EXAMPLE[name]}")
        most = LONGEST.get(name, LONGEST_FIELD)
        if len(value) > most:
            raise self._wrong(name, f"{len(value)} characters, at most {most}: shorten it")
        text = " ".join(value.split())
        if not text:
            raise self._wrong(name, f"expected a text such as {_EXAMPLE[name]}")
        if not text.isprintable():
            raise self._wrong(name, "it has characters that cannot be printed: remove them")
        return text

    def _check_id(self, pattern: str) -> None:
        from conformance.checks import CHECKS

        if not any(matches(pattern, check) for check in CHECKS):
            near = _near(pattern, CHECKS)
            raise self._wrong("check", f"no check of a case is named so; {near or f'expected one of {len(CHECKS)}'}")

    def _tracker(self, text: str) -> None:
        try:
            url = urlsplit(text)
            known = (url.scheme in ("http", "https") and bool(url.hostname)) or _ISSUE.fullmatch(text) is not None
        except ValueError:
            known = False
        if not known or " " in text:
            raise self._wrong("tracker", 'expected a URL, or an issue such as "#12", "kernels#12" or "MOE-12"')

    def _expires(self, today: date) -> date:
        value = self.table["expires"]
        latest = today + timedelta(days=MOST_DAYS)
        if isinstance(value, str):
            try:
                value = date.fromisoformat(value.strip()) if len(value) <= SHOWN else None
            except ValueError:
                value = None
        if not isinstance(value, date) or isinstance(value, datetime):
            raise self._wrong("expires", f"expected a day such as {today.isoformat()}, at the latest {latest}")
        if value > latest:
            raise self._wrong(
                "expires",
                f"{counted((value - today).days, 'day')} from today, at most {MOST_DAYS}: {latest} at the latest",
            )
        return value


_EXAMPLE = {
    "check": '"computes.equivalence"',
    "case": '"scheme=block,k=8"',
    "backend": '"ACME"',
    "backend_version": '">=1.2,<1.4"',
    "device": '"NVIDIA H200*"',
    "reason": '"why it fails"',
    "tracker": '"https://tracker.example/12"',
    "owner": '"who answers for it"',
    "expires": "2026-12-24",
}


def _unknown(key: str, known: Iterable[str]) -> str:
    near = _near(key, known)
    return f"unknown key {_shown(key)}; {near or 'expected ' + ', '.join(known)}"


def _near(text: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(text[:LONGEST_FIELD], tuple(known), 1)
    return f"did you mean {close[0]}?" if close else ""


def _shown(value: object) -> str:
    """A value in an error, whatever it is, in one short line."""
    if isinstance(value, str):
        return ascii(value) if len(value) <= SHOWN else ascii(value[:SHOWN]) + "…"
    if isinstance(value, (date, bool)):
        return str(value).lower()
    for kind, words in ((dict, "a table"), (list, "a list"), ((int, float), "a number")):
        if isinstance(value, kind):
            return words
    return f"a {type(value).__name__}"


def _printable(text: str) -> str:
    return "".join(char if char.isprintable() else " " for char in text)[: 4 * SHOWN + LONGEST_FIELD]
