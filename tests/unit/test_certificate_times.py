"""A certificate's times hold as they were taken; scripted forgeries do not, each with a statement of its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from conformance.certificate.reading import Malformed, read_certificate
from conformance.certificate.times.judged import all_judged, summary, watched
from conformance.certificate.times.kept import (
    BEFORE,
    FAILED,
    FIRST_TOKENS,
    NOT_TAKEN,
    ROUNDS,
    TABLE,
    TAKEN,
    WITHOUT_STATE,
    Times,
    planned,
)
from conformance.certificate.verifying import Verified, verify
from conformance.certificate.writing import write_certificate
from conformance.editions import target_of
from conformance.performs import floor_of, work_of_case
from conformance.pinned import checkpoint_cases
from conformance.vocabulary import SCHEME_NAMES
from fp8moe.cli import app
from fp8moe.config import ACTIVATIONS
from fp8moe.measured import MeasuredTable
from fp8moe.registry import BackendSpec
from tests.unit.certificates import SMALL, forged, surroundings, written
from tests.unit.timed_certificates import (
    CASES,
    RATE,
    STATE,
    forged_times,
    on_h200,
    restate,
    rounds,
    statement_in,
    timed,
    times,
    with_times,
)


def verdict_on(folder: Path) -> Verified:
    return verify(folder, editions=lambda name: SMALL)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return with_times(tmp_path / "certificate")


def test_one_with_times_holds_and_is_small(folder: Path) -> None:
    found = verdict_on(folder)
    assert (found.findings, found.verdict) == ([], "passed")
    assert found.notes == ["not signed: whoever made it is not known"]
    assert [subject["name"] for subject in statement_in(folder)["subject"]] == ["evidence.json.gz", ROUNDS, TABLE]
    assert found.certificate is not None
    assert found.certificate.times == times()
    assert sum(file.stat().st_size for file in folder.iterdir()) < 5 << 20


def test_the_command_tells_shares_and_regrets(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("conformance.certificate.verifying.verify.__defaults__", (None, lambda _name: SMALL))
    found = CliRunner().invoke(app, ["verify", str(folder)])
    assert found.exit_code == 0
    assert "\ntakes 1 of 10 schemes: block (2 of 7 activations); does not take" in found.output
    assert "\ntimes: TOY on 3 of 36 published cases: the floor is 33% to 33% of its time" in found.output
    assert "\ntimes: regret of the selected backend: median 33.3%, most 33.3%, in 3 cases" in found.output
    assert "\ntimes: absent: MARLIN, in 3 cases: its library is not installed" in found.output


def test_its_table_is_one_that_explain_reads(folder: Path) -> None:
    table = MeasuredTable.load(folder / TABLE, backends=[BackendSpec("TOY", object, None)])  # type: ignore[arg-type]
    assert {row.backend for row in table.rows} == {"TOY", "TRITON"}
    assert table.device.name == "NVIDIA H200"


def test_floors_and_regrets_are_derived(folder: Path) -> None:
    certificate = read_certificate(folder)
    found = all_judged(certificate.times, certificate.report)
    for one, case in zip(found, CASES, strict=False):
        assert one.case == case
        assert one.floor == floor_of(work_of_case(case), RATE, case.scheme)
        assert one.own is not None
        assert one.selected is not None
        assert (one.own.value, one.selected.best) == (0.0, "TOY")
        assert abs(one.selected.value - 1 / 3) < one.selected.high - one.selected.low
    assert summary(certificate.times, certificate.report) == [
        "times: TOY on 3 of 36 published cases: the floor is 33% to 33% of its time, median 33%",
        "times: TOY over the fastest: median 0.0%, most 0.0%, in 3 cases",
        "times: regret of the selected backend: median 33.3%, most 33.3%, in 3 cases",
        "times: SM clock 1830 to 1980 MHz; slower clocks: power cap in 3 cases",
        "times: absent: MARLIN, in 3 cases: its library is not installed",
    ]


def test_one_without_the_devices_state_holds_as_before(folder: Path) -> None:
    def earlier(told: dict[str, Any]) -> None:
        told["format"] = WITHOUT_STATE
        for case in told["cases"]:
            del case["state"]

    forged_times(folder, earlier)
    found = verdict_on(folder)
    assert found.findings == []
    assert found.certificate is not None
    assert not any("clock" in line for line in summary(found.certificate.times, found.certificate.report))


def test_who_else_was_there_and_what_was_not_watched_is_told() -> None:
    states = [{**STATE, "processes": 3}, {**STATE, "sm_mhz": [0, 0], "slower": [], "unwatched": "no NVML"}, STATE]
    cases = [replace(timed(number), state=state) for number, state in enumerate(states)]
    assert list(watched(replace(times(), cases=cases))) == [
        "SM clock 1830 to 1980 MHz; slower clocks: power cap in 2 cases",
        "other processes were on the device in 1 case",
        "clocks not watched in 1 case: no NVML",
    ]


def at(name: str, value: Any, number: int = 1) -> Callable[[dict[str, Any]], object]:
    return lambda told: told["cases"][number].update({name: value})


def us(name: str, value: Any) -> Callable[[dict[str, Any]], object]:
    return lambda told: told["cases"][1]["us"].update({name: value})


FLOOR = floor_of(work_of_case(CASES[1]), RATE, CASES[1].scheme).us
FORGERIES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "faster than the floor": (us("TOY", rounds(0.9 * FLOOR)), "less than the"),
    "another one faster than the floor": (us("TRITON", rounds(0.9 * FLOOR)), "TRITON took"),
    "negative": (us("TOY", [-20.0] * 16), "expected 16 times of"),
    "nothing": (us("TOY", [0] * 16), "expected 16 times of"),
    "no number": (us("TOY", ["20"] * 16), "expected 16 times of"),
    "truth": (us("TOY", [True] * 16), "expected 16 times of"),
    "fewer rounds": (us("TOY", rounds(99.0)[:15]), "expected 16 times of"),
    "more rounds": (us("TOY", [*rounds(99.0), 99.0]), "expected 16 times of"),
    "an age": (us("TOY", [1e300] * 16), "expected 16 times of"),
    "another device": (lambda told: told["device"].update(name="NVIDIA B200"), "device.name"),
    "another architecture": (lambda told: told["device"].update(architecture="sm100"), "device.architecture"),
    "another kind": (lambda told: told["device"].update(kind="rocm"), "device.kind"),
    "a device of blanks": (lambda told: told["device"].update(name=" "), "device.name"),
    "slower memory": (lambda told: told["rates"].update(bandwidth=1e12), "times: rates"),
    "a slower case left out": (lambda told: told["cases"].pop(1), "the cases are not the first of the 36"),
    "a case twice": (lambda told: told["cases"].append(told["cases"][0]), "the cases are not the first"),
    "cases in another order": (lambda told: told["cases"].reverse(), "the cases are not the first"),
    "a case of nobody's": (at("case", "v1:M=3"), "the cases are not the first"),
    "no case": (at("case", "v1:M=-1"), "the cases are not the first"),
    "no cases": (lambda told: told.update(cases=[]), "the cases are not the first"),
    "the backend left out": (lambda told: [case["us"].pop("TOY") for case in told["cases"]], "itself, which they are"),
    "the backend left out once": (lambda told: told["cases"][1]["us"].pop("TOY"), "neither a time nor a reason"),
    "the selected left out": (at("selected", "DEEPGEMM"), "which is selected, has neither"),
    "timed and absent": (at("absent", {"TRITON": "too slow"}), "TRITON: with times, and absent"),
    "absent without a reason": (at("absent", {"MARLIN": ""}), "expected a reason"),
    "a regret told": (at("regret", {"value": 0.0}), "and nothing else"),
    "a floor told": (lambda told: told.update(floor_us=1.0), "and nothing else"),
    "another format": (lambda told: told.update(format="fp8moe-rounds/3"), "expected fp8moe-rounds/2"),
    "an earlier format that had no state": (lambda told: told.update(format="fp8moe-rounds/1"), "and nothing else"),
    "no state": (lambda told: told["cases"][1].pop("state"), "and nothing else"),
    "no clocks": (at("state", {**STATE, "sm_mhz": []}), "the least and the largest"),
    "clocks of truth": (at("state", {**STATE, "sm_mhz": [True, True]}), "the least and the largest"),
    "a reason of its own": (at("state", {**STATE, "slower": ["<b>sun</b>"]}), "expected some of hardware slowdown"),
    "a reason twice": (at("state", {**STATE, "slower": ["power cap"] * 2}), "expected some of hardware slowdown"),
    "a list in the reasons": (at("state", {**STATE, "slower": [["power cap"]]}), "expected some of hardware slowdown"),
    "fewer than no processes": (at("state", {**STATE, "processes": -1}), "at least 0"),
    "no reason that is a text": (at("state", {**STATE, "unwatched": 3}), "unwatched: expected a text"),
    "a crowd": (at("us", {f"B{number}": rounds(99.0) for number in range(65)}), "at most 64 backends"),
    "a name without end": (us("x" * 501, rounds(99.0)), "at most 500 characters"),
    "a list": (at("us", []), "expected an object"),
    "too many cases": (lambda told: told.update(cases=told["cases"] * 200), "a list of at most 500"),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_a_forgery_does_not_hold(name: str, folder: Path) -> None:
    change, told = FORGERIES[name]
    forged_times(folder, change)
    found = verdict_on(folder)
    assert not found.holds
    assert any(told in finding for finding in found.findings), found.findings


def test_a_table_of_another_regret(folder: Path) -> None:
    """Its own digest, and that of the statement, are right; the rounds are not what it tells."""
    told = read_certificate(folder).times
    better = Times(TAKEN, "", told.device, told.rates, [timed(number) for number in (0, 1)])
    (folder / TABLE).write_bytes(better.files(on_h200().versions)[TABLE])
    restate(folder)
    assert verdict_on(folder).findings == [f"{TABLE}: not the table that {ROUNDS} comes to"]


@pytest.mark.parametrize("name", [ROUNDS, TABLE])
def test_a_file_that_changed_after_the_statement(name: str, folder: Path) -> None:
    (folder / name).write_bytes((folder / name).read_bytes() + b"\n")
    assert f"statement: subject: {name} changed" in verdict_on(folder).findings


@pytest.mark.parametrize("name", [ROUNDS, TABLE])
def test_a_file_that_is_missing(name: str, folder: Path) -> None:
    (folder / name).unlink()
    with pytest.raises(Malformed, match=f"{name}: No such file"):
        read_certificate(folder)
    assert not verdict_on(folder).holds


def test_a_file_too_many(folder: Path, tmp_path: Path) -> None:
    (folder / "better.json").write_text("{}")
    assert verdict_on(folder).findings == ["'better.json': in the folder, and no part of the certificate"]
    without = written(tmp_path / "without")
    (without / ROUNDS).write_bytes((folder / ROUNDS).read_bytes())
    assert verdict_on(without).findings == [f"'{ROUNDS}': in the folder, and no part of the certificate"]


def test_times_that_are_denied(folder: Path) -> None:
    """A new statement about the evidence alone, which says that none were taken; and one that still names the files."""
    forged(folder, lambda evidence: evidence.update(times={"status": NOT_TAKEN, "reason": "they were slow"}))
    assert len(verdict_on(folder).findings) == 2  # the files, which are no part of it
    restate(folder)
    assert "statement: subject: it is about other files, too" in verdict_on(folder).findings


@pytest.mark.parametrize(
    "told",
    [
        {"status": TAKEN, "reason": "some"},
        {"status": FAILED, "reason": ""},
        {"status": "good", "reason": "x"},
        {"status": NOT_TAKEN},
        {"status": NOT_TAKEN, "reason": 3},
        "taken",
    ],
)
def test_a_status_that_is_none(told: object, folder: Path) -> None:
    forged(folder, lambda evidence: evidence.update(times=told))
    with pytest.raises(Malformed, match="times"):
        read_certificate(folder)


def test_one_of_before_has_no_times_and_holds(folder: Path, tmp_path: Path) -> None:
    old = written(tmp_path / "old")
    forged(old, lambda evidence: evidence.pop("times"))
    found = verdict_on(old)
    assert found.findings == []
    assert f"times not taken: {BEFORE}" in found.notes


def test_what_failed_is_kept_with_its_reason(tmp_path: Path) -> None:
    failed = Times(FAILED, "TOY took 1 us, less than the 3 us that its bytes need by the data sheet")
    write_certificate(
        tmp_path / "c", on_h200(), SMALL.edition, surroundings() | {"device": times().device}, None, failed
    )
    found = verdict_on(tmp_path / "c")
    assert found.findings == []
    assert f"times failed: {failed.reason}" in found.notes
    assert sorted(file.name for file in (tmp_path / "c").iterdir()) == ["evidence.json.gz", "statement.dsse.json"]


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b'{"format": NaN}', b'{"a":' * 90_000, b" " * (2 << 20)])
def test_what_is_no_file_of_times(content: bytes, folder: Path) -> None:
    (folder / ROUNDS).write_bytes(content)
    with pytest.raises(Malformed, match=ROUNDS):
        read_certificate(folder)


def test_every_published_case_has_its_place_in_the_order() -> None:
    takes = dict.fromkeys(SCHEME_NAMES, ACTIVATIONS)
    every = checkpoint_cases(target_of("cuda"))
    found = planned(takes, target_of("cuda"))
    assert sorted(map(str, found)) == sorted(map(str, every))
    assert {case.tokens for case in every} == set(FIRST_TOKENS)
    assert planned({"block": ("gelu",)}, target_of("cuda")) == []
    assert all(case.scheme == "block" for case in planned({"block": ("silu",)}, target_of("cuda")))


def test_evidence_says_what_was_taken(folder: Path) -> None:
    told = json.loads((folder / ROUNDS).read_text())
    assert set(told) == {"format", "device", "rates", "cases"}
    assert "regret" not in (folder / ROUNDS).read_text()
