"""Our adapters beside vLLM's own classes, timed in turn in one process: `python -m fp8moe_vllm.compare`."""

from __future__ import annotations

import argparse
import gc
import json
import math
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from conformance.build import CaseTensors, build
from conformance.gate.interval import LEAST_PAIRS, estimate, interquartile_mean, timer_floor
from conformance.gate.policy import DEFAULT
from conformance.gate.samples import valid_couples
from conformance.performs import floor_of, work_of
from conformance.plan import load_subject
from conformance.rates import rates_of
from conformance.timing.cells import CACHES, LEAST_LAYERS, MODEST, MOST_LAYERS, calls_for, places_for
from conformance.timing.graphs import Unrolled
from conformance.timing.samplers import DevicePairs
from conformance.timing.side_by_side import LEVEL
from conformance.timing.state import Watch
from conformance.versions import versions
from fp8moe.detection import describe_device
from fp8moe.experts import FusedMoEPermuteExpertsUnpermute, MoEWeights
from fp8moe.registry import BackendUnavailable
from fp8moe_vllm.cells import CALLERS, RIVALS, SHAPES, TOKENS, Cell, Shape, cells
from fp8moe_vllm.library import RELEASE
from fp8moe_vllm.told import HEAD, Compared, Result, row, table, verdict

MOST_PAIRS = 96
PAIRS_S = 0.8
"""What the pairs of a cell may take on the device, where the fewest do not take longer."""
LAST_S = 15.0
"""With less time than that left no cell is begun."""
Backends = list[FusedMoEPermuteExpertsUnpermute]


def say(text: str) -> None:
    print(text, flush=True)


@dataclass
class Held:
    """A shape's layers with the most tokens asked for, and backends made for them, by what `load_subject` takes."""

    layers: list[CaseTensors]
    made: dict[str, Backends | str]

    @classmethod
    def of(cls, shape: Shape, tokens: int) -> Held:
        first = build(shape.case(tokens), "cuda")
        cache = torch.cuda.get_device_properties(0).L2_cache_size
        count = math.ceil(CACHES * cache / first.case.weight_bytes)
        count = min(max(count, LEAST_LAYERS), MOST_LAYERS)
        return cls([first, *(_copied(first) for _ in range(count - 1))], {})

    def backends(self, name: str) -> Backends:
        """
        Raises:
            BackendUnavailable: it cannot be made here; the text says why, also the second time.
        """
        if name not in self.made:
            try:
                cls = load_subject(name).experts_cls
                self.made[name] = [cls(one.config, one.quant, one.weights) for one in self.layers]
            except BackendUnavailable as error:
                self.made[name] = str(error)
        found = self.made[name]
        if isinstance(found, str):
            raise BackendUnavailable(found)
        return found

    def calls(self, tokens: int) -> list[CaseTensors]:
        """Of the first tokens, in another order for each further layer, so that inputs rotate."""
        return [_fewer(one, tokens, number) for number, one in enumerate(self.layers)]


def _copied(tensors: CaseTensors) -> CaseTensors:
    copies: dict[str, Any] = {name: None if one is None else one.clone() for name, one in vars(tensors.weights).items()}
    return replace(tensors, weights=MoEWeights(**copies))


def _fewer(tensors: CaseTensors, tokens: int, number: int) -> CaseTensors:
    def taken(values: Tensor) -> Tensor:
        return values[:tokens].roll(number, 0).contiguous()

    return replace(
        tensors,
        case=replace(tensors.case, tokens=tokens),
        hidden_states=taken(tensors.hidden_states),
        topk_weights=taken(tensors.topk_weights),
        topk_ids=taken(tensors.topk_ids),
    )


