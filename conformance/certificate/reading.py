"""A certificate's files, read as what they are: untrusted. Bounded in size and depth, nothing executed, each field of
its type; whatever is wrong is a `Malformed` that names the place."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conformance.certificate.statement import EVIDENCE, payload_of
from conformance.certificate.writing import FORMAT, STATEMENT_FILE
from conformance.report import Report
from conformance.untrusted import Malformed, bytes_of, object_of, unpacked

__all__ = ["SURROUNDINGS", "Certificate", "Malformed", "read_certificate"]

MOST_PACKED, MOST_STATEMENT = 5 << 20, 1 << 20
MAY_LACK = ("waivers", "shard")
"""Of a report in earlier certificates."""
SURROUNDINGS = {"device": dict, "versions": dict, "suite": dict, "distribution": (dict, type(None))}


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
    """

    edition: str
    surroundings: Mapping[str, Any]
    report: Report
    claimed: str
    statement: Mapping[str, Any]
    envelope: Mapping[str, Any]
    evidence_sha256: str


def read_certificate(folder: Path) -> Certificate:
    """
    Raises:
        Malformed: no folder with the two files, or one of them is none of a certificate.
    """
    if not folder.is_dir():
        raise Malformed(f"{folder}: no folder")
    content = bytes_of(folder / STATEMENT_FILE, MOST_STATEMENT)
    envelope = object_of(content, STATEMENT_FILE, MOST_STATEMENT)  # of one text
    try:
        payload = payload_of(envelope)
    except ValueError as error:
        raise Malformed(f"{STATEMENT_FILE}: {error}") from None
    statement = object_of(payload, f"{STATEMENT_FILE}: payload")
    if not isinstance(envelope.get("signatures"), list):
        raise Malformed(f"{STATEMENT_FILE}: signatures: expected a list, which may be empty")
    packed = bytes_of(folder / EVIDENCE, MOST_PACKED)
    evidence = object_of(unpacked(packed, EVIDENCE), EVIDENCE)
    if evidence.get("format") != FORMAT:
        raise Malformed(f"{EVIDENCE}: format={evidence.get('format')!r}: expected {FORMAT}")
    kinds: dict[str, Any] = {"edition": str, "report": dict, **SURROUNDINGS}
    for name, kind in kinds.items():
        if not isinstance(evidence.get(name), kind):
            raise Malformed(f"{EVIDENCE}: {name}={str(evidence.get(name))[:80]!r}: expected {kind}")
    return Certificate(
        evidence["edition"],
        {name: evidence[name] for name in SURROUNDINGS},
        Report.from_object(evidence["report"], f"{EVIDENCE}: report", MAY_LACK),
        str(evidence["report"].get("verdict")),
        statement,
        envelope,
        hashlib.sha256(packed).hexdigest(),
    )
