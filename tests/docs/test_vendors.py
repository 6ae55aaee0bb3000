"""The tutorial for vendors: each of its commands, in its order, in a new environment and an empty folder."""

from __future__ import annotations

import os
import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.vendors.environment import CHECKOUT, Environment

pytest.importorskip("hatchling", reason="wheels are built with hatchling, of the extra `test`")
pytest.importorskip("pip", reason="wheels are built and installed by pip")

TUTORIAL = CHECKOUT / "docs/vendors.md"
KERNELS = CHECKOUT / "tests/vendors/toy-vendor/toy_vendor/kernels.py"
SLOW = "FP8MOE_SLOW"
BLOCK = re.compile(
    r"^(?:<!-- (?P<note>[^\n]+) -->\n)?```(?P<kind>sh|python)\n(?P<text>.*?)^```\n(?:\n```\n(?P<shown>.*?)^```\n)?",
    re.MULTILINE | re.DOTALL,
)
"""A block, the note above it, and the output below it."""


@dataclass(frozen=True)
class Step:
    """A block of the tutorial: of shell, with the output shown for it, or of Python with a note where it goes."""

    line: int
    kind: str
    note: str
    text: str
    shown: str

    @property
    def status(self) -> int:
        """The exit status that the tutorial tells its reader."""
        found = re.fullmatch(r"exit status: (\d+)", self.note)
        return int(found[1]) if found else 0


def steps() -> list[Step]:
    text = TUTORIAL.read_text(encoding="utf-8")
    return [
        Step(
            text.count("\n", 0, found.start("text")) + 1,
            found["kind"],
            found["note"] or "",
            found["text"],
            found["shown"] or "",
        )
        for found in BLOCK.finditer(text)
    ]


STEPS = steps()
FAST = [step for step in STEPS if step.note != "slow"]
LONG = [step for step in STEPS if step.note == "slow"]


class Reader:
    """Somebody who does what the tutorial says, from the folder in which it is left."""

    def __init__(self, folder: Path) -> None:
        self.environment = Environment(folder / "environment", CHECKOUT)
        self.environment.plain_pip()
        self.folder = folder / "empty"
        self.folder.mkdir()

    def follow(self, step: Step) -> None:
        if step.kind == "sh":
            note = self.environment.bin / "folder"
            script = f"trap 'pwd > {note}' EXIT\n{step.text}"
            ended = self.environment.run(script, self.folder, status=step.status)
            self.folder = Path(note.read_text().strip())
            for line in step.shown.splitlines():
                words = ".*".join(map(re.escape, re.split(r" *… *", line.strip())))
                assert re.search(words, ended.stdout), f"{TUTORIAL.name}:{step.line}: no {line!r} in\n{ended.stdout}"
            return
        what, name = step.note.split(": ")
        if what == "file":
            (self.folder / name).write_text(step.text)
            return
        file = self.folder / "acme_moe/experts.py"
        place = re.compile(rf"(^( *)# fill in: {name}\n).*?(^ *# end\n)", re.MULTILINE | re.DOTALL)
        text, count = place.subn(lambda at: at[1] + textwrap.indent(step.text, at[2]) + at[3], file.read_text())
        assert count == 1, f"{TUTORIAL.name}:{step.line}: {file} has {count} places {name!r}"
        file.write_text(text)


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Reader:
    return Reader(tmp_path_factory.mktemp("tutorial"))


def test_every_block_is_known() -> None:
    notes = re.compile(r"|slow|exit status: \d|file: [\w./]+|fill in: \w+")
    assert len([step for step in STEPS if step.kind == "sh"]) > 8
    assert len([step for step in STEPS if step.shown]) > 3
    for step in STEPS:
        assert notes.fullmatch(step.note), f"{TUTORIAL.name}:{step.line}: {step.note!r}"
        assert (step.kind == "python") == step.note.startswith(("file", "fill in")), f"{TUTORIAL.name}:{step.line}"
    assert FAST + LONG == STEPS


def test_it_has_the_toys_kernels() -> None:
    (text,) = [step.text for step in STEPS if step.note == "file: acme_moe/kernels.py"]
    assert text == KERNELS.read_text(encoding="utf-8")


def test_every_command_runs(reader: Reader) -> None:
    for step in FAST:
        reader.follow(step)
    assert list((reader.folder / "dist").glob("acme_moe-*.whl"))


@pytest.mark.skipif(SLOW not in os.environ, reason=f"minutes; run where {SLOW} is set, as in CI")
def test_it_ends_with_a_certificate(reader: Reader) -> None:
    for step in STEPS if reader.folder.name == "empty" else LONG:
        reader.follow(step)
