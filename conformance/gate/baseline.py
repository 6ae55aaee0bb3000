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
            content = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise BadBaseline(f"{path}: {error.strerror}") from None
        except ValueError as error:
            raise BadBaseline(f"{path}: no whole JSON ({error}): it was cut short, or is another file") from None
        content = _within(content)
        if not isinstance(content, dict) or content.get("kind") != KIND:
            raise BadBaseline(f"{path}: no {KIND}: `fp8moe gate --write FILE` makes one")
        if content.get("format") != FORMAT:
            raise BadBaseline(f"{path}: format {content.get('format')!r}, expected {FORMAT}: write it anew")
        if content.pop(DIGEST, None) != _digest(content):
            raise BadBaseline(f"{path}: its digest is not that of its content: it was edited; write it anew")
        try:
            numerics = {
                cell: {case: _figures(figures) for case, figures in cases.items()}
                for cell, cases in content["numerics"].items()
            }
            speed = [Record.from_json(json.dumps(record)) for record in content["speed"]]
            rest = {name: content[name] for name in ("date", "target", "device", "versions", "seed", "command")}
            states = [{str(k): str(v) for k, v in state.items()} for state in content["states"]]
            return cls(**rest, decisions=content["decisions"], numerics=numerics, speed=speed, states=states)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise BadBaseline(f"{path}: not the fields of a baseline: {error!r}; write it anew") from None

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
                differing.append(f"{cell}: {len(missing)} cases are not in the baseline, such as {missing[0]}")
        if differing:
            raise BadBaseline("; ".join(differing) + ": such runs are not compared; write a baseline of this kind")


def _figures(given: Mapping[str, Any]) -> CaseFigures:
    digest, error, over = given["digest"], given["error"], given["error_over_bound"]
    if not isinstance(digest, str) or not all(isinstance(one, (int, float)) for one in (error, over)):
        raise TypeError(f"figures of a case: a digest and two numbers, not {given}")
    return CaseFigures(digest, error, over)


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
