"""`python -m conformance.timing.study`: what the paired gate's error rates come to on this GPU.

Two parts. Runs of the gate itself on some dozens of cells, A against another instance of A, and with one cell slowed;
they show the real thing, and there is time for few. And recordings of pairs of three kinds of work, A against A and
against a version that is slower by 2%; from the latter `conformance.timing.replayed` draws as many runs as are wanted,
stretch by stretch, so that what follows itself in a recording does so in a run.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from conformance.gate.paired import judge_paired
from conformance.gate.samples import Samples
from conformance.gate.verdicts import RunVerdict
from conformance.pinned import is_checkpoints, model_cases
from conformance.plan import resolve_target
from conformance.timing.cells import TimedCell, prepared_pair
from conformance.timing.graphs import Unrolled
from conformance.timing.samplers import DevicePairs, Make
from conformance.timing.state import Watch
from conformance.versions import versions
from fp8moe.counted import counted

CALLS = 50
"""In graphs whose slowdown is one call more: 2%."""
SLOWER = (0, 1)
"""Calls more than `CALLS`."""
OURS = "TRITON"
KINDS = {"memory": ("qwen3-30b-a3b", 16), "compute": ("mixtral-8x7b", 512), "short": ("", 4)}
"""Of each kind of work a model and a number of tokens; none: a layer of the smallest size."""
LARGEST_BYTES = 1 << 28


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m conformance.timing.study", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="JSON of everything that was taken")
    parser.add_argument("--record-seconds", type=float, default=20.0, help="for each kind and slowdown")
    parser.add_argument("--runs", type=int, default=4, help="of the gate, A/A and with one cell slower by 2%%")
    given = parser.parse_args(arguments)
    with Watch() as watch:
        recorded = {
            name: {str(slower): _recorded(make, watch, given.record_seconds) for slower, make in versions_of.items()}
            for name, versions_of in _kinds().items()
        }
        print(json.dumps({k: {s: len(r["a_us"]) for s, r in v.items()} for k, v in recorded.items()}), flush=True)
        content = {"device": torch.cuda.get_device_name(0), "versions": versions(), "calls": CALLS}
        runs: list[dict[str, object]] = []
        given.out.write_text(json.dumps(content | {"recorded": recorded, "runs": runs}), encoding="utf-8")
        for run in _runs(given.runs, watch):
            runs.append(run)
            told = {"state": watch.told(), "recorded": recorded, "runs": runs}
            given.out.write_text(json.dumps(content | told), encoding="utf-8")
    print(json.dumps(watch.told()))
    return 0


def _kinds() -> dict[str, dict[int, Make]]:
    return {name: {n: partial(_pair, cell, CALLS, n) for n in SLOWER} for name, cell in kind_cells().items()}


def kind_cells() -> dict[str, TimedCell]:
    """A cell of each kind of work."""
    return {name: _cell(*of) for name, of in KINDS.items()}


def layer_cells() -> list[TimedCell]:
    """A third of the published models' layers, all numbers of tokens among them."""
    cases = [case for case in model_cases(resolve_target("cuda")) if is_checkpoints(case)]
    return [TimedCell(OURS, str(case)) for case in cases if case.weight_bytes <= LARGEST_BYTES][::3]


def _cell(model: str, tokens: int) -> TimedCell:
    if not model:
        return TimedCell(OURS, f"v1:M={tokens}")
    cases = [c for c in model_cases(resolve_target("cuda")) if is_checkpoints(c) and str(c.model).startswith(model)]
    return TimedCell(OURS, str(replace(cases[0], tokens=tokens)))


def _pair(cell: TimedCell, calls: int | None, slower: int) -> tuple[Unrolled, Unrolled]:
    """A, and another instance that makes so many calls more; their times are compared as if it did not."""
    return prepared_pair(cell, cell, calls, slower)


def _recorded(make: Make, watch: Watch, seconds: float) -> dict[str, list[float]]:
    sampler = DevicePairs({"cell": make}, watch)
    taken: list[Samples] = []
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        taken.append(sampler.pairs("cell", 16))
    return {
        "a_us": np.concatenate([one.a_us for one in taken]).round(3).tolist(),
        "b_us": np.concatenate([one.b_us for one in taken]).round(3).tolist(),
        "flags": np.concatenate([one.flags for one in taken]).tolist(),
    }


def _runs(count: int, watch: Watch) -> Iterator[dict[str, object]]:
    """Of the gate, over many layers."""
    names = [cell.name for cell in layer_cells()]
    started = time.monotonic()
    kept = {name: _pair(TimedCell.parse(name), None, 0) for name in names}
    print(f"{counted(len(names), 'cell')} prepared in {time.monotonic() - started:.0f} s", flush=True)
    for number in range(count):
        for slower in SLOWER:
            where = names[(7 * number + slower) % len(names)] if slower else ""
            slow = {where: _pair(TimedCell.parse(where), CALLS, slower)} if slower else {}
            cells: dict[str, Make] = {name: partial(dict.__getitem__, {**kept, **slow}, name) for name in names}
            started = time.monotonic()
            verdict = judge_paired(names, DevicePairs(cells, watch))
            yield _told(verdict, slower, where, time.monotonic() - started)


def _told(verdict: RunVerdict, slower: int, where: str, seconds: float) -> dict[str, object]:
    found = {"slower": slower, "where": where, "seconds": round(seconds, 1), **verdict.as_json()}
    accused = [cell.cell for cell in verdict.slower]
    print(
        f"{slower} in {CALLS} slower in {where or 'none'}: accused {accused}; {verdict.lines()[0]}; {seconds:.0f} s",
        flush=True,
    )
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
