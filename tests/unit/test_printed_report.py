"""What `fp8moe check` prints of a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest

from conformance.axes import Space
from conformance.cases import Case
from conformance.hangs import IT_HANGS
from conformance.left import cases_left, left_reason
from conformance.matrix import BY_BITS, BY_BOUND, EQUIVALENCE
from conformance.relations.telling import PREFIX
from conformance.report import FAILED, Report
from conformance.results import CheckResult, Status
from conformance.smaller import PLAIN_FAILS
from fp8moe.commands.check import print_report, tell_hanging
from fp8moe.commands.failures import ALIKE_SHOWN, REASONS_SHOWN
from tests.unit.certificates import invented


def test_a_failure_tells_the_case_that_it_was_found_as(capsys: pytest.CaptureFixture[str]) -> None:
    report = invented(failing=1)
    failure = next(check for check in report.checks if check.status is Status.FAILED)
    print_report(replace(report, unshrunk={f"{failure.check} {failure.case}": "v1:M=999"}))
    told = capsys.readouterr().out.splitlines()
    at = next(number for number, line in enumerate(told) if line.startswith(f"FAILED {failure.check}"))
    assert told[at + 1 : at + 3] == ["  E1 = 3 > 1", "  found as: v1:M=999"]


def test_one_that_is_as_it_was_found_tells_none(capsys: pytest.CaptureFixture[str]) -> None:
    print_report(invented(failing=1))
    assert "found as" not in capsys.readouterr().out


def test_what_is_covered_before_any_case_that_is_for_it(capsys: pytest.CaptureFixture[str]) -> None:
    """As 0.00% it would read as if what has run had told nothing."""
    report = replace(invented(), coverage=("9% of 99 pairs of values",))
    print_report(report)
    assert "covered: 9% of 99 pairs of values of " in capsys.readouterr().out
    space = Space(report.takes, fnuz=report.fnuz)
    pinned = [check for check in report.checks if check.case and space.row(Case.parse(check.case)) is None]
    assert pinned
    print_report(replace(report, checks=pinned))
    told = capsys.readouterr().out
    assert "covered: nothing so far, since none of the cases that are for it has passed" in told
    assert "pairs of values of " not in told


def failing(reasons: Sequence[str], status: Status = Status.FAILED) -> Report:
    """A report in which the first cases have these reasons."""
    report = invented()
    with_case = [number for number, check in enumerate(report.checks) if check.case]
    checks = list(report.checks)
    for number, reason in zip(with_case, reasons, strict=False):
        one = checks[number]
        checks[number] = replace(one, status=status, reason=reason, reproduce=f"run {one.check} {one.case}")
    return replace(report, checks=checks)


def lines(report: Report, capsys: pytest.CaptureFixture[str]) -> list[str]:
    print_report(report)
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(("status", "word"), [(Status.FAILED, "FAILED"), (Status.WAIVED, "WAIVED")])
def test_equal_reasons_are_told_once(status: Status, word: str, capsys: pytest.CaptureFixture[str]) -> None:
    report = failing(["its constructor raised KeyError: 'w'"] * 29 + ["E1 = 3 > 1"], status)
    told = lines(report, capsys)
    mine = [check for check in report.checks if check.status is status]
    at = [number for number, line in enumerate(told) if line.startswith(word)]
    assert len(at) == 2
    names = [f"{check.check} {check.case}" for check in mine]
    named = ", ".join(name.removeprefix("computes.") for name in names[1 : 1 + ALIKE_SHOWN])
    assert told[at[0] : at[0] + 4] == [
        f"{word} {names[0]}",
        "  its constructor raised KeyError: 'w'",
        f"  reproduce: run {names[0]}",
        f"  and 28 more with the same reason: {named} and {28 - ALIKE_SHOWN} more, in the report",
    ]
    assert told[at[1] : at[1] + 3] == [f"{word} {names[29]}", "  E1 = 3 > 1", f"  reproduce: run {names[29]}"]
    assert not told[at[1] + 3].startswith("  and")
    assert len([check for check in Report.from_json(report.to_json()).checks if check.status is status]) == 30


def test_the_one_in_full_can_be_run_again(capsys: pytest.CaptureFixture[str]) -> None:
    report = failing(["it died"])
    first = CheckResult("computes", "computes.fingerprint", Status.FAILED, "TOY", reason="it died")
    told = lines(replace(report, checks=[first, *report.checks]), capsys)
    at = next(number for number, line in enumerate(told) if line.startswith("FAILED"))
    assert told[at + 2].startswith("  reproduce: run computes.equivalence")
    assert told[at + 3] == "  and 1 more with the same reason: fingerprint"


def relations(*names: str, scheme: str = "block") -> list[CheckResult]:
    """That fail where a plain call does."""
    told = (Status.FAILED, "TOY", scheme, "v1:M=16")
    return [
        CheckResult("computes", f"{PREFIX}{name}", *told, reason=f"{name}: E1 = 3; {PLAIN_FAILS}") for name in names
    ]


def test_relations_that_fail_where_a_plain_call_does_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    report = failing(["E1 = 3 > 1"])
    report = replace(report, checks=[*report.checks, *relations("chunks", "reload", "chunks")])
    told = lines(report, capsys)
    at = next(number for number, line in enumerate(told) if line.startswith("FAILED 2"))
    assert told[at : at + 2] == [
        "FAILED 2 relations too, on cases that a plain call fails on: chunks, reload",
        "  each is in the report",
    ]
    assert sum(line.startswith("FAILED") for line in told) == 2
    assert len(Report.from_json(report.to_json()).failures) == 4
    assert report.verdict == FAILED
    print_report(report, None)
    told = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("FAILED") for line in told) == 3  # two of one reason are told once
    assert f"  chunks: E1 = 3; {PLAIN_FAILS}" in told


@pytest.mark.parametrize("scheme", ["", "none"])
def test_they_are_told_where_no_equivalence_of_their_scheme_is(scheme: str, capsys: pytest.CaptureFixture[str]) -> None:
    report = failing(["E1 = 3 > 1"] if scheme else [])
    report = replace(report, checks=[*report.checks, *relations("chunks", scheme=scheme or "block")])
    told = lines(report, capsys)
    assert f"FAILED {PREFIX}chunks v1:M=16" in told
    assert not any("a plain call fails" in line for line in told)


def test_reasons_that_are_many_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    told = lines(failing([f"reason {number // 2}" for number in range(2 * REASONS_SHOWN + 6)]), capsys)
    assert sum(line.startswith("FAILED") for line in told) == REASONS_SHOWN
    assert "and 6 more failed, for 3 other reasons, in the report" in told


def stopped(whys: Mapping[str, int]) -> Report:
    report = invented()
    left = [
        CheckResult("computes", f"computes.{name}", Status.NOT_RUN, "TOY", "block", reason=left_reason(why, count, "x"))
        for why, count in whys.items()
        for name in ("a", "b")
    ]
    return replace(report, checks=[*report.checks, *left])


def test_what_was_not_run_is_counted_by_why(capsys: pytest.CaptureFixture[str]) -> None:
    whys = {"it failed before": 3, f"{IT_HANGS}: 3 of the cases did not end": 1200}
    report = stopped(whys)
    assert cases_left(report.checks) == {why: 2 * count for why, count in whys.items()}
    told = [line for line in lines(report, capsys) if line.startswith("not run") and "performs" not in line]
    assert told == [f"not run: {2 * count:,} cases: {why}" for why, count in whys.items()]
    tell_hanging(report, "do this.")
    assert capsys.readouterr().err == (
        "gave up: it hangs: 3 of the cases did not end; not run: 2,400 cases. Where it is slow and does not hang, "
        "do this.\n"
    )
    tell_hanging(stopped({"it failed before": 3}), "do this.")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("report", "told"),
    [
        (stopped({"not of shard 3/8": 9}), "shard 3/8: done, {passed} cases passed"),
        (failing(["E1 = 3 > 1"] * 2), "shard 3/8: done, {passed} cases passed, 2 failed"),
        (failing(["waived"], Status.WAIVED), "shard 3/8: done, {passed} cases passed, 1 waived"),
        (stopped({"the budget of 5 s was spent": 9}), "shard 3/8: not at its end, {passed} cases passed"),
    ],
)
def test_a_shard_says_what_was_done(report: Report, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    passed = sum(bool(check.case) and check.status is Status.PASSED for check in report.checks)
    assert lines(replace(report, shard="3/8"), capsys)[-1] == told.format(passed=passed)


def test_why_bits_are_not_compared_is_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    report = invented()
    why = "its steps around the matrix unit are not declared"
    first = next(check for check in report.checks if check.check == EQUIVALENCE)
    by_bound = [replace(first, case=f"v1:M={tokens}", judged_by=f"{BY_BOUND}{why}") for tokens in (91, 92)]
    by_bits = replace(first, case="v1:M=93", judged_by=BY_BITS)
    others = [check for check in report.checks if check.check != EQUIVALENCE]
    told = lines(replace(report, checks=(*others, *by_bound, by_bits)), capsys)
    assert [line for line in told if "judged by" in line] == [f"judged by the bound: 2 cases: {why}"]
