"""`python -m conformance.timing.replayed STUDY`: the paired gate's error rates on pairs that a GPU gave.

Draws whole runs from the recordings of `conformance.timing.study`: a cell's pairs are a stretch of its kind's recording
from a random even place on, around its end, so that what follows itself there does so here. Each cell and call has a
stretch of its own. A recording of the slowed version stands for two equal ones, too, with its times over 51/50.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from conformance.gate.paired import judge_paired
from conformance.gate.samples import Samples

CELLS_A_KIND = 11
FALSE, FOUND = "false alarms", "found"


class Recorded:
    """`conformance.gate.samples.PairSampler` on recordings.

    Args:
        recordings: by kind, those that are slower by `calls` + 1 over `calls`.
        calls: in a graph of a recording.
        slow: the cell that is slower; "" for none.
        source: of the places.
    """

    processes = 1

    def __init__(
        self, recordings: Mapping[str, Mapping[str, Any]], calls: int, slow: str, source: np.random.Generator
    ) -> None:
        self.recordings, self.calls, self.slow, self.source = recordings, calls, slow, source

    def pairs(self, cell: str, count: int) -> Samples:
        recording = self.recordings[cell.partition(" ")[0]]
        a, b = (np.array(recording[name]) for name in ("a_us", "b_us"))
        start = 2 * int(self.source.integers(len(a) // 2))
        at = (start + np.arange(count)) % len(a)
        slower = 1.0 if cell == self.slow else self.calls / (self.calls + 1)
        return Samples(a[at], b[at] * slower, np.zeros(count, dtype=np.uint8))


def rates(study: Mapping[str, Any], runs: int, seed: int) -> dict[str, tuple[float, float]]:
    """For two equal versions, and for one slowed cell of each kind: (runs that accuse a cell which is not slower, runs
    that accuse the slowed one), as shares of all."""
    slowed = {kind: of["1"] for kind, of in study["recorded"].items()}
    names = [f"{kind} {number}" for kind in slowed for number in range(CELLS_A_KIND)]
    found: dict[str, tuple[float, float]] = {}
    for slow in ("", *(f"{kind} 0" for kind in slowed)):
        source = np.random.default_rng([seed, len(found)])
        false = hits = 0
        for _ in range(runs):
            verdict = judge_paired(names, Recorded(slowed, study["calls"], slow, source))
            accused = {cell.cell for cell in verdict.slower}
            false += bool(accused - {slow})
            hits += slow in accused
        found[slow.partition(" ")[0]] = (false / runs, hits / runs)
    return found


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m conformance.timing.replayed", description=__doc__)
    parser.add_argument("study", type=Path)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    study = json.loads(given.study.read_text(encoding="utf-8"))
    table = Table(
        "slower by 2%", FALSE, FOUND, title=f"{given.runs} runs of {3 * CELLS_A_KIND} cells, {study['device']}"
    )
    for kind, (false, hits) in rates(study, given.runs, given.seed).items():
        table.add_row(kind or "none", f"{false:.1%}", f"{hits:.1%}" if kind else "-")
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