def graphs_of(held: Held, cell: Cell) -> tuple[tuple[Unrolled, Unrolled], float]:
    """vLLM's and ours, with the same weights, inputs and output and the same places for what lies between; and how far
    their outputs are apart.

    Raises:
        BackendUnavailable: one of them cannot be made.
        conformance.timing.graphs.CaptureFailed: a call cannot be captured.
    """
    theirs, ours = held.backends(cell.rival), held.backends(cell.ours)
    calls = held.calls(cell.tokens)
    work = work_of(calls[0])
    floor = floor_of(work, rates_of(torch.cuda.get_device_name(0)) or MODEST, cell.shape.scheme)
    count = -(-calls_for(floor.us) // len(calls)) * len(calls)
    output = torch.empty_like(calls[0].hidden_states)
    expected = calls[0].call(theirs[0]).float()
    apart = float((calls[0].call(ours[0]).float() - expected).norm() / expected.norm())
    del expected
    a, b = (
        [partial(one.call, backend, output) for backend, one in zip(backends, calls, strict=True)]
        for backends in (theirs, ours)
    )
    first = Unrolled(a, count, places=places_for(calls[0].case))
    second = Unrolled(b, count, beside=first)
    first.output = second.output = output
    return (first, second), apart


def compare(cell: Cell, held: Held, watch: Watch) -> Compared:
    """
    Raises:
        BackendUnavailable, conformance.timing.graphs.CaptureFailed: as `graphs_of`.
        ValueError: too few pairs were undisturbed.
    """
    begin = time.monotonic()
    (first, second), apart = graphs_of(held, cell)
    sampler = DevicePairs({cell.name: lambda: (first, second)}, watch)
    probe = sampler.pairs(cell.name, 2)
    pair_us = float((probe.a_us + probe.b_us).mean())
    pairs = min(max(2 * int(PAIRS_S * 1e6 / pair_us / 2), LEAST_PAIRS), MOST_PAIRS)
    taken = sampler.pairs(cell.name, pairs)
    valid = valid_couples(taken.flags)
    if valid.sum() < LEAST_PAIRS:  # once more: heat passes
        taken = sampler.pairs(cell.name, pairs)
        valid = valid_couples(taken.flags)
    if valid.sum() < LEAST_PAIRS:
        raise ValueError(f"the device was disturbed: {int((~valid).sum())} of {pairs} pairs do not count")
    a, b = taken.a_us[valid], taken.b_us[valid]
    found = estimate(np.log(b / a), timer_floor(a, b), DEFAULT.resamples, DEFAULT.seed)
    ratio, low, high = (math.exp(value) for value in (found.log_ratio, found.low(LEVEL), found.high(LEVEL)))
    return Compared(
        cell.shape.name,
        cell.shape.title,
        cell.shape.scheme,
        cell.tokens,
        cell.ours,
        cell.theirs,
        _typical(b) / second.count,
        _typical(a) / first.count,
        ratio,
        low,
        high,
        pairs=int(valid.sum()),
        dropped=int((~valid).sum()),
        apart=apart,
        seconds=time.monotonic() - begin,
    )


def _typical(times: Any) -> float:
    return float(np.exp(interquartile_mean(np.log(times))))


def run(asked: Sequence[Cell], seconds: float, keep: Callable[[Result], None], about: dict[str, Any]) -> Result:
    """Every cell for which there is time; `keep` gets what there is after each."""
    end, result, held = time.monotonic() + seconds, Result(about=about), dict[str, Held]()
    most, longest = max((cell.tokens for cell in asked), default=1), 0.0
    with Watch() as watch:
        for number, cell in enumerate(asked):
            left = end - time.monotonic()
            if left < max(LAST_S, longest):
                result.left |= {one.name: "no time was left" for one in asked[number:]}
                break
            begin = time.monotonic()
            try:
                if cell.shape.name not in held:
                    held[cell.shape.name] = Held.of(cell.shape, most)
                    say(f"{cell.shape.name}: layers after {time.monotonic() - begin:.1f} s")
                found = compare(cell, held[cell.shape.name], watch)
            except BackendUnavailable as error:
                result.left[cell.name] = str(error)
                say(f"{cell.name}: not timed: {error}")
            except (Exception, SystemExit) as error:  # one cell's, unless the device is gone
                told = f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no text'])[0]}"
                result.left[cell.name] = told
                say(f"{cell.name}: not timed: {told}")
                if not _alive():
                    rest = asked[number + 1 :]
                    result.left |= {one.name: f"the device was lost at {cell.name}" for one in rest}
                    break
                _freed()
            else:
                result.compared.append(found)
                say(f"{row(found)}   apart {found.apart:.1e}, {found.seconds:.1f} s, {left:.0f} s left")
            longest = max(longest, time.monotonic() - begin)
            keep(result)
        result.about["watch"] = watch.told()
    keep(result)
    return result


def _alive() -> bool:
    try:
        torch.cuda.synchronize()
        return True
    except Exception:
        return False


def _freed() -> None:
    gc.collect()
    with suppress(Exception):
        torch.cuda.empty_cache()


def _picked(text: str | None, known: Sequence[Any], name: Callable[[Any], str]) -> list[Any]:
    """Those of `known` that a list with commas names; all, where nothing is given."""
    if text is None:
        return list(known)
    by_name = {name(one): one for one in known}
    unknown = [one for one in text.split(",") if one not in by_name]
    if unknown:
        raise SystemExit(f"{', '.join(unknown)}: expected some of {', '.join(by_name)}")
    return [by_name[one] for one in text.split(",")]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("fp8moe_vllm.compare", description=__doc__)
    parser.add_argument("--shapes", help=f"of {', '.join(shape.name for shape in SHAPES)}")
    parser.add_argument("--tokens", help=f"of {', '.join(map(str, TOKENS))}")
    parser.add_argument("--backends", help=f"of {', '.join(RIVALS)}")
    parser.add_argument("--seconds", type=float, default=400.0, help="after which no cell is begun")
    parser.add_argument("--out", type=Path, required=True, help="a JSON file")
    asked = parser.parse_args(arguments)
    shapes = _picked(asked.shapes, SHAPES, lambda shape: str(shape.name))
    tokens = _picked(asked.tokens, TOKENS, str)
    backends = _picked(asked.backends, tuple(RIVALS), str)
    if not torch.cuda.is_available():
        say("no CUDA device: nothing is timed")
        return 2
    wanted = cells(shapes, tokens, backends)
    about = {
        "device": describe_device().name,
        "versions": versions() | {"vllm": RELEASE},
        "rivals": CALLERS,
        "command": shlex.join(["python", "-m", "fp8moe_vllm.compare", *(arguments or sys.argv[1:])]),
    }
    say(f"{about['device']}: {len(wanted)} cells, {asked.seconds:.0f} s\n{HEAD}")
    result = run(wanted, asked.seconds, lambda so_far: _write(asked.out, so_far), about)
    say(f"\n{table(result.compared)}\n\n{verdict(result.compared, result.left)}")
    return 0


def _write(path: Path, result: Result) -> None:
    path.write_text(json.dumps(result.to_json(), indent=1) + "\n")


if __name__ == "__main__":
    raise SystemExit(main())
