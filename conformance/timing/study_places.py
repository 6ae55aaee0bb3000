"""`python -m conformance.timing.study_places`: how much it matters on this GPU where in memory a backend works.

Equal graphs on one case, of which one thing at a time lies elsewhere (the pool with intermediate results, output,
weights or inputs), each beside one graph that stays. Prints percent of time for each, and their standard deviation.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from statistics import median, pstdev

import torch
from torch import Tensor

from conformance.build import CaseTensors
from conformance.cases import Case
from conformance.plan import load_subject
from conformance.timing.cells import Layers, TimedCell, calls_for
from conformance.timing.graphs import Unrolled, replays
from conformance.timing.shared import INPUTS
from conformance.timing.study import layer_cells
from fp8moe.experts import MoEWeights

CASES = ("qwen3-30b-a3b:ep16,M=7,", "qwen3-235b-a22b:ep32,M=1,", "mixtral-8x7b:tp16,M=7,", "llama-4-scout:ep16,M=64,")
PAIRS, TIMES = 8, 6
LARGEST_PAD = 40 << 20
"""Of the memory that is taken in between, so that the next thing lies elsewhere."""


def main() -> int:
    source = random.Random(1)
    for cell in layer_cells():
        if any(case in cell.name for case in CASES):
            print(cell.case, flush=True)
            for what, found in _study(cell, source):
                values = " ".join(f"{one:+.2%}" for one in found)
                print(f"  {what}: {values}, standard deviation {pstdev(found):.2%}", flush=True)
    return 0


def _study(cell: TimedCell, source: random.Random) -> Iterator[tuple[str, list[float]]]:
    layers = Layers.of(Case.parse(cell.case), "cuda")
    output = torch.empty_like(layers.calls[0].hidden_states)
    stays = _graph(cell, layers, output, None)
    elsewhere: dict[str, Callable[[], Unrolled]] = {
        "intermediate results": lambda: _graph(cell, layers, output, None),
        "output": lambda: _graph(cell, layers, torch.empty_like(output), stays),
        "weights": lambda: _graph(cell, _moved(layers, _other_weights), output, stays),
        "inputs": lambda: _graph(cell, _moved(layers, _other_inputs), output, stays),
    }
    for what, make in elsewhere.items():
        held: list[object] = []
        found = []
        for _ in range(TIMES):
            held.append(torch.empty(source.randint(1 << 20, LARGEST_PAD), dtype=torch.uint8, device="cuda"))
            made = make()
            held.append(made)
            found.append(_over(stays, made))
        yield what, found


def _graph(cell: TimedCell, layers: Layers, output: Tensor, beside: Unrolled | None) -> Unrolled:
    """In one place, whatever the gate does."""
    cls = load_subject(cell.backend).experts_cls
    backends = [cls(tensors.config, tensors.quant, tensors.weights) for tensors in layers.calls]
    calls = [partial(tensors.call, backend, output) for backend, tensors in zip(backends, layers.calls, strict=True)]
    count = -(-calls_for(layers.floor.us) // len(calls)) * len(calls)
    return Unrolled(calls, count, beside=beside)


def _moved(layers: Layers, other: Callable[[CaseTensors], CaseTensors]) -> Layers:
    return replace(layers, calls=[other(tensors) for tensors in layers.calls])


def _other_weights(tensors: CaseTensors) -> CaseTensors:
    copies = {name: None if one is None else one.clone() for name, one in vars(tensors.weights).items()}
    return replace(tensors, weights=MoEWeights(**copies))  # type: ignore[arg-type]


def _other_inputs(tensors: CaseTensors) -> CaseTensors:
    return replace(tensors, **{name: getattr(tensors, name).clone() for name in INPUTS})


def _over(first: Unrolled, second: Unrolled) -> float:
    """How much longer the second takes: the median of pairs."""
    replays([first, second] * 2)
    taken = replays([graph for n in range(PAIRS) for graph in ((first, second) if n % 2 == 0 else (second, first))])
    couples = [(taken[2 * n], taken[2 * n + 1])[:: 1 if n % 2 == 0 else -1] for n in range(PAIRS)]
    return median(b.us / a.us for a, b in couples) - 1


if __name__ == "__main__":
    sys.exit(main())
