"""Certificates for tests: an invented one that is consistent, and how it is changed."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from conformance.axes import Space
from conformance.bounds import pooled
from conformance.bounds.aggregates import DIRECTIONS
from conformance.bounds.pooled import PARTS
from conformance.cases import Case
from conformance.certificate.consistent import SCHEME
from conformance.certificate.statement import EVIDENCE, enveloped, statement_of
from conformance.certificate.surroundings import suite_digest
from conformance.certificate.writing import STATEMENT_FILE, write_certificate
from conformance.certification import NOT_TIMED, excluded
from conformance.checks import CHECKS, EQUIVALENCE
from conformance.editions import Edition, target_of
from conformance.levels import coverage_of, items_for
from conformance.matrix import BY_BITS, BY_BOUND
from conformance.pooling import POOLED, pooled_scope
from conformance.predicate import CONTRACT, PREDICATE
from conformance.probe.backend import CHECK as FINGERPRINT
from conformance.report import Report
from conformance.results import CheckResult, Evidence, Status
from conformance.vocabulary import SCHEME_NAMES
from fp8moe import __version__
from fp8moe.backends.common import one_of
from fp8moe.backends.torch_experts import TorchExperts
from fp8moe.config import FusedMoEActivationFormat
from fp8moe.schemes import BLOCK
from fp8moe.support import Support

SMALL = Edition("test.1", "smoke", 7, 1.0, sorted(CHECKS), {})
TAKES = {"block": ("silu", "gelu")}
VERSIONS = {"fp8moe": __version__, "python": "3.12.3", "torch": "2.11.0", "triton": "3.6.0"}
DEVICE = {"kind": "cuda", "name": "a GPU", "architecture": "sm90"}
Change = Callable[[dict[str, Any]], object]


SUMS = {f"{name}.{part}": 0.25 for name in DIRECTIONS for part in PARTS}


def whole(seeds: int) -> list[CheckResult]:
    """The results of no case, where so many seeds have sums."""
    refused = [name for name in SCHEME_NAMES if name not in TAKES]
    return [
        CheckResult("selects", CONTRACT, Status.PASSED, "TOY"),
        CheckResult("selects", PREDICATE, Status.PASSED, "TOY"),
        *(CheckResult("computes", SCHEME, Status.NOT_SUPPORTED, "TOY", name, reason="SCHEME") for name in refused),
        CheckResult("computes", FINGERPRINT, Status.PASSED, "TOY"),
        CheckResult(
            "computes", POOLED, Status.PASSED, "TOY", statistics=pooled([SUMS] * seeds), scope=pooled_scope(seeds)
        ),
        NOT_TIMED,
    ]


def invented(failing: int = 0) -> Report:
    """A run that nobody made."""
    items = items_for(SMALL.level, TAKES, target_of("cuda"), SMALL.seed, fnuz=False)
    checks, seeds = [], set()
    for number, item in enumerate(items):
        bits = number % 2 == 0
        case = str(item.case)
        status, reason = Status.PASSED, ""
        if item.check == EQUIVALENCE and number < failing:
            status, reason = Status.FAILED, "E1 = 3 > 1"
        bounded = not bits or (item.check == EQUIVALENCE and item.case.seed == 0)
        sums = SUMS if bounded and item.check == EQUIVALENCE and item.case.tokens and not reason else {}
        seeds |= {item.case.seed} if sums else set()
        checks.append(
            CheckResult(
                "computes",
                item.check,
                status,
                "TOY",
                item.case.scheme,
                case,
                reason,
                3.0 if reason else 0.25 if bounded else None,
                Evidence.HARDWARE,
                judged_by=BY_BITS if bits else f"{BY_BOUND}nothing is declared",
                measured=sums,
                digest=hashlib.sha256(case.encode()).hexdigest()[:16],
            )
        )
    checks = [*whole(len(seeds)), *checks]
    space = Space(TAKES, fnuz=False)
    judged = [item.case for item in items if item.check == EQUIVALENCE]
    return Report(
        backend="TOY",
        origin="TOY",
        level=SMALL.level,
        seed=SMALL.seed,
        target="cuda",
        device=DEVICE["name"],
        versions=VERSIONS,
        checks=checks,
        coverage=tuple(str(each) for each in coverage_of(SMALL.level, space, judged)),
        excluded=excluded(space),
        seconds=12.0,
        planned=len(items),
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        takes=TAKES,
    )


def surroundings() -> dict[str, Any]:
    return {
        "device": DEVICE,
        "versions": VERSIONS,
        "suite": {"version": __version__, "sha256": suite_digest()},
        "distribution": {"name": "toy", "version": "1", "record_sha256": "0" * 64},
        "release": {"distribution": "toy", "version": "1", "why": ""},
    }


def written(folder: Path, report: Report | None = None, key: Path | None = None) -> Path:
    write_certificate(folder, report or invented(), SMALL.edition, surroundings(), key)
    return folder


def evidence_in(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(gzip.decompress((folder / EVIDENCE).read_bytes()))
    return found


def cases_of(evidence: dict[str, Any]) -> list[dict[str, Any]]:
    return [check for check in evidence["report"]["checks"] if check.get("case")]


def by_bound(evidence: dict[str, Any]) -> dict[str, Any]:
    """A case that has an error/bound."""
    return next(check for check in cases_of(evidence) if "error_over_bound" in check)


def equivalence_of(evidence: dict[str, Any]) -> list[dict[str, Any]]:
    return [check for check in cases_of(evidence) if check["check"] == EQUIVALENCE]


def values_of(check: dict[str, Any]) -> tuple[int, str]:
    """A case's seed and activation."""
    case = Case.parse(check["case"])
    return case.seed, case.activation


def forged(folder: Path, change: Change, *, restated: bool = True) -> None:
    """Changes the evidence; `restated`: by somebody who makes a new statement about it, as the suite would."""
    evidence = evidence_in(folder)
    change(evidence)
    packed = gzip.compress(json.dumps(evidence).encode(), mtime=0)
    (folder / EVIDENCE).write_bytes(packed)
    if restated:
        with suppress(ValueError):  # where there can be no statement on such a report, the old one stays
            _restate(folder, evidence)


def _restate(folder: Path, evidence: dict[str, Any]) -> None:
    report = Report.from_json(json.dumps(evidence["report"]))
    evidence["report"]["verdict"], evidence["report"]["verdicts"] = report.verdict, report.verdicts
    packed = gzip.compress(json.dumps(evidence).encode(), mtime=0)
    (folder / EVIDENCE).write_bytes(packed)
    given = (report, evidence["edition"], evidence["suite"], hashlib.sha256(packed).hexdigest())
    (folder / STATEMENT_FILE).write_text(json.dumps(enveloped(statement_of(*given))))


class BlockAlone(TorchExperts):
    """The reference with one scheme and one activation, whose level smoke takes seconds."""

    support = Support(
        device=lambda _platform, _env: True,
        needs="anything",
        scheme=one_of(BLOCK),
        activations=frozenset({"silu"}),
        activation_format=FusedMoEActivationFormat.Standard,
    )
