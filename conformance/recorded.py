"""The failures that a report or a certificate tells of, each with what runs it again. The file need not be trusted: of
it are taken the names of a backend, a device and a check, and a case, each held to its grammar; never a command."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conformance import kept_text
from conformance.certificate.figures import PLAIN
from conformance.certificate.reading import read_certificate
from conformance.checks import CHECKS
from conformance.levels import LEVELS
from conformance.plan import DEVICES
from conformance.probe.backend import CHECK as FINGERPRINT
from conformance.report import Report
from conformance.results import CheckResult, Status
from conformance.typed import check_object, check_value
from conformance.untrusted import Malformed, object_of
from fp8moe.counted import counted

_NAMED = re.compile(r"--backend (\S+)")


@dataclass(frozen=True)
class Failure:
    """
    Args:
        result: as it is told.
        origin: what names its backend on a command line; "" where the file has no such name.
        found_as: the case that it was found as, before it was made small; "" where it is the same.
        otherwise: the command that runs it again where `fp8moe repro` does not, since it is of no single case; "" where
            this is not known.
    """

    result: CheckResult
    origin: str
    found_as: str = ""
    otherwise: str = ""

    @property
    def has_case(self) -> bool:
        return bool(self.result.case)


@dataclass(frozen=True)
class Recorded:
    """
    Args:
        failures: those of a case first; what a waiver covers comes last.
        target: the device that they were found on, as `--device` names it.
        device: in words.
        told: what the whole came to.
    """

    failures: Sequence[Failure]
    target: str
    device: str
    told: str


def recorded(path: Path) -> Recorded:
    """What a certificate's folder, a report of `fp8moe check`, or one of `pytest conformance --fp8moe-report` tells.

    Raises:
        OSError: as reading raises it.
        conformance.untrusted.Malformed: (a ValueError) it is none of these.
    """
    if path.is_dir():
        certificate = read_certificate(path)
        return _of_report(certificate.report)
    text = kept_text.read_text(path)
    content = object_of(text, path.name)
    if "cells" in content and "results" in content:
        return _of_suite(content, path.name)
    return _of_report(Report.from_json(text))


def _of_report(report: Report) -> Recorded:
    origin = report.origin if PLAIN.fullmatch(report.origin) else ""
    options = f"--level {report.level} --seed {report.seed}"
    failures = []
    for result in (*report.failures, *report.waived):
        otherwise = ""
        if origin and not result.case and report.level in LEVELS and report.target in DEVICES:
            command = f"probe {origin}" if result.check == FINGERPRINT else f"check {origin} {options}"
            otherwise = f"fp8moe {command} --device {report.target}"
        found_as = report.unshrunk.get(f"{result.check} {result.case}", "")
        failures.append(Failure(result, origin, found_as, otherwise))
    return Recorded(_ordered(failures), report.target, report.device, report.verdict)


def _of_suite(content: dict[str, Any], where: str) -> Recorded:
    """Of a report of the pytest plug-in, which has many backends."""
    results, device = content["results"], content.get("device")
    if not isinstance(results, list):
        raise Malformed(f"{where}: results: expected a list")
    check_value(content.get("target"), str, f"{where}: target")
    for number, result in enumerate(results):
        check_object(result, CheckResult, f"{where}: results[{number}]")
    failures = []
    for result in map(CheckResult.from_object, results):
        if result.status in (Status.FAILED, Status.WAIVED):
            named = _NAMED.search(result.reproduce)
            origin = named[1] if named else result.backend
            failures.append(Failure(result, origin if PLAIN.fullmatch(origin) else ""))
    told = counted(len(results), "result")
    name = device.get("name") if isinstance(device, dict) else ""
    return Recorded(_ordered(failures), content["target"], str(name), told)


def _ordered(failures: Sequence[Failure]) -> Sequence[Failure]:
    return sorted(failures, key=lambda each: (each.result.status is Status.WAIVED, not each.has_case))


def known_check(name: str) -> str:
    """A check's id, with or without "computes.".

    Raises:
        ValueError: there is none of this name.
    """
    found = f"computes.{name.removeprefix('computes.')}"
    if found not in CHECKS:
        raise ValueError(f"expected one of {', '.join(known.removeprefix('computes.') for known in CHECKS)}")
    return found
