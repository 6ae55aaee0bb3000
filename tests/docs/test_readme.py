"""Every Python block of the README runs as it stands, each in an interpreter of its own."""

import os
import re
import subprocess
import sys
from datetime import date
from pathlib import Path

import pytest

from conformance.waivers import parse_waivers

README = Path(__file__).parents[2] / "README.md"


def python_blocks(text: str) -> list[tuple[int, str]]:
    """The ```python blocks of a Markdown text, each with the number of its first line."""
    blocks = re.finditer(r"^```python[ \t]*\n(.*?)^```[ \t]*$", text, re.MULTILINE | re.DOTALL)
    return [(text.count("\n", 0, block.start(1)) + 1, block[1]) for block in blocks]


BLOCKS = python_blocks(README.read_text(encoding="utf-8"))


def test_readme_has_examples() -> None:
    """An empty list would make the test below pass without running anything."""
    assert BLOCKS


def test_the_waiver_is_one() -> None:
    (block,) = re.findall(r"^```toml\n(\[\[waiver\]\].*?)^```", README.read_text(encoding="utf-8"), re.M | re.S)
    assert len(parse_waivers(block, today=date(2026, 11, 29)).waivers) == 1


@pytest.mark.parametrize(("line", "code"), BLOCKS, ids=[f"line{line}" for line, _ in BLOCKS])
def test_example_runs(line: int, code: str) -> None:
    # A process each: an example may register a backend, which must not reach the tests that run after it.
    path = os.pathsep.join(entry for entry in sys.path if entry)
    # No variable of the caller's may decide which backend an example selects.
    env = {name: value for name, value in os.environ.items() if not name.startswith("VLLM_")}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env | {"PYTHONPATH": path}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"README.md, block at line {line}:\n{done.stdout}{done.stderr}"
