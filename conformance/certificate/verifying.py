"""Whether a certificate holds: its verdict is derived again from its evidence, without a device.

What is proven: that the evidence is whole, that it is what the statement is about, that each case of the edition was
judged once and within its limits, or has a reason why not, and that nothing in it contradicts anything else. Not that
the run took place: an invention that is consistent passes, unless a signature by a key that the reader trusts, or a
sample that is run again, says otherwise.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from pathlib import Path

from conformance.axes import Space
from conformance.bounds import pooled
from conformance.certificate.consistent import of_digests, of_result, of_the_whole
from conformance.certificate.reading import Certificate, Malformed, read_certificate
from conformance.certificate.signing import is_by
from conformance.certificate.statement import EVIDENCE, statement_of, subject_of
from conformance.certificate.surroundings import released, suite_digest
from conformance.certificate.times.judged import contradictions as times_against
from conformance.certificate.times.kept import ROUNDS, TABLE, TAKEN
from conformance.certification import excluded
from conformance.checks import EQUIVALENCE
from conformance.editions import DEVICES, KINDS, Edition, UnknownEdition, edition, manifest, target_of
from conformance.levels import Item, coverage_of, items_for
from conformance.pooling import POOLED, pooled_scope
from conformance.report import Report
from conformance.results import Status
from conformance.vocabulary import SCHEME_NAMES
from conformance.waivers.kept import contradictions
from conformance.waivers.release import OWN
from fp8moe import __version__
from fp8moe.config import ACTIVATIONS
from fp8moe.counted import counted

SLACK = timedelta(days=1)
"""Of clocks that are set wrong."""
SHA256 = re.compile("[0-9a-f]{64}")
MAKERS = {"NVIDIA": "cuda", "AMD": "rocm"}
"""The kind of a maker's GPUs, whose names begin so."""
PROVEN = (
    "the evidence is whole, every case of the edition was judged once or has a reason why not, every check of the "
    "backend as a whole is there, each status follows from its figures, and nothing contradicts anything else"
)
NOT_PROVEN = (
    "that the run took place, nor that what is called not supported or not applicable is so; an invention that is "
    "consistent shows only in a sample that is run again"
)


@dataclass
class Verified:
    """
    Args:
        findings: what speaks against the certificate, a sentence each; without any it holds.
        notes: what a reader should know all the same.
        certificate: as it was read; None where it could not be.
        verdict: as derived from the evidence; "" where it could not be.
    """

    findings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    certificate: Certificate | None = None
    verdict: str = ""

    @property
    def holds(self) -> bool:
        return not self.findings


def verify(folder: Path, key: Path | None = None, editions: Callable[[str], Edition] = edition) -> Verified:
    """
    Args:
        folder: of the certificate.
        key: an OpenSSH public key (ed25519) that it must be signed with; None: a signature is told, and not checked.
        editions: by name.

    Raises:
        conformance.certificate.signing.CannotSign: `key` is none, or `cryptography` is not installed.
    """
    found = Verified()
    try:
        found.certificate = certificate = read_certificate(folder)
        which = editions(certificate.edition)
    except (Malformed, UnknownEdition) as error:
        found.findings.append(str(error))
        return found
    report = certificate.report
    found.verdict = report.verdict
    found.findings += _signature(certificate, key, found.notes)
    found.findings += _run(report, which)
    if found.findings:
        return found  # what the cases must be is not known
    items = items_for(which.level, report.takes, target_of(report.target), which.seed, fnuz=report.fnuz)
    found.findings += _plan(report, items, which)
    found.findings += [text for check in report.checks for text in of_result(check, report, which)]
    found.findings += of_the_whole(report)
    found.findings += contradictions(report, items, released(certificate.surroundings))
    found.findings += of_digests(report)
    found.findings += _totals(report, items)
    found.findings += _surroundings(certificate, found.notes)
    found.findings += _times(certificate, found.notes)
    found.findings += _statement(certificate)
    return found


def _signature(certificate: Certificate, key: Path | None, notes: list[str]) -> Iterator[str]:
    signatures = certificate.envelope["signatures"]
    if key is not None:
        if not is_by(key, certificate.envelope):
            yield f"signature: none of the {len(signatures)} is by the key in {key.name}"
        else:
            notes.append(f"signed by the key in {key.name}")
    elif signatures:
        named = ", ".join(str(one.get("keyid"))[:80] if isinstance(one, dict) else "?" for one in signatures)
        notes.append(f"signed, by its own account with {named}; not checked: give the public key with --key")
    else:
        notes.append("not signed: whoever made it is not known")


