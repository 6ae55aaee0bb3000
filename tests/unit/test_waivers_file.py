"""The file of waivers: what it may say, and what is told where it says anything else."""

from __future__ import annotations

import time
from datetime import date
from pathlib import Path

import pytest

from conformance.cases import Case
from conformance.waivers import Waiver, WaiverError, parse_waivers, read_waivers
from conformance.waivers.file import MOST_BYTES, MOST_WAIVERS
from conformance.waivers.patterns import CasePattern, matches
from tests.unit.waiver_files import FIELDS, TODAY, Raw, written


def parsed(text: str) -> list[Waiver]:
    return list(parse_waivers(text, "acme.toml", today=TODAY).waivers)


def test_a_waiver_is_what_it_says() -> None:
    first, second = parsed(written({}, {"case": "*", "expires": Raw("2026-03-01"), "tracker": "MOE-12"}))
    assert first.told() == FIELDS
    assert (first.number, second.number) == (1, 2)
    assert second.expires == date(2026, 3, 1)
    assert (first.days_left(TODAY), second.days_left(TODAY)) == (31, 0)
    assert first.covers("computes.equivalence", Case(experts=8, top_k=8))
    assert not first.covers("computes.equivalence", Case())
    assert not first.covers("computes.relation.repeat", Case(experts=8, top_k=8))
    assert "computes.equivalence on scheme=block,k=8" in str(first)
    assert "Kernels team, https://tracker.example/12, until 2026-04-01" in str(first)


def test_one_that_has_expired_is_read() -> None:
    (waiver,) = parsed(written({"expires": "2025-01-01"}))
    assert waiver.days_left(TODAY) < 0


@pytest.mark.parametrize("tracker", ["#12", "kernels#12", "acme/kernels#12", "MOE-12", "http://t.example/a?b=1"])
def test_trackers(tracker: str) -> None:
    assert parsed(written({"tracker": tracker}))[0].tracker == tracker


def test_a_reason_of_several_lines() -> None:
    (waiver,) = parsed(written({"reason": Raw('"""one [ { \n  two # three"""""')}))
    assert waiver.reason == 'one [ { two # three""'


WRONG = [
    (written({"chek": "x"}), "acme.toml: waiver 1: unknown key 'chek'; did you mean check?"),
    (written({}, {"zzz": "x"}), "waiver 2: unknown key 'zzz'; expected check, case, backend"),
    (written({"owner": None}), "waiver 1: owner is missing: add owner = "),
    (written({"owner": 7}), "waiver 1: owner = a number: expected a string such as"),
    (written({"owner": True}), "owner = true: expected a string"),
    (written({"owner": ["a"]}), "owner = a list: expected a string"),
    (written({"owner": Raw("{a = 1}")}), "owner = a table: expected a string"),
    (written({"owner": Raw("12:30:00")}), "owner = a time: expected a string"),
    (written({"owner": "  "}), "owner = '  ': expected a text such as"),
    (written({"owner": "a\x1b[2J"}), r"owner = 'a\x1b[2J': it has characters that cannot be printed"),
    (written({"reason": "x" * 1001}), "1001 characters, at most 1000: shorten it"),
    (written({"device": "x" * 201}), "201 characters, at most 200"),
    (written({"check": "computes.equivalance"}), "no check of a case is named so; did you mean computes.equivalence?"),
    (written({"check": "computes.fingerprint"}), "check = 'computes.fingerprint': no check of a case is named so"),
    (written({"check": "performs.*"}), "check = 'performs.*': no check of a case is named so; expected one of"),
    (written({"case": "scheme=blok"}), "case = 'scheme=blok': case scheme='blok': expected one of block"),
    (written({"case": "scheme=blok"}), "did you mean block?"),
    (written({"case": "shceme=block"}), "did you mean scheme?"),
    (written({"case": "scheme"}), "case scheme='': expected scheme=VALUE"),
    (written({"case": "k=2,top_k=2"}), "case top_k='2': expected top_k once"),
    (written({"case": "M=many"}), "case tokens='many': expected an integer of at least 0"),
    (written({"case": "ep=4"}), "case ep='4': expected size:rank"),
    (written({"case": "model=deepseek"}), "case model='deepseek': expected"),
    (written({"case": "bias=yes"}), "case bias='yes': expected on or off"),
    (written({"case": "v1:M=16,scheme=blok"}), "case scheme='blok': expected one of"),
    (written({"case": "block"}), 'expected an id that starts with "v1:", "*", or keys of'),
    (written({"backend_version": "1.2"}), "backend_version = '1.2': expected a range of versions such as"),
    (written({"backend_version": "any"}), "expected a range of versions such as"),
    (written({"tracker": "later"}), "tracker = 'later': expected a URL, or an issue such as"),
    (written({"tracker": "https://"}), "tracker = 'https://': expected a URL"),
    (written({"tracker": "https://[1"}), "tracker = 'https://[1': expected a URL"),
    (written({"tracker": "javascript:alert(1)"}), "expected a URL"),
    (written({"expires": "2026-13-01"}), "expires = '2026-13-01': expected a day such as 2026-03-01"),
    (written({"expires": "soon"}), "expires = 'soon': expected a day such as 2026-03-01, at the latest 2026-08-28"),
    (written({"expires": 20260401}), "expires = a number: expected a day"),
    (written({"expires": Raw("2026-04-01T00:00:00Z")}), "expected a day such as"),
    (written({"expires": "2026-08-29"}), "expires = '2026-08-29': 181 days from today, at most 180: 2026-08-28"),
    (written({}, {"reason": "again"}), "waiver 2: covers the same as waiver 1 (check='computes.equivalence'"),
    ("[[waivers]]\n", "acme.toml: unknown key 'waivers'; did you mean waiver?; every waiver begins with [[waiver]]"),
    ("[waiver]\n", "acme.toml: waiver is a table: expected tables that begin with [[waiver]]"),
    ("waiver = [1]\n", "acme.toml: waiver is a list: expected tables"),
    ("", "acme.toml: no [[waiver]] in it"),
    ("[[waiver]]\ncheck = \n", "acme.toml: no TOML (Invalid value (at line 2"),
    ("[[waiver]]\ncheck = 1\ncheck = 2", "acme.toml: no TOML (Cannot overwrite a value"),
    ("[[waiver]]\n\nx = [[[[[[1]]]]]]\n", "acme.toml: line 3: more than 4 brackets within each other"),
    ("a = " + "1" * 5000, "acme.toml: line 1 has 5004 characters, at most 4096"),
    (
        written(*({"owner": str(n), "case": f"seed={n}"} for n in range(MOST_WAIVERS + 1))),
        "1,001 waivers, at most",
    ),
    ("#" * (MOST_BYTES + 1), "acme.toml: more than 1 MiB: write a smaller file"),
]


