"""Scripted forgeries do not hold, though each has a statement of its own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from conformance.cases import Case
from conformance.certificate.verifying import Verified, verify
from conformance.checks import EQUIVALENCE
from conformance.matrix import BY_BITS
from conformance.pooling import POOLED
from tests.unit.certificates import SMALL, Change, by_bound, cases_of, equivalence_of, forged, values_of, written


def verdict_on(folder: Path) -> Verified:
    return verify(folder, editions=lambda name: SMALL)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return written(tmp_path / "certificate")


def other_case(evidence: dict[str, Any]) -> None:
    check = cases_of(evidence)[3]
    check["case"] = str(replace(Case.parse(check["case"]), seed=99))


def repeated(evidence: dict[str, Any]) -> None:
    """A case of another activation or seed has the same output."""
    first = equivalence_of(evidence)[0]
    second = next(check for check in equivalence_of(evidence) if values_of(check) != values_of(first))
    second["digest"] = first["digest"]


def without(name: str) -> Change:
    return lambda evidence: by_bound(evidence).pop(name)


def at(name: str, value: Any) -> Change:
    return lambda evidence: by_bound(evidence).update({name: value})


def in_report(**changed: Any) -> Change:
    return lambda evidence: evidence["report"].update(changed)


def of_no_case(evidence: dict[str, Any], name: str) -> dict[str, Any]:
    return next(check for check in evidence["report"]["checks"] if check["check"] == name)


def dropped(name: str) -> Change:
    return lambda evidence: evidence["report"]["checks"].remove(of_no_case(evidence, name))


def repeated_whole(name: str) -> Change:
    return lambda evidence: evidence["report"]["checks"].append(of_no_case(evidence, name))


def refused(scheme: str) -> Change:
    return lambda evidence: evidence["report"]["checks"].append(
        {**of_no_case(evidence, "computes.scheme"), "scheme": scheme}
    )


def added(**fields: str) -> Change:
    """A result of no case that passed."""
    result = {"verdict": "computes", "status": "passed", "backend": "TOY"}
    return lambda evidence: evidence["report"]["checks"].append({**result, **fields})


def left(check: dict[str, Any], status: str, reason: str, verdict: str = "computes") -> None:
    """A case that was not judged, whatever it was before."""
    for name in ("digest", "error_over_bound", "statistics", "measured", "judged_by", "evidence"):
        check.pop(name, None)
    check.update(status=status, reason=reason, verdict=verdict)


def never_run(evidence: dict[str, Any]) -> None:
    for check in cases_of(evidence):
        left(check, "not_run", "no time was left", "performs")
    dropped(POOLED)(evidence)


def easier(evidence: dict[str, Any]) -> None:
    """A case that fails gives way to one that passes, as a failure does to the smallest that fails."""
    check = by_bound(evidence)
    small = str(Case(scheme=check["scheme"], tokens=1, seed=9))
    evidence["report"]["unshrunk"][f"{check['check']} {small}"] = check["case"]
    check.update(case=small, digest="0123456789abcdef")


def unpooled(evidence: dict[str, Any]) -> None:
    for check in cases_of(evidence):
        check.pop("measured", None)
    dropped(POOLED)(evidence)


def other_shape(evidence: dict[str, Any]) -> None:
    """A case has the output of one with another number of tokens, whose seed and activation are its own."""
    cases = {check["case"]: (check, Case.parse(check["case"])) for check in equivalence_of(evidence)}.values()
    first, second = next(
        (one, other)
        for one, a in cases
        for other, b in cases
        if (a.seed, a.activation) == (b.seed, b.activation) and a.tokens != b.tokens
    )
    second["digest"] = first["digest"]


FORGERIES: dict[str, tuple[Change, str]] = {
    "an error above the limit": (at("error_over_bound", 1.01), "above the limit"),
    "an infinite error": (at("error_over_bound", "inf"), "above the limit"),
    "an error that is no number": (at("error_over_bound", "nan"), "above the limit"),
    "a negative error": (at("error_over_bound", -0.1), "no check gives"),
    "a negative duration": (at("seconds", -1.0), "no check gives"),
    "a statistic above the limit": (at("statistics", {"gain": 1.5}), "above the limit"),
    "an error left out": (without("error_over_bound"), "without an error/bound"),
    "a dropped case": (lambda evidence: evidence["report"]["checks"].remove(cases_of(evidence)[5]), "are missing"),
    "the last case dropped": (
        lambda evidence: evidence["report"]["checks"].remove(cases_of(evidence)[-1]),
        "are missing",
    ),
    "a case dropped, and counted so": (
        lambda evidence: (
            evidence["report"]["checks"].remove(cases_of(evidence)[5]),
            in_report(planned=len(cases_of(evidence)))(evidence),
        ),
        "are missing",
    ),
    "a case twice": (lambda evidence: evidence["report"]["checks"].append(cases_of(evidence)[0]), "stand twice"),
    "a case of another seed": (other_case, "none of the edition's"),
    "a case spelt otherwise": (
        lambda evidence: cases_of(evidence)[0].update(case=cases_of(evidence)[0]["case"] + ",seed=0"),
        "",
    ),
    "no case": (at("case", "v1:M=-1"), "no case"),
    "another scheme's": (at("scheme", "none"), "of another scheme"),
    "one output for two cases": (repeated, "the output of cases of 2 seeds"),
    "no digest": (without("digest"), "expected 16 hexadecimal digits"),
    "a digest that is none": (at("digest", "z" * 16), "expected 16 hexadecimal digits"),
    "another backend's result": (at("backend", "OTHER"), "in a report on"),
    "judged by nothing": (without("judged_by"), "neither bits nor the bound"),
    "simulated": (at("evidence", "simulated"), "not on a device"),
    "evidence of nothing": (without("evidence"), "not on a device"),
    "passed with a reason": (at("reason", "it crashed"), "passed, with a reason"),
    "not supported, with figures": (at("status", "not_supported"), "without a reason"),
    "a waiver of nobody": (at("status", "waived"), "without a reason"),
    "another level": (in_report(level="quick"), "report.level"),
    "another seed": (in_report(seed=8), "report.seed"),
    "the interpreter": (in_report(target="interpreter"), "report.target"),
    "another device": (in_report(device="a better GPU"), "device.name"),
    "another kind of device": (in_report(target="rocm"), "device.kind"),
    "other versions": (in_report(versions={"fp8moe": "9"}), "versions"),
    "fewer activations": (in_report(takes={"block": []}), "report.takes"),
    "another scheme in their place": (in_report(takes={"channel_tok": ["silu"]}), "none of the edition's"),
    "an unknown scheme": (in_report(takes={"better": ["silu"]}), "report.takes"),
    "nothing run": (in_report(takes={}), "no scheme was run"),
    "a run to come": (in_report(date="2999-01-01T00:00:00+00:00"), "in the future"),
    "no date": (in_report(date="soon"), "no ISO 8601 date"),
    "more covered": (in_report(coverage=["all of 1 pairs of values"]), "report.coverage"),
    "more excluded": (in_report(excluded=["E=1, k=2: hard"]), "report.excluded"),
    "more planned": (in_report(planned=10**6), "report.planned"),
    "a check of the whole backend dropped": (dropped("selects.contract"), "selects.contract: missing"),
    "no fingerprint": (dropped("computes.fingerprint"), "computes.fingerprint: missing"),
    "a fingerprint too many": (repeated_whole("computes.fingerprint"), "there twice"),
    "a scheme that is taken and refused": (refused("block"), "computes.scheme on block: there twice, or no check"),
    "a scheme that is neither": (dropped("computes.scheme"), "computes.scheme on tensor_static: missing"),
    "a check of its own": (added(check="computes.better"), "computes.better: there twice, or no check"),
    "a scheme passed that was not run": (added(check=EQUIVALENCE, scheme="none"), "no check of a whole backend"),
    "cells of the matrix added": (added(check=f"{EQUIVALENCE} (pairs of values)"), "no check of a whole backend"),
    "performs passed": (
        lambda evidence: of_no_case(evidence, "performs.times").update(status="passed", reason=""),
        "performs.times : passed, which it cannot be",
    ),
    "a predicate that does not apply": (
        lambda evidence: of_no_case(evidence, "selects.predicate").update(status="not_applicable", reason="none"),
        "selects.predicate : not_applicable, which it cannot be",
    ),
    "what is pooled does not apply": (
        lambda evidence: of_no_case(evidence, POOLED).update(status="not_supported", reason="none"),
        f"{POOLED} : not_supported, which it cannot be",
    ),
    "a simulated fingerprint": (
        lambda evidence: of_no_case(evidence, "computes.fingerprint").update(evidence="simulated"),
        "computes.fingerprint: simulated, not on a device",
    ),
    "never run, under another question": (never_run, "verdict='performs'"),
    "a scheme refused under another question": (
        lambda evidence: [left(check, "not_supported", "SCHEME", "selects") for check in cases_of(evidence)],
        "verdict='selects'",
    ),
    "not applicable by no limit": (
        lambda evidence: left(by_bound(evidence), "not_applicable", "nothing to show"),
        "by no limit that it is beyond",
    ),
    "beyond a limit that it keeps": (
        lambda evidence: left(by_bound(evidence), "not_applicable", "top_k=2 is beyond the declared max_top_k=2"),
        "by no limit that it is beyond",
    ),
    "an easier case in its place": (easier, "only a failure is told on a smaller case"),
    "a statistic by the name of the error": (
        lambda evidence: by_bound(evidence).update(error_over_bound=5.0, statistics={"error/bound": 0.1}),
        "error/bound = 5 above the limit",
    ),
    "sums that are no numbers": (at("measured", {"gain.signed": "nan"}), "no check gives"),
    "all sums dropped, and what is pooled": (unpooled, "without the sums that are pooled"),
    "more pooled": (
        lambda evidence: of_no_case(evidence, POOLED).update(scope="9999 cases together"),
        "not what the cases' own sums give",
    ),
    "bits, with the figures of the bound": (
        lambda evidence: next(
            check for check in equivalence_of(evidence) if check["judged_by"] == BY_BITS and values_of(check)[0]
        ).update(error_over_bound=0.5),
        "passed by bits, with an error/bound",
    ),
    "bits alone, where both judge": (
        lambda evidence: next(
            check for check in equivalence_of(evidence) if check["judged_by"] == BY_BITS and not values_of(check)[0]
        ).pop("error_over_bound"),
        "passed by bits, without an error/bound",
    ),
    "an endless case": (at("seconds", "inf"), "no check gives"),
    "an endless run": (in_report(seconds="inf"), "no duration"),
    "a run of less than no time": (in_report(seconds=-1.0), "no duration"),
    "activations in another order": (in_report(takes={"block": ["gelu", "silu"]}), "in the suite's order"),
    "schemes in another order": (
        in_report(takes={"none": ["silu"], "block": ["silu"]}),
        "not in the suite's order, on which the cases depend",
    ),
    "weights of another device": (in_report(fnuz=True), "no cuda device has weights of e4m3fnuz"),
    "the output of another shape": (other_shape, "the output of cases of 2 shapes"),
    "a backend by another name": (in_report(origin="TorchExperts"), "report.origin names 'TorchExperts'"),
    "a date that no clock has": (in_report(date="0001-01-01T00:00:00+14:00"), "no ISO 8601 date"),
    "another maker's device": (
        lambda evidence: (
            in_report(device="AMD Instinct MI300X")(evidence),
            evidence["device"].update(name="AMD Instinct MI300X"),
        ),
        "'AMD Instinct MI300X' is a rocm device",
    ),
    "a suite without a digest": (lambda evidence: evidence["suite"].update(sha256="trust me"), "no SHA-256"),
    "another version of the suite": (lambda evidence: evidence["suite"].update(version="0.2.0"), "suite.version"),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_a_forgery_does_not_hold(name: str, folder: Path) -> None:
    change, told = FORGERIES[name]
    forged(folder, change)
    found = verdict_on(folder)
    assert not found.holds
    assert any(told in finding for finding in found.findings), found.findings


def test_there_are_as_many_as_were_asked_for() -> None:
    assert len(FORGERIES) >= 25


@pytest.mark.parametrize("name", ["an error above the limit", "a dropped case", "another device"])
def test_evidence_that_changed_after_its_statement(name: str, folder: Path) -> None:
    forged(folder, FORGERIES[name][0], restated=False)
    assert any("statement: subject: the evidence's file has changed" in one for one in verdict_on(folder).findings)