def _run(report: Report, which: Edition) -> Iterator[str]:
    """What the run was asked for."""
    if report.shard:
        yield f"report.shard={report.shard[:40]!r}: a piece of a run, and no whole one"
    for name, expected in (("level", which.level), ("seed", which.seed)):
        if getattr(report, name) != expected:
            yield f"report.{name}={getattr(report, name)!r}: edition {which.edition} has {expected!r}"
    if report.target not in DEVICES:
        yield f"report.target={report.target!r}: expected one of {', '.join(DEVICES)}"
    for scheme, names in report.takes.items():
        if scheme not in SCHEME_NAMES or not names or list(names) != [name for name in ACTIVATIONS if name in names]:
            yield f"report.takes: {scheme}: {', '.join(names)[:80]}: no scheme, or no activations, in the suite's order"
    if not report.takes:
        yield "report.takes: no scheme was run"
    if list(report.takes) != [name for name in SCHEME_NAMES if name in report.takes]:
        yield "report.takes: its schemes are not in the suite's order, on which the cases depend"
    if report.fnuz and report.target not in ("cpu", "rocm"):
        yield f"report.fnuz=True: no {report.target} device has weights of e4m3fnuz"
    inner = report.origin.partition(":")[2]
    if not report.backend or report.backend not in (report.origin, inner, inner.rpartition(".")[2]):
        yield f"report.backend={report.backend[:80]!r}: report.origin names {report.origin[:80]!r}"
    if not (math.isfinite(report.seconds) and report.seconds >= 0):
        yield f"report.seconds={report.seconds}: no duration"
    try:
        date = datetime.fromisoformat(report.date)
        if date.tzinfo is None or date.astimezone(timezone.utc) > datetime.now(timezone.utc) + SLACK:
            yield f"report.date={report.date}: in the future, or without a time zone"
    except (ValueError, OverflowError):
        yield f"report.date={report.date[:80]!r}: no ISO 8601 date"


def _plan(report: Report, items: list[Item], which: Edition) -> Iterator[str]:
    """Every case of the edition once, and no other."""
    planned = {item.key: item for item in items}
    found_as = {
        f"{check.check} {check.case}": report.unshrunk.get(f"{check.check} {check.case}", check.case)
        for check in report.checks
        if check.status is Status.FAILED and check.case
    }
    strange = [name for name in report.unshrunk if name not in found_as]
    if strange:
        yield f"report.unshrunk: {strange[0][:200]}: only a failure is told on a smaller case than it was found on"
    given = Counter(
        (check.check, found_as.get(f"{check.check} {check.case}", check.case)) for check in report.checks if check.case
    )
    failed = {(check.check, check.scheme) for check in report.checks if check.status is Status.FAILED}
    twice = [key for key, count in given.items() if count > 1]
    extra = [key for key in given if key not in planned]
    missing = [
        key for key, item in planned.items() if key not in given and (item.check, item.case.scheme) not in failed
    ]
    for what, keys in (("stand twice", twice), ("are none of the edition's", extra), ("are missing", missing)):
        if keys:
            yield f"{counted(len(keys), 'case')} {what}: {_some(keys)}"
    if (extra or missing) and which.manifests:
        kind = "cpu" if report.target == "cpu" else "gpu"
        if manifest(which, KINDS[kind]) != which.manifests[kind]:
            yield f"this suite, {__version__}, no longer makes edition {which.edition}'s cases: take an earlier one"
    if report.planned != len(items):
        yield f"report.planned={report.planned}: the edition has {len(items)} for what this backend takes"


def _some(keys: list[tuple[str, str]]) -> str:
    return ", ".join(f"{check} {case}" for check, case in keys[:2]) + (" and others" if len(keys) > 2 else "")


def _totals(report: Report, items: list[Item]) -> Iterator[str]:
    """What is told of all cases together."""
    results = {(check.check, check.case): check for check in report.checks if check.case}
    judged = [
        item.case
        for item in items
        if item.check == EQUIVALENCE and item.key in results and results[item.key].status is Status.PASSED
    ]
    space = Space(report.takes, fnuz=report.fnuz)
    covered = tuple(str(coverage) for coverage in coverage_of(report.level, space, judged))
    if tuple(report.coverage) != covered:
        yield f"report.coverage: {'; '.join(report.coverage)[:200]}: the cases that passed cover {'; '.join(covered)}"
    if tuple(report.excluded) != excluded(space):
        yield "report.excluded: not what the suite excludes for these schemes and activations"
    sums: dict[int, Mapping[str, float]] = {}
    for item in items:
        if item.check == EQUIVALENCE and item.key in results:
            check = results[item.key]
            if check.status is Status.PASSED and "gain.signed" in check.measured:
                sums.setdefault(item.case.seed, check.measured)
    told = [check for check in report.checks if check.check == POOLED]
    if bool(sums) != (len(told) == 1):
        yield f"{POOLED}: {counted(len(told), 'result')}, where {counted(len(sums), 'case')} with sums to pool"
    elif sums:
        try:
            ratios = pooled(list(sums.values()))
        except (KeyError, ValueError, OverflowError) as error:
            yield f"{POOLED}: the cases' own sums are none: {type(error).__name__} {error}"
            return
        broken = any(not ratio <= 1 for ratio in ratios.values())
        same = dict(told[0].statistics) == ratios and told[0].scope == pooled_scope(len(sums))
        if not same or (told[0].status is Status.PASSED) == broken:
            yield f"{POOLED}: not what the cases' own sums give"


