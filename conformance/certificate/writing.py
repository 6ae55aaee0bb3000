"""A run's certificate as a folder: the evidence and the statement. It is there as a whole or not at all."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from conformance.certificate.signing import signature_by
from conformance.certificate.statement import EVIDENCE, enveloped, statement_of
from conformance.certificate.surroundings import released
from conformance.certificate.times.kept import NOT_TAKEN, Times
from conformance.report import INCOMPLETE, Report
from conformance.waivers.kept import out_of_range, waivers_of
from conformance.waivers.waiver import WaiverError

FORMAT = 1
STATEMENT_FILE = "statement.dsse.json"
TIMES = "times"
"""In the evidence: whether times were taken."""
NONE_ASKED_FOR = Times(NOT_TAKEN, "none were asked for")


class NoCertificate(ValueError):
    """A run that no certificate can be made of, or a folder that it cannot go into."""


def write_certificate(
    folder: Path,
    report: Report,
    edition: str,
    surroundings: Mapping[str, Any],
    key: Path | None = None,
    times: Times = NONE_ASKED_FOR,
) -> None:
    """
    Args:
        folder: that is not there yet.
        report: of a complete run at the edition's level; one that failed has a certificate, too, which says so.
        surroundings: `conformance.certificate.surroundings.surroundings` of the backend.
        key: to sign with; None: without a signature.
        times: of the backend beside others.

    Raises:
        NoCertificate: the folder is there already, the run is not complete or has no case, or one of its waivers is
            for other versions of the backend than the one that is here.
        conformance.certificate.signing.CannotSign: by this key.
        OSError: as writing raises it; nothing is left then.
    """
    if folder.exists():
        raise NoCertificate(f"{folder} is there already: name a folder that is not, or move that one away")
    if report.verdict == INCOMPLETE:
        raise NoCertificate(f"the run is incomplete ({report.counts.get('not_run', 0)} not run): go on with --resume")
    if not report.takes:
        raise NoCertificate("no case was run: a certificate is of a backend that takes a scheme on this device")
    try:
        wrong = list(out_of_range(waivers_of(report), released(surroundings)))
    except WaiverError as error:
        wrong = [str(error)]
    if wrong:
        raise NoCertificate("; ".join(wrong))
    evidence = {"format": FORMAT, "edition": edition, **surroundings, TIMES: times.told}
    evidence["report"] = json.loads(report.to_json())
    packed = gzip.compress(json.dumps(evidence, indent=1).encode(), mtime=0)
    others = times.files(report.versions)
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in others.items()}
    statement = statement_of(report, edition, surroundings["suite"], hashlib.sha256(packed).hexdigest(), digests)
    envelope = enveloped(statement)
    if key is not None:
        envelope["signatures"] = [signature_by(key, envelope)]
    folder.absolute().parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.absolute().parent))
    try:
        stated = (json.dumps(envelope, indent=1) + "\n").encode()
        for name, content in {EVIDENCE: packed, **others, STATEMENT_FILE: stated}.items():
            with open(made / name, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        made.chmod(0o755)
        made.rename(folder)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise
