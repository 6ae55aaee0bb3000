"""The statement of a certificate: an in-toto Statement with the test-result predicate, in a DSSE envelope.

Formats: in-toto attestation v1 (https://in-toto.io/Statement/v1), its predicate test-result v0.1, and DSSE v1.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from typing import Any

from conformance.report import FAILED, PASSED, Report

STATEMENT = "https://in-toto.io/Statement/v1"
PREDICATE = "https://in-toto.io/attestation/test-result/v0.1"
PAYLOAD = "application/vnd.in-toto+json"
EVIDENCE = "evidence.json.gz"
RESULTS = {PASSED: "PASSED", FAILED: "FAILED"}


def statement_of(
    report: Report,
    edition: str,
    suite: Mapping[str, str],
    evidence_sha256: str,
    others: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """
    Args:
        report: a run that is complete.
        suite: its version and SHA-256.
        evidence_sha256: of the file EVIDENCE as it is stored.
        others: by name, the same of the other files that are evidence.
    """
    tests: dict[str, set[str]] = {"passed": set(), "failed": set(), "waived": set()}
    for check in report.checks:
        if check.status.value in tests and check.check:
            tests[check.status.value].add(f"{check.check} on {check.scheme}" if check.scheme else check.check)
    warned = tests["waived"] - tests["failed"]
    return {
        "_type": STATEMENT,
        "subject": [subject_of(*each) for each in {EVIDENCE: evidence_sha256, **(others or {})}.items()],
        "predicateType": PREDICATE,
        "predicate": {
            "result": "WARNED" if warned and report.verdict == PASSED else RESULTS[report.verdict],
            "configuration": [
                {"name": f"fp8moe edition {edition}", "digest": {"sha256": suite["sha256"]}},
            ],
            "passedTests": sorted(tests["passed"] - tests["failed"] - warned),
            "warnedTests": sorted(warned),
            "failedTests": sorted(tests["failed"]),
        },
    }


def subject_of(name: str, sha256: str) -> dict[str, Any]:
    """A file, as the statement names it."""
    return {"name": name, "digest": {"sha256": sha256}}


def enveloped(statement: Mapping[str, Any]) -> dict[str, Any]:
    """The envelope, without a signature."""
    payload = json.dumps(statement, sort_keys=True, separators=(",", ":")).encode()
    return {"payloadType": PAYLOAD, "payload": base64.b64encode(payload).decode(), "signatures": []}


def signed_text(payload_type: str, payload: bytes) -> bytes:
    """What a DSSE signature is over (its pre-authentication encoding)."""
    kind = payload_type.encode()
    return b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)


def payload_of(envelope: Mapping[str, Any]) -> bytes:
    """
    Raises:
        ValueError: another type, or no base64.
    """
    if envelope.get("payloadType") != PAYLOAD:
        raise ValueError(f"payloadType={envelope.get('payloadType')!r}: expected {PAYLOAD}")
    text = envelope.get("payload")
    try:
        return base64.b64decode(text if isinstance(text, str) else "", validate=True)
    except (binascii.Error, ValueError):
        raise ValueError("payload: no base64") from None
