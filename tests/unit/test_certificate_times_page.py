"""Times on a certificate's page: derived figures, a bar for each beside its words, and nothing of it becomes markup."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from conformance.cases import Case
from conformance.certificate.page import comparison, page
from conformance.certificate.times.kept import BEFORE, FAILED, NOT_TAKEN, TAKEN, TimedCase, Times
from conformance.certificate.verifying import Verified, verify
from tests.unit.certificates import SMALL
from tests.unit.gate_runs import HOSTILE
from tests.unit.test_certificate_page import held, unharmed
from tests.unit.timed_certificates import CASES, H200, on_h200, rounds, timed, times, with_times


def of(kept: Times) -> Verified:
    """As if it had been read and verified."""
    found = held(on_h200())
    assert found.certificate is not None
    return replace(found, certificate=replace(found.certificate, times=kept))


def row(text: str, head: str | Case) -> list[str]:
    """The texts of one row, and of its bars their lengths."""
    if isinstance(head, Case):
        head = f"{head.model}, {head.scheme}, {head.tokens} tokens"
    (inner,) = re.findall(rf'<tr><th scope="row">{re.escape(head)}</th>(.*)</tr>', text)
    cells = re.findall(r"<td[^>]*>(.*?)</td>", inner)
    return [re.sub(r' ?<svg.*width="([\d.]+)" height="8"/></svg>', r" |\1", cell) for cell in cells]


def test_a_case_has_its_floor_share_and_regrets(tmp_path: Path) -> None:
    text = page(verify(with_times(tmp_path / "certificate"), editions=lambda _name: SMALL))
    shown = unharmed(text)
    floor, took, share, over, regret, others = row(text, CASES[0])
    assert (floor, took, share) == ("9.452, by bytes", "28.37", "33.3% |33.3")
    assert (over, others) == ("the fastest |0.0", "TRITON 37.83")
    assert re.fullmatch(r"TRITON: 33\.3% \(3[\d.]+% to 3[\d.]+%\) over TOY \|33\.3", regret)
    said = " ".join(shown.texts)
    assert "TOY on 3 of 36 published cases: the floor is 33% to 33% of its time, median 33%" in said
    assert "regret of the selected backend: median 33.3%, most 33.3%, in 3 cases" in said
    assert row(text, "MARLIN") == ["its library is not installed", "3"]
    assert shown.tags.count("svg") == 1 + 3 * 3
    assert text.count('aria-hidden="true"') == 3 * 3  # the words beside a bar say the same
    assert "are not part" not in text


@pytest.mark.parametrize(
    ("kept", "told"),
    [
        (Times(), f"Times and regret are not part of this certificate: {BEFORE}."),
        (Times(NOT_TAKEN, "of a <cpu> device"), "not part of this certificate: of a &lt;cpu&gt; device."),
        (Times(FAILED, "TOY took 1 us"), '<p class="is-failed">Times were not taken to their end: TOY took 1 us.</p>'),
        (replace(times(1), device=H200 | {"name": "another"}), "none of them is of a case that is known here"),
    ],
)
def test_why_there_are_none(kept: Times, told: str) -> None:
    text = page(of(kept))
    unharmed(text)
    assert told in text
    assert told.removeprefix('<p class="is-failed">').removesuffix("</p>") in comparison(of(kept), of(times()))


def test_one_that_is_slower_alone_or_not_timed() -> None:
    first, second, third = timed(0), timed(1), timed(2)
    first = replace(first, us=first.us | {"TOY": [3 * us for us in first.us["TOY"]]})
    second = replace(second, us={"TOY": second.us["TOY"]}, selected="")
    third = replace(third, us={"TRITON": third.us["TRITON"]}, absent={"TOY": "it raised <RuntimeError>"})
    text = page(of(replace(times(), cases=[first, second, third])))
    unharmed(text)
    slower, alone, absent = (row(text, case) for case in CASES[:3])
    assert slower[3].startswith("125.0% (12")
    assert slower[3].endswith("over TRITON |100.0")
    assert slower[4] == "TRITON: the fastest |0.0"
    assert alone[3:] == ["alone here |0.0", "nothing: -", "-"]
    assert absent[1:4] == ["no time", "-", "-"]
    assert row(text, "TOY") == ["it raised &lt;RuntimeError&gt;", "1"]


def test_two_side_by_side() -> None:
    slower = replace(times(2), cases=[replace(one, us={"TOY": rounds(500.0)}) for one in times(2).cases])
    text = comparison(of(times()), of(slower))
    unharmed(text)
    assert row(text, CASES[0]) == [
        "28.37",
        "33.3% |33.3",
        "the fastest |0.0",
        "500.3",
        "1.9% |1.9",
        "alone here |0.0",
    ]
    assert row(text, CASES[2])[3:] == ["not timed", "-", "-"]
    assert text.count("TOY on 3 of 36 published cases") == text.count("TOY on 2 of 36 published cases") == 1
    neither = comparison(of(Times()), of(Times()))
    assert neither.count("not part of this certificate") == 2
    assert "floor over time" not in neither


def hostile(name: str, count: int, others: int) -> Verified:
    """With this name for everything that a certificate names."""
    long = f"{name}{'<&' * 250}"[:500]
    crowd = {f"{number}{long}"[:500]: rounds(1e5) for number in range(others)}
    cases = [
        TimedCase(one.case, long, one.us | crowd | {long: rounds(1e4)}, {long: f"{long}{one.case}"})
        for one in times(count).cases
    ]
    return of(Times(TAKEN, "", H200, times(count).rates, cases))


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_times_stay_text(name: str) -> None:
    found = hostile(name, 2, 3)
    unharmed(page(found))
    unharmed(comparison(found, found))
    unharmed(page(of(Times(FAILED, name))))
    unharmed(page(of(replace(times(1), cases=[TimedCase(name, name, {name: rounds(1.0)}, {})]))))


def test_as_many_as_may_be_are_still_a_page() -> None:
    found = hostile("<&", len(CASES), 61)
    shown = unharmed(page(found))
    assert "more rows, in the certificate's evidence" in " ".join(shown.texts)
    unharmed(comparison(found, found))
