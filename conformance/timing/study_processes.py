"""`python -m conformance.timing.study_processes`: the gate's errors on this GPU where each version has its own process.

Two parts. Paired runs over some dozens of cells, each run with two fresh processes of this checkout, one cell slower by
2% in the second: the other cells tell how far apart two processes are for good. And stored runs: a record in a fresh
process, then further ones, each in another and with one cell slower by 5%, judged by the first.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from conformance.gate.paired import judge_paired
from conformance.gate.record import Record
from conformance.gate.stored import judge_stored
from conformance.gate.verdicts import RunVerdict
from conformance.timing.recorded import HERE
from conformance.timing.state import Watch, opened_here
from conformance.timing.study import kind_cells, layer_cells
from conformance.timing.two_processes import TwoProcessPairs, Version, record_apart
from conformance.versions import versions
from fp8moe.counted import counted

PAIRED, STORED = 50, 20
"""Calls in the graph of a cell that one call more slows: by 2% and by 5%."""


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m conformance.timing.study_processes", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="JSON of everything that was taken")
    parser.add_argument("--paired", type=int, default=3, metavar="N", help="runs of two processes")
    parser.add_argument("--stored", type=int, default=3, metavar="N", help="runs against the first record")
    given = parser.parse_args(arguments)
    slow = [cell.name for cell in kind_cells().values()]
    names = list(dict.fromkeys([*(cell.name for cell in layer_cells()), *slow]))
    content = {"device": torch.cuda.get_device_name(0), "versions": versions(), "cells": names}
    runs: list[dict[str, object]] = []
    for made in (_paired(names, slow, given.paired), _stored(names, slow, given.stored)):
        for run in made:
            runs.append(run)
            given.out.write_text(json.dumps(content | {"runs": runs}), encoding="utf-8")
    return 0


def _paired(names: Sequence[str], slow: Sequence[str], count: int) -> Iterator[dict[str, object]]:
    for number in range(count):
        where, started = slow[number % len(slow)], time.monotonic()
        a, b = Version.pair(HERE, HERE)
        cells, planted = {name: (name, name) for name in names}, {where: (PAIRED, 1)}
        with Watch(2 + opened_here()) as watch, TwoProcessPairs(cells, (a, b), watch, planted) as sampler:
            verdict = judge_paired(names, sampler)
        yield _told(verdict, PAIRED, where, time.monotonic() - started, watch.told())


def _stored(names: Sequence[str], slow: Sequence[str], count: int) -> Iterator[dict[str, object]]:
    even = dict.fromkeys(slow, (STORED, 0))
    before: Record | None = None
    for number in range(count + 1 if count else 0):
        where, started = "" if before is None else slow[(number - 1) % len(slow)], time.monotonic()
        record, state = record_apart(names, even | ({where: (STORED, 1)} if where else {}))
        seconds = time.monotonic() - started
        if before is None:
            before = record
            print(f"a record of {counted(len(names), 'cell')}; {seconds:.0f} s", flush=True)
            yield {
                "mode": "record",
                "seconds": round(seconds, 1),
                "state": state,
                "record": json.loads(record.to_json()),
            }
        else:
            yield _told(judge_stored(record, [before]), STORED, where, seconds, state)


def _told(verdict: RunVerdict, calls: int, where: str, seconds: float, state: dict[str, str]) -> dict[str, object]:
    accused = [cell.cell for cell in verdict.slower]
    off = [abs(math.log(cell.ratio)) for cell in verdict.cells if cell.cell != where and not math.isnan(cell.ratio)]
    apart = f"the others apart by {math.sqrt(sum(one**2 for one in off) / len(off)):.2%} (rms), {max(off):.2%} at most"
    print(
        f"1 in {calls} slower in {where}: accused {accused}; {verdict.lines()[0]}; {apart}; {seconds:.0f} s\n  {state}",
        flush=True,
    )
    return {
        "slower": f"1 in {calls}",
        "where": where,
        "seconds": round(seconds, 1),
        "state": state,
        **verdict.as_json(),
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
