"""A certificate's files, read as what they are: untrusted. Bounded in size and depth, nothing executed, each field of
its type; whatever is wrong is a `Malformed` that names the place."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import islice
from pathlib import Path
from typing import Any, get_type_hints

from conformance.certificate.statement import EVIDENCE, payload_of
from conformance.certificate.times.kept import ROUNDS, TABLE, TAKEN, Times
from conformance.certificate.times.reading import rounds_from, status_from
from conformance.certificate.writing import FORMAT, STATEMENT_FILE, TIMES
from conformance.report import Report
from conformance.results import CheckResult

MOST_PACKED, MOST_UNPACKED, MOST_STATEMENT = 5 << 20, 64 << 20, 1 << 20
MOST_TIMES, MOST_STRANGERS = 1 << 20, 10
MOST_CHECKS, MOST_TEXT, MOST_DEPTH = 50_000, 20_000, 12
NAMED = {"str": str, "int": int, "float": float, "bool": bool}
MAYBE = (dict, type(None))
SURROUNDINGS = {"device": dict, "versions": dict, "suite": dict, "distribution": MAYBE, "release": MAYBE}


class Malformed(ValueError):
    """A certificate that cannot be read as one; the text names the file, the place and what is expected there."""


@dataclass(frozen=True)
class Certificate:
    """
    Args:
        edition: the name that it gives.
        surroundings: as `conformance.certificate.surroundings.surroundings`.
        report: of the run, each field of its type and nothing else believed.
        claimed: the verdict that the evidence says it has.
        statement: of the payload; `envelope` is around it.
        evidence_sha256: of the evidence's file as it is.
        times: of the backend beside others.
        table: the file of them that `fp8moe explain` reads, as it is; empty where there is none.
        others: by name, the SHA-256 of the times' files.
        strangers: names of what else is in the folder, and is no part of a certificate.
    """

    edition: str
    surroundings: Mapping[str, Any]
    report: Report
    claimed: str
    statement: Mapping[str, Any]
    envelope: Mapping[str, Any]
    evidence_sha256: str
    times: Times = field(default_factory=Times)
    table: bytes = b""
    others: Mapping[str, str] = field(default_factory=dict)
    strangers: Sequence[str] = ()


def read_certificate(folder: Path) -> Certificate:
    """
    Raises:
        Malformed: no folder with the two files, or one of them is none of a certificate.
    """
    if not folder.is_dir():
        raise Malformed(f"{folder}: no folder")
    envelope = _object(_bytes(folder / STATEMENT_FILE, MOST_STATEMENT), STATEMENT_FILE, MOST_STATEMENT)  # of one text
    try:
        payload = payload_of(envelope)
    except ValueError as error:
        raise Malformed(f"{STATEMENT_FILE}: {error}") from None
    statement = _object(payload, f"{STATEMENT_FILE}: payload")
    if not isinstance(envelope.get("signatures"), list):
        raise Malformed(f"{STATEMENT_FILE}: signatures: expected a list, which may be empty")
    packed = _bytes(folder / EVIDENCE, MOST_PACKED)
    evidence = _object(_unpacked(packed), EVIDENCE)
    if evidence.get("format") != FORMAT:
        raise Malformed(f"{EVIDENCE}: format={evidence.get('format')!r}: expected {FORMAT}")
    kinds: dict[str, Any] = {"edition": str, "report": dict, **SURROUNDINGS}
    for name, kind in kinds.items():
        if not isinstance(evidence.get(name), kind):
            raise Malformed(f"{EVIDENCE}: {name}={str(evidence.get(name))[:80]!r}: expected {kind}")
    times, files = _times(folder, evidence.get(TIMES))
    return Certificate(
        evidence["edition"],
        {name: evidence.get(name) for name in SURROUNDINGS},
        _report(evidence["report"]),
        str(evidence["report"].get("verdict")),
        statement,
        envelope,
        hashlib.sha256(packed).hexdigest(),
        times,
        files.get(TABLE, b""),
        {name: hashlib.sha256(content).hexdigest() for name, content in files.items()},
        _strangers(folder, {STATEMENT_FILE, EVIDENCE, *files}),
    )


def _times(folder: Path, told: Any) -> tuple[Times, dict[str, bytes]]:
    """The times, and their files as they are."""
    try:
        times = status_from(told)
        if times.status != TAKEN:
            return times, {}
        files = {name: _bytes(folder / name, MOST_TIMES) for name in (ROUNDS, TABLE)}
        return rounds_from(_object(files[ROUNDS], ROUNDS)), files
    except Malformed:
        raise
    except ValueError as error:
        raise Malformed(str(error)) from None


def _strangers(folder: Path, known: set[str]) -> list[str]:
    try:
        return sorted(islice((entry.name for entry in folder.iterdir() if entry.name not in known), MOST_STRANGERS))
    except OSError as error:
        raise Malformed(f"{folder.name}: {error.strerror or error}") from None


def _bytes(path: Path, most: int) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(most + 1)
    except OSError as error:
        raise Malformed(f"{path.name}: {error.strerror or error}") from None
    if len(content) > most:
        raise Malformed(f"{path.name}: more than {most >> 20} MiB: that is none of a certificate")
    return content


def _unpacked(packed: bytes) -> bytes:
    unpack = zlib.decompressobj(wbits=31)  # gzip alone
    try:
        content = unpack.decompress(packed, MOST_UNPACKED + 1)
    except zlib.error as error:
        raise Malformed(f"{EVIDENCE}: no gzip file ({error})") from None
    if len(content) > MOST_UNPACKED:
        raise Malformed(f"{EVIDENCE}: unpacked more than {MOST_UNPACKED >> 20} MiB")
    if not unpack.eof or unpack.unused_data:
        raise Malformed(f"{EVIDENCE}: {'cut off' if not unpack.eof else 'something follows the end of the file'}")
    return content


def _object(content: bytes, where: str, most: int = MOST_TEXT) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise Malformed(f"{where}: a key stands twice in one object")
        return found

    def no_constant(text: str) -> Any:
        raise Malformed(f"{where}: {text} is no number of JSON")

    try:
        found = json.loads(content.decode("utf-8"), object_pairs_hook=once, parse_constant=no_constant)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise Malformed(f"{where}: no JSON ({error})") from None
    except (RecursionError, ValueError) as error:
        if isinstance(error, Malformed):
            raise
        raise Malformed(f"{where}: no JSON of a certificate ({type(error).__name__})") from None
    if not isinstance(found, dict):
        raise Malformed(f"{where}: expected an object")
    _bounded(found, where, MOST_DEPTH, most)
    return found


def _bounded(value: Any, where: str, depth: int, most: int) -> None:
    if isinstance(value, str) and len(value) > most:
        raise Malformed(f"{where}: a text of {len(value)} characters, more than {most}")
    if isinstance(value, (dict, list)):
        if depth == 0:
            raise Malformed(f"{where}: nested more than {MOST_DEPTH} deep")
        for each in (*value, *value.values()) if isinstance(value, dict) else value:
            _bounded(each, where, depth - 1, most)


def _report(told: Mapping[str, Any]) -> Report:
    checks = told.get("checks")
    if not isinstance(checks, list) or len(checks) > MOST_CHECKS:
        raise Malformed(f"{EVIDENCE}: report.checks: expected a list of at most {MOST_CHECKS}")
    kinds = get_type_hints(CheckResult)
    for number, check in enumerate(checks):
        where = f"{EVIDENCE}: report.checks[{number}]"
        if not isinstance(check, dict):
            raise Malformed(f"{where}: expected an object")
        for name, value in check.items():
            if name not in kinds:
                raise Malformed(f"{where}: {name[:80]!r}: no field of a result")
            if not _is_of(value, kinds[name]):
                raise Malformed(f"{where}: {name}={str(value)[:80]!r}: expected {kinds[name]}")
    texts = ("backend", "origin", "level", "target", "device", "date", "shard")
    absent = {"waivers": [], "shard": ""}  # in earlier certificates
    for name in (each.name for each in fields(Report)):
        value = told.get(name, absent.get(name))
        fits = (
            isinstance(value, str)
            if name in texts
            else isinstance(value, int) and not isinstance(value, bool)
            if name in ("seed", "planned")
            else isinstance(value, (dict, list, int, float))
        )
        if not fits:
            raise Malformed(f"{EVIDENCE}: report.{name}={str(value)[:80]!r}: not what a report has there")
    for name in ("coverage", "excluded"):
        if not isinstance(told[name], list) or not all(isinstance(line, str) for line in told[name]):
            raise Malformed(f"{EVIDENCE}: report.{name}: expected a list of texts")
    for name in ("unshrunk", "versions"):
        if not isinstance(told[name], dict) or not all(isinstance(text, str) for text in told[name].values()):
            raise Malformed(f"{EVIDENCE}: report.{name}: expected an object of texts")
    waivers = told.get("waivers", [])
    if not isinstance(waivers, list) or not all(isinstance(waiver, dict) for waiver in waivers):
        raise Malformed(f"{EVIDENCE}: report.waivers: expected a list of objects")
    takes = told["takes"]
    for scheme, names in takes.items() if isinstance(takes, dict) else (("", None),):
        if not isinstance(names, list) or not all(isinstance(each, str) for each in names):
            raise Malformed(f"{EVIDENCE}: report.takes: {scheme!r}: expected a list of activations for each scheme")
    try:
        return Report.from_json(json.dumps(told))
    except (ValueError, TypeError, AttributeError, OverflowError) as error:
        raise Malformed(f"{EVIDENCE}: report: {error}") from None


def _is_of(value: Any, kind: Any) -> bool:
    """Whether JSON has a field's type: infinities and NaN are texts there."""
    if kind == dict[str, float]:
        return isinstance(value, dict) and all(_is_of(each, float) for each in value.values())
    if kind is float or kind == float | None:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return number or value in ("inf", "-inf", "nan")
    return isinstance(value, str)  # enumerations, too, whose values Report.from_json knows
