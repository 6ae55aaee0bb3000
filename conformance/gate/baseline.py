"""A baseline: what a run on one device came to, kept in a file that a later run is compared with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from conformance.gate.numerics import CaseFigures
from conformance.gate.record import Record
from conformance.typed import check_object
from conformance.untrusted import MOST_UNPACKED, Malformed, bytes_of, json_of, shown
from fp8moe.counted import counted

FORMAT = 2
KIND = "fp8moe gate baseline"
DIGEST = "sha256"


class BadBaseline(ValueError):
    """A file that cannot be compared with; the text says what is wrong or differs, and what to do."""


@dataclass(frozen=True)
class Baseline:
    """One run.

    Args:
        date: ISO 8601, of the run.
        target: "cpu", "interpreter", "cuda" …
        device: its name, as its driver gives it.
        versions: of fp8moe, Python, torch and triton.
        seed: of the cases.
        command: that made it.
        decisions: digest of the kept decision table's file; "" where it was not taken.
        numerics: by cell and case.
        speed: records; none where nothing was timed.
        states: what was seen of the device during each record, in words by name.
    """

    date: str
    target: str
    device: str
    versions: Mapping[str, str]
    seed: int
    command: str
    decisions: str
    numerics: Mapping[str, Mapping[str, CaseFigures]]
    speed: Sequence[Record] = ()
    states: Sequence[Mapping[str, str]] = ()

    KEY: ClassVar[str] = KIND
    """Of a baseline in the extra information of a benchmark."""

    @property
    def backends(self) -> tuple[str, ...]:
        """Whose figures these are, by the names of the cells."""
        cells = [*self.numerics, *(cell for record in self.speed for cell in record.cells)]
        return tuple(dict.fromkeys(cell.partition(" ")[0] for cell in cells))

    def to_json(self) -> str:
        content = {"kind": KIND, "format": FORMAT, **asdict(self)}
        content["speed"] = [json.loads(record.to_json()) for record in self.speed]
        return json.dumps({**content, DIGEST: _digest(content)}, indent=1, allow_nan=False) + "\n"

    @classmethod
    def load(cls, path: Path) -> Baseline:
        """From a file of ours, or of pytest-benchmark with a baseline in a benchmark's extra information.

        Raises:
            BadBaseline: it cannot be read, is no baseline, is cut short, was edited, or has another format.
        """
        try:
            packed = bytes_of(path, MOST_UNPACKED, path)
        except Malformed as error:
            raise BadBaseline(str(error)) from None
        try:
            content = _within(json_of(packed, path.name))
        except Malformed as error:
            raise BadBaseline(f"{path}: no whole JSON ({error}): it was cut short, or is another file") from None
        if not isinstance(content, dict) or content.get("kind") != KIND:
            raise BadBaseline(f"{path}: no {KIND}: `fp8moe gate --write FILE` makes one")
        if content.get("format") != FORMAT:
            raise BadBaseline(f"{path}: format {shown(content.get('format'))}, expected {FORMAT}: write it anew")
        if content.pop(DIGEST, None) != _digest(content):
            raise BadBaseline(f"{path}: its digest is not that of its content: it was edited; write it anew")
        try:
            return cls._of(content)
        except ValueError as error:
            raise BadBaseline(f"{path}: not the fields of a baseline: {error}; write it anew") from None

    @classmethod
    def _of(cls, content: Mapping[str, Any]) -> Baseline:
        """
        Raises:
            ValueError: a field is missing, or of another type.
        """
        given = {name: value for name, value in content.items() if name not in ("kind", "format")}
        check_object({**given, "speed": []}, cls, "baseline", may_lack=())
        records = given.get("speed")
        if not isinstance(records, list):
            raise Malformed("speed: expected a list of records")
        given["speed"] = [Record.from_object(record) for record in records]
        given["numerics"] = {
            cell: {case: CaseFigures(**figures) for case, figures in cases.items()}
            for cell, cases in given["numerics"].items()
        }
        return cls(**given)

    def check_comparable(self, other: Baseline) -> None:
        """Whether a run may be compared with this baseline.

        Raises:
            BadBaseline: target, device, versions or seed differ, or cases of the run are missing here.
        """
        differing = [
            f"{name}: {mine!r} in the baseline, {here!r} here"
            for name, mine, here in (
                ("target", self.target, other.target),
                ("device", self.device, other.device),
                ("seed", self.seed, other.seed),
                *((f"versions.{key}", self.versions.get(key), value) for key, value in other.versions.items()),
            )
            if mine != here
        ]
        for cell, cases in other.numerics.items():
            missing = sorted(set(cases) - set(self.numerics.get(cell, {})))
            if missing:
                differing.append(f"{cell}: {counted(len(missing), 'case')} not in the baseline, such as {missing[0]}")
        if differing:
            raise BadBaseline("; ".join(differing) + ": such runs are not compared; write a baseline of this kind")


def _within(content: Any) -> Any:
    """The baseline in what pytest-benchmark stored; anything else as it is."""
    benchmarks = content.get("benchmarks") if isinstance(content, dict) else None
    for benchmark in benchmarks if isinstance(benchmarks, list) else ():
        extra = benchmark.get("extra_info") if isinstance(benchmark, dict) else None
        found = extra.get(KIND) if isinstance(extra, dict) else None
        if found is not None:
            return found
    return content


def _digest(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