@pytest.mark.parametrize(("text", "words"), WRONG, ids=[words for _, words in WRONG])
def test_what_is_wrong_is_told(text: str, words: str) -> None:
    with pytest.raises(WaiverError) as caught:
        parsed(text)
    assert words in str(caught.value)
    assert len(str(caught.value)) < 1200
    assert str(caught.value).isprintable()


def test_the_last_day_that_a_waiver_may_expire_on() -> None:
    assert parsed(written({"expires": "2026-08-28"}))[0].days_left(TODAY) == 180


@pytest.mark.parametrize(
    "text",
    [
        "a = " + "[" * 4000 + "]" * 90,
        "\n".join(["a = ["] + ["[ # ]"] * 100_000),
        'a = [ \'\'\'x\'\'\'\'\', [ """y""""", [ "z]]]]", [ 1, [ 2',
        "\n".join(".".join("a" * 2000) + " = 1" for _ in range(200)),
        "a" + ".a" * 2000 + " = 1",
        'a = """' + '\\"""\n' * 100_000,
        "a = '''" + "'' '\n" * 100_000,
        "a = " + "9" * 4000,
        "a = 0x" + "f" * 4000,
        "a" * 4000 + " = 1",
        "[[waiver]]\n" * 90_000,
        '"' * 1_000_000,
    ],
    ids=lambda text: ascii(text[:12]),
)
def test_a_file_that_is_meant_to_hurt(text: str) -> None:
    started = time.process_time()
    with pytest.raises(WaiverError) as caught:
        parsed(text)
    assert time.process_time() - started < 20
    assert len(str(caught.value)) < 1200


def test_a_file_on_a_disk(tmp_path: Path) -> None:
    path = tmp_path / "w.toml"
    path.write_text(written({}))
    assert read_waivers(path, today=TODAY).waivers[0].owner == "Kernels team"
    path.write_bytes(b'[[waiver]]\nowner = "\xff"')
    with pytest.raises(WaiverError, match=r"w.toml: byte 20 is not UTF-8"):
        read_waivers(path)
    path.write_bytes(b"#" * (MOST_BYTES + 1))
    with pytest.raises(WaiverError, match=r"w.toml: more than 1 MiB"):
        read_waivers(path)
    with pytest.raises(OSError, match="No such file"):
        read_waivers(tmp_path / "other.toml")


@pytest.mark.parametrize(
    ("pattern", "text", "found"),
    [
        ("abc", "abc", True),
        ("abc", "abcd", False),
        ("*", "", True),
        ("ab*", "ab", True),
        ("*bc", "abc", True),
        ("a*a", "a", False),
        ("a*b*c", "a-b-b-c", True),
        ("a*b*c", "a-c-b", False),
        ("a**c", "ac", True),
        ("a.c", "abc", False),
        ("a[b]?", "ab", False),
        ("*a" * 100, "a" * 99, False),
    ],
)
def test_text_with_stars(pattern: str, text: str, found: bool) -> None:
    assert matches(pattern, text) is found


@pytest.mark.parametrize(
    ("pattern", "case", "found"),
    [
        ("*", "v1:M=16", True),
        ("v1:M=16", "v1:M=16,seed=0", True),
        ("v1:M=16", "v1:M=16,seed=1", False),
        ("v1:seed=1,M=16", "v1:M=16,seed=1", True),
        ("scheme=block", "v1:M=1,law=skewed", True),
        ("law=skewed, M=1", "v1:M=1,law=skewed", True),
        ("law=skewed,M=2", "v1:M=1,law=skewed", False),
        ("top_k=2", "v1:M=1", True),
        ("bias=off", "v1:M=1", True),
        ("bias=on", "v1:M=1", False),
        ("ep=4/1", "v1:M=1,ep=4:1", True),
        ("ep=1:0", "v1:M=1", True),
        ("model=deepseek-v3", "v1:model=deepseek-v3:tp8,M=1", True),
        ("model=deepseek-v3:tp8", "v1:model=deepseek-v3:tp8,M=1", True),
        ("model=deepseek-v3:tp4", "v1:model=deepseek-v3:tp8,M=1", False),
        ("model=deepseek-v3", "v1:M=1", False),
    ],
)
def test_cases(pattern: str, case: str, found: bool) -> None:
    assert CasePattern.parse(pattern).holds(Case.parse(case)) is found