def _surroundings(certificate: Certificate, notes: list[str]) -> Iterator[str]:
    told, report = certificate.surroundings, certificate.report
    if told["device"].get("name") != report.device:
        yield f"device.name={told['device'].get('name')!r}: the report is of {report.device!r}"
    kind = told["device"].get("kind")
    if kind != report.target:
        yield f"device.kind={kind!r}: the report's target is {report.target!r}"
    maker = MAKERS.get(report.device.partition(" ")[0])
    if maker is not None and report.target not in ("cpu", maker):
        yield f"report.target={report.target!r}: {report.device[:80]!r} is a {maker} device"
    if dict(told["versions"]) != dict(report.versions):
        yield f"versions: {told['versions']}: the report is of {dict(report.versions)}"
    suite = told["suite"]
    if suite.get("version") != report.versions.get("fp8moe"):
        yield f"suite.version={suite.get('version')!r}: the report is of {report.versions.get('fp8moe')!r}"
    if not SHA256.fullmatch(str(suite.get("sha256"))):
        yield f"suite.sha256={str(suite.get('sha256'))[:80]!r}: no SHA-256"
    if suite.get("version") == __version__ and suite.get("sha256") != suite_digest():
        notes.append(f"made by a suite {__version__} whose source is not the one installed here: compare the two")
    elif suite.get("version") != __version__:
        notes.append(f"made by suite {suite.get('version')}; this is {__version__}")
    own, release = told["distribution"], released(told)
    known = {str((own or {}).get("name")): (own or {}).get("version"), OWN: suite.get("version")}
    if told.get("release") is not None and known.get(release.distribution, release.version) != release.version:
        yield f"release: {str(release)[:200]}: elsewhere {release.distribution} is {known[release.distribution]!r:.80}"
    if own is None:
        notes.append("the backend came from no installed distribution: what ran cannot be named")


def _times(certificate: Certificate, notes: list[str]) -> Iterator[str]:
    times, report = certificate.times, certificate.report
    found = list(times_against(times, report, certificate.surroundings["device"]))
    yield from found
    if times.status == TAKEN and not found:
        try:
            table = times.files(report.versions)[TABLE]
        except ValueError as error:
            yield f"{ROUNDS}: no table can be made of it: {error}"
        else:
            if certificate.table != table:
                yield f"{TABLE}: not the table that {ROUNDS} comes to"
    yield from (f"{name[:80]!r}: in the folder, and no part of the certificate" for name in certificate.strangers)
    if times.status != TAKEN:
        notes.append(f"times {times.status}: {times.reason}")


def _statement(certificate: Certificate) -> Iterator[str]:
    if certificate.claimed != certificate.report.verdict:
        yield f"report.verdict={certificate.claimed[:40]!r}: its results come to {certificate.report.verdict!r}"
    if certificate.claimed_of_each != certificate.report.verdicts:
        yield f"report.verdicts: {str(certificate.claimed_of_each)[:120]}: not what its results come to"
    if certificate.report.verdict not in ("passed", "failed"):
        yield "the run is not complete"
        return
    given = (certificate.report, certificate.edition, certificate.surroundings["suite"], certificate.evidence_sha256)
    try:
        expected = statement_of(*given, certificate.others)
    except (KeyError, TypeError):
        yield "suite: no SHA-256"
        return
    for name in sorted({*expected, *certificate.statement}):
        if certificate.statement.get(name) != expected.get(name):
            told = _changed(certificate) if name == "subject" else "not what the evidence comes to"
            yield f"statement: {name}: {told}"


def _changed(certificate: Certificate) -> str:
    """Which file is not the one that the statement is about."""
    subject = certificate.statement.get("subject")
    if not isinstance(subject, list) or subject_of(EVIDENCE, certificate.evidence_sha256) not in subject:
        return "the evidence's file has changed"
    others = [name for name, sha256 in certificate.others.items() if subject_of(name, sha256) not in subject]
    return f"{', '.join(others)} changed" if others else "it is about other files, too"
