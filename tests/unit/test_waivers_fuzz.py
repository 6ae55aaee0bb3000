"""Whatever a file of waivers holds: it is read, or refused by the one error of its own."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from hypothesis import example, given, settings
from hypothesis import strategies as st

from conformance.cases import InvalidCase
from conformance.waivers import WaiverError, parse_waivers, read_waivers
from conformance.waivers.patterns import CasePattern, matches
from tests.unit.waiver_files import FIELDS, TODAY, Raw, written

VALID = written({}, {"case": "v1:M=16,scheme=channel_tok", "owner": "GEMM team", "expires": Raw("2026-04-01")})
TOKENS = (
    *"[]{}=,.\"'#\n\\\x00é\u202e",
    *('"""', "'''", "[[waiver]]", "[waiver]", "\\u0000", "inf", "nan", "1e999", "0xff", "true", "1979-05-27T07:32:00Z"),
    *FIELDS,
    *FIELDS.values(),
)
JUNK = st.one_of(st.sampled_from(TOKENS), st.text(max_size=5), st.just("[" * 60), st.just("a." * 60))


def is_told(text: str) -> None:
    error = ""
    try:
        found = parse_waivers(text, "w.toml", today=TODAY)
    except WaiverError as refused:
        error = str(refused)
    if error:
        assert error.startswith("w.toml: ")
        assert error.isprintable()
        assert len(error) < 1500
        return
    assert found.waivers
    for waiver in found.waivers:
        assert all(isinstance(value, str) and value.isprintable() for value in waiver.told().values())
        assert waiver.days_left(TODAY) <= 180
        again = written({**waiver.told()})
        assert parse_waivers(again, today=TODAY).waivers[0].told() == waiver.told()


@given(st.one_of(st.text(), st.lists(JUNK).map("".join)))
@example('"' * 3)
@settings(max_examples=400, deadline=None)
def test_any_text(text: str) -> None:
    is_told(text)


@given(st.lists(st.tuples(st.integers(0, len(VALID)), st.integers(0, 20), JUNK), min_size=1, max_size=4))
@settings(max_examples=600, deadline=None)
def test_a_file_with_mistakes(edits: list[tuple[int, int, str]]) -> None:
    text = VALID
    for at, gone, junk in edits:
        text = text[:at] + junk + text[at + gone :]
    is_told(text)


VALUES = st.recursive(
    st.one_of(
        st.text(max_size=300),
        st.integers(),
        st.booleans(),
        st.sampled_from(
            [Raw("nan"), Raw("-inf"), Raw("12:00:00"), Raw("2026-04-01"), Raw("1979-05-27T07:32:00-07:00")]
        ),
        st.sampled_from(list(FIELDS.values())),
    ),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=5,
)


@given(st.lists(st.dictionaries(st.sampled_from([*FIELDS, "chek"]), VALUES, max_size=3), max_size=4))
@settings(max_examples=400, deadline=None)
def test_a_file_with_other_values(waivers: list[dict[str, object]]) -> None:
    is_told(written(*waivers))


@given(st.binary(max_size=200), st.integers(0, len(VALID)))
@settings(max_examples=200, deadline=None)
def test_any_bytes(content: bytes, at: int) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "w.toml"
        path.write_bytes(VALID.encode()[:at] + content + VALID.encode()[at:])
        error = str(path)
        try:
            assert read_waivers(path, today=TODAY).waivers
        except WaiverError as refused:
            error = str(refused)
        assert error.startswith(str(path))


PIECES = (*"=,*:/ ", "v1:", "k", "8", "ep", "4:1", "model", "deepseek-v3", "scheme", "block")


@given(st.one_of(st.text(), st.lists(st.sampled_from(PIECES)).map("".join)))
@settings(max_examples=400, deadline=None)
def test_any_case_pattern(text: str) -> None:
    try:
        found = CasePattern.parse(text)
    except InvalidCase:
        return
    assert found == CasePattern.parse(text)


@given(st.text("ab*", max_size=8), st.text("ab", max_size=8))
def test_stars_are_what_a_plain_search_says(pattern: str, text: str) -> None:
    def found(pattern: str, text: str) -> bool:
        if not pattern:
            return not text
        if pattern[0] == "*":
            return any(found(pattern[1:], text[start:]) for start in range(len(text) + 1))
        return bool(text) and text[0] == pattern[0] and found(pattern[1:], text[1:])

    assert matches(pattern, text) is found(pattern, text)
