"""A certificate with waivers: it holds where they make what it calls waived so, and not where it invents any."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import pytest

from conformance.certificate.reading import read_certificate
from conformance.certificate.verifying import Verified, verify
from conformance.certificate.writing import NoCertificate, write_certificate
from conformance.results import Status
from conformance.waivers import parse_waivers
from conformance.waivers.in_force import excuse
from fp8moe import __version__
from tests.unit.certificates import SMALL, cases_of, forged, invented, written
from tests.unit.waiver_files import in_days
from tests.unit.waiver_files import written as toml


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A certificate of a run in which one case is waived."""
    report = invented()
    number = next(n for n, check in enumerate(report.checks) if check.case)
    failed = report.checks[number]
    known = {
        "case": failed.case,
        "backend": "TOY",
        "device": "a GPU",
        "expires": in_days(90),
        "backend_version": ">=1,<2",
    }
    (waiver,) = parse_waivers(toml(known)).waivers
    reason = f"{excuse(waiver)}; what failed: E1 = 3 > 1"
    checks = list(report.checks)
    checks[number] = replace(failed, status=Status.WAIVED, reason=reason, error_over_bound=3.0)
    return written(tmp_path / "certificate", replace(report, checks=tuple(checks), waivers=(waiver.told(),)))


def verdict_on(folder: Path) -> Verified:
    return verify(folder, editions=lambda name: SMALL)


def test_one_with_a_waiver_holds_and_says_so(folder: Path) -> None:
    found = verdict_on(folder)
    assert found.holds, found.findings
    assert found.certificate is not None
    assert found.certificate.statement["predicate"]["result"] == "WARNED"


@pytest.mark.parametrize("version", ["1", "1.9.3+cu129", "1.5rc1"])
def test_its_range_is_compared_with_the_kernels_release(version: str, folder: Path) -> None:
    forged(folder, release(version=version))
    assert verdict_on(folder).findings == []


def test_one_of_before_is_compared_with_the_distribution(folder: Path) -> None:
    forged(folder, lambda evidence: evidence.pop("release"))
    assert verdict_on(folder).findings == []
    forged(folder, lambda evidence: evidence["distribution"].update(version="2"))
    assert any("judged was toy 2" in finding for finding in verdict_on(folder).findings)


def test_none_is_written_with_a_waiver_of_another_version(folder: Path, tmp_path: Path) -> None:
    certificate = read_certificate(folder)
    where = dict(certificate.surroundings) | {"release": {"distribution": "acme-kernels", "version": "2.0", "why": ""}}
    with pytest.raises(NoCertificate, match=r"is for versions >=1,<2: judged was acme-kernels 2\.0"):
        write_certificate(tmp_path / "other", certificate.report, certificate.edition, where)
    assert not (tmp_path / "other").exists()


def waived(**fields: Any) -> Callable[[dict[str, Any]], object]:
    return lambda evidence: evidence["report"]["waivers"][0].update(fields)


def release(**fields: str) -> Callable[[dict[str, Any]], object]:
    told = {"distribution": "acme-kernels", "version": "1.5", "why": ""} | fields
    return lambda evidence: evidence.update(release=told)


def all_waived(evidence: dict[str, Any]) -> None:
    """All but one, without which there is no verdict."""
    reason = cases_of(evidence)[0]["reason"]
    for check in cases_of(evidence)[:-1]:
        check.update(status="waived", reason=reason)


def broad(evidence: dict[str, Any]) -> None:
    """One waiver is for everything."""
    evidence["report"]["waivers"][0].update(check="*", case="*")
    all_waived(evidence)


def selects(evidence: dict[str, Any]) -> None:
    first = evidence["report"]["checks"][0]
    evidence["report"]["checks"].append(first | {"check": "selects.other"})
    first.update(status="waived", reason=cases_of(evidence)[0]["reason"])


YESTERDAY = (date.fromisoformat(in_days(0)) - timedelta(days=1)).isoformat()
FORGERIES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "no waivers": (lambda evidence: evidence["report"].update(waivers=[]), "waived, by none of the report's 0 waivers"),
    "no field": (lambda evidence: evidence["report"].pop("waivers"), "waived, by none of the report's 0 waivers"),
    "of another case": (waived(case="M=0"), "waived, by none of the report's 1 waiver"),
    "of another owner": (waived(owner="nobody"), "waived, by none of the report's 1 waiver"),
    "of another backend": (waived(backend="OTHER"), "is for backend 'OTHER'"),
    "of another device": (waived(device="a TPU"), "is for device 'a TPU'"),
    "of another version": (waived(backend_version=">=1.2,<1.4"), "is for versions >=1.2,<1.4: judged was toy 1"),
    "of a later version than was judged": (release(version="3"), "is for versions >=1,<2: judged was acme-kernels 3"),
    "of a version that is none": (release(version="new"), "is for versions >=1,<2: judged was acme-kernels new"),
    "of no version": (release(version="", why="lost"), "is for versions >=1,<2: judged was acme-kernels (lost)"),
    "of an own version made up": (release(distribution="toy", version="1.5"), "elsewhere toy is '1'"),
    "of a version of ours made up": (
        release(distribution="fp8moe", version="1.5"),
        f"elsewhere fp8moe is '{__version__}'",
    ),
    "of no distribution": (
        lambda evidence: (evidence.pop("release"), evidence.update(distribution=None)),
        "(no version is recorded)",
    ),
    "expired": (waived(expires=YESTERDAY), "had expired on the day of the run"),
    "without end": (waived(expires="2999-01-01"), "at most 180"),
    "with a field more": (waived(why="x"), "unknown key 'why'"),
    "every case": (all_waived, "waived, by none of the report's 1 waiver"),
    "every case by one": (broad, "at most 5%"),
    "what passes": (waived(case="M=17"), "covers cases that pass"),
    "the selection": (selects, "waived, which only cases of what is computed can be"),
    "a text": (lambda evidence: evidence["report"].update(waivers=["x"]), "report.waivers[0]='x': expected an object"),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_an_invented_waiver_does_not_hold(name: str, folder: Path) -> None:
    change, told = FORGERIES[name]
    forged(folder, change)
    found = verdict_on(folder)
    assert not found.holds
    assert any(told in finding for finding in found.findings), found.findings
