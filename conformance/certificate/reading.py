"""A certificate's files, read as what they are: untrusted. Bounded in size and depth, nothing executed, each field of
its type; whatever is wrong is a `Malformed` that names the place."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from conformance.certificate.statement import EVIDENCE, payload_of
from conformance.certificate.times.kept import ROUNDS, TABLE, TAKEN, Times
from conformance.certificate.times.reading import rounds_from, status_from
from conformance.certificate.writing import FORMAT, STATEMENT_FILE, TIMES
from conformance.report import Report
from conformance.untrusted import Malformed, bytes_of, object_of, unpacked

__all__ = ["SURROUNDINGS", "Certificate", "Malformed", "read_certificate"]

MOST_PACKED, MOST_STATEMENT, MOST_TIMES = 5 << 20, 1 << 20, 1 << 20
MOST_STRANGERS = 10
MAY_LACK = ("waivers", "shard", "code")
"""Of a report in earlier certificates."""
MAYBE = (dict, type(None))
SURROUNDINGS = {"device": dict, "versions": dict, "suite": dict, "distribution": MAYBE, "release": MAYBE}


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
        claimed_of_each: as `claimed`, of each question; whatever the evidence has in its place.
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
    claimed_of_each: Any = None


def read_certificate(folder: Path) -> Certificate:
    """
    Raises:
        Malformed: no folder with the two files, or one of them is none of a certificate.
    """
    if not folder.is_dir():
        raise Malformed(f"{folder}: no folder")
    content = _bytes_of(folder / STATEMENT_FILE, MOST_STATEMENT)
    envelope = object_of(content, STATEMENT_FILE, MOST_STATEMENT)  # of one text
    try:
        payload = payload_of(envelope)
    except ValueError as error:
        raise Malformed(f"{STATEMENT_FILE}: {error}") from None
    statement = object_of(payload, f"{STATEMENT_FILE}: payload")
    if not isinstance(envelope.get("signatures"), list):
        raise Malformed(f"{STATEMENT_FILE}: signatures: expected a list, which may be empty")
    packed = _bytes_of(folder / EVIDENCE, MOST_PACKED)
    evidence = object_of(unpacked(packed, EVIDENCE), EVIDENCE)
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
        Report.from_object(evidence["report"], f"{EVIDENCE}: report", MAY_LACK),
        str(evidence["report"].get("verdict")),
        statement,
        envelope,
        hashlib.sha256(packed).hexdigest(),
        times,
        files.get(TABLE, b""),
        {name: hashlib.sha256(content).hexdigest() for name, content in files.items()},
        _strangers(folder, {STATEMENT_FILE, EVIDENCE, *files}),
        evidence["report"].get("verdicts"),
    )


def _bytes_of(path: Path, most: int) -> bytes:
    """Of a plain file: to open a pipe would wait for whoever writes into it."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise Malformed(f"{path.name}: no plain file")
    return bytes_of(path, most)


def _times(folder: Path, told: Any) -> tuple[Times, dict[str, bytes]]:
    """The times, and their files as they are."""
    try:
        times = status_from(told)
        if times.status != TAKEN:
            return times, {}
        files = {name: _bytes_of(folder / name, MOST_TIMES) for name in (ROUNDS, TABLE)}
        return rounds_from(object_of(files[ROUNDS], ROUNDS)), files
    except Malformed:
        raise
    except ValueError as error:
        raise Malformed(str(error)) from None


def _strangers(folder: Path, known: set[str]) -> list[str]:
    try:
        return sorted(islice((entry.name for entry in folder.iterdir() if entry.name not in known), MOST_STRANGERS))
    except OSError as error:
        raise Malformed(f"{folder.name}: {error.strerror or error}") from None
