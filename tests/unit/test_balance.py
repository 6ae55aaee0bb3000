"""Shards that take about as long: by the durations in kept reports, whatever the order in which cases are given."""

from __future__ import annotations

import random
import re
from functools import cache
from pathlib import Path

import pytest

from conformance.balance import balance_of, main, read_report
from conformance.cases import Case
from conformance.certificate.statement import EVIDENCE
from conformance.editions import EVERYTHING, target_of
from conformance.kept_text import read_text
from conformance.levels import Item, items_for
from conformance.remaining import Remaining
from conformance.shards import OF_A_CASE_ON_GPU, Shard, cost, dealt
from tests.unit.certificates import invented

REPORTS = Path(__file__).parents[2] / "reports"
LEAST = 0.85
"""Of eight shards."""


OURS = ("TRITON", "TorchExperts")
"""Backends that no kernel library is loaded or compiled for: that, the first cases of each process wait for."""


def is_told(path: Path) -> bool:
    """Whether it is a whole run of one of `OURS`, with durations."""
    head, _, checks = read_text(path).partition('"checks"')
    backend = re.search(r'"backend":\s*"(\w+)"', head)
    return backend is not None and backend[1] in OURS and '"seconds"' in checks


KEPT = [path.parent if path.name == EVIDENCE else path for path in sorted(REPORTS.rglob("*.json.gz")) if is_told(path)]


@cache
def certified() -> list[Item]:
    """The cases of a certificate of everything."""
    return items_for("certify", EVERYTHING, target_of("cuda"), 0, fnuz=False)


def test_there_are_durations() -> None:
    assert KEPT


@pytest.mark.parametrize("path", KEPT, ids=lambda path: path.name)
def test_eight_shards_take_about_as_long(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = balance_of(read_report(path), 8)
    assert found.checks > 1000
    assert found.efficiency >= LEAST
    main([str(path)])
    told = re.search(r" 8 shards: the longest ([0-9.]+) s, efficiency ([0-9.]+)%", capsys.readouterr().out)
    assert told
    assert (told[1], told[2]) == (f"{max(found.seconds):.1f}", f"{100 * found.efficiency:.1f}")


@pytest.mark.parametrize("count", [1, 2, 5, 8, 64])
def test_the_cases_alone_decide(count: int) -> None:
    items = certified()
    pieces = dealt(items, count)
    assert sorted(item.key for piece in pieces for item in piece) == sorted(item.key for item in items)
    places = {item.key: number for number, item in enumerate(items)}
    for piece in pieces:
        assert [places[item.key] for item in piece] == sorted(places[item.key] for item in piece)
    shuffled = random.Random(count).sample(items, len(items))
    for again, piece in zip(dealt(shuffled, count), pieces, strict=True):
        assert {item.key for item in again} == {item.key for item in piece}
    for number in range(1, count + 1, max(1, count // 8)):
        assert Shard(number, count).of(items) == pieces[number - 1]


def test_long_prefills_are_spread() -> None:
    """Every fifth case of the published models has the most tokens."""
    items = certified()
    longest = max(item.case.tokens for item in items)
    shares = [sum(item.case.tokens == longest for item in piece) for piece in dealt(items, 5)]
    assert max(shares) - min(shares) < sum(shares) / 4
    loads = [sum(cost(item.case) for item in piece) for piece in dealt(items, 5)]
    assert max(loads) < 1.01 * min(loads)


@pytest.mark.parametrize("name", ["TRITON", "DEEPGEMM", "VLLM_CUTLASS", "MARLIN"])
def test_what_is_left_on_a_gpu_is_told_in_its_order_of_magnitude(name: str) -> None:
    """From a tenth of a run's checks to half of them, by its durations. With small cases at a CPU's cost it was up to a
    hundred times too long."""
    checks = read_report(REPORTS / f"h200/2026-11-30-order/certify_{name}.json.gz").checks
    took = [(Case.parse(check.case), check.seconds) for check in checks if check.case and check.seconds is not None]
    now = 0.0
    remaining = Remaining((("", cost(case, OF_A_CASE_ON_GPU)) for case, _ in took), lambda: now)
    whole, told = sum(seconds for _, seconds in took), []
    for case, seconds in took:
        now += seconds
        remaining.ran("", cost(case, OF_A_CASE_ON_GPU))
        told.append((remaining.seconds or 0.0) / max(whole - now, 1e-9))
    tenth = len(took) // 10
    for number in (tenth, 2 * tenth, 3 * tenth, 5 * tenth):
        assert 0.1 < told[number] < 10, (number, told[number])


def test_what_costs_more() -> None:
    small = Case.parse("v1:E=4,M=17")
    for larger in ("v1:E=8,M=17", "v1:E=4,M=18", "v1:E=4,H=512,M=17", "v1:E=4,I=512,M=17", "v1:E=4,k=4,M=17"):
        assert cost(Case.parse(larger)) > cost(small)
    for smaller in ("v1:E=4,M=17,ep=2:1", "v1:E=4,M=17,act=relu2_no_mul"):
        assert cost(Case.parse(smaller)) < cost(small)


def test_a_report_without_durations(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "report.json"
    path.write_text(invented().to_json())
    with pytest.raises(SystemExit):
        main([str(path)])
    assert "no check of this report has a duration" in capsys.readouterr().err
