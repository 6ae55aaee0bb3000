"""Numbers of things in words: one of them has no s, wherever it is told."""

import re
from pathlib import Path

import pytest

import conformance
import fp8moe
from fp8moe.counted import counted

CODE = [Path(package.__file__).parent for package in (fp8moe, conformance)]
NOUNS = "case|cell|day|failure|finding|pair|result|run|shard|token|waiver"
WRITTEN = re.compile(rf"\{{len\([^{{}}]*\)(?::,)?\}} (?:{NOUNS})s\b")


@pytest.mark.parametrize(("count", "told"), [(0, "0 cases"), (1, "1 case"), (2, "2 cases"), (1664, "1,664 cases")])
def test_one_has_no_s(count: int, told: str) -> None:
    assert counted(count, "case") == told


def test_nothing_that_is_counted_is_told_otherwise() -> None:
    """A length in a text, with its noun beside it."""
    found = [
        f"{path.name}: {match}"
        for folder in CODE
        for path in folder.rglob("*.py")
        for match in WRITTEN.findall(path.read_text(encoding="utf-8"))
    ]
    assert found == []
