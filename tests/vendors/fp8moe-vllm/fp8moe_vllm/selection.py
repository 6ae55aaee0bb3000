"""Our selector beside an installed vLLM's on the same random questions: `python -m fp8moe_vllm.selection`."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from conformance.selection.draw import Call
from conformance.versions import versions
from fp8moe import Platform
from fp8moe.envs import AITER
from fp8moe.registry import BackendUnavailable
from fp8moe_vllm.answers import explained, ours
from fp8moe_vllm.drawn import drawn
from fp8moe_vllm.question import PLATFORM, USUAL, Parts, call_of, parse, told
from fp8moe_vllm.shrunk import shrink
from fp8moe_vllm.simulated import Simulated, here, unmoved
from fp8moe_vllm.tally import Compared, Tally
from fp8moe_vllm.theirs import REMEDY, SPECIFIED, NotTaken, Theirs, environment, found_version

TOLD_EVERY = 5000
"""Questions between two lines of progress."""
OTHER = "another version: differences are expected"
Put = Callable[[Call], None]
Ask = Callable[[Parts], Compared | None]

GFX942 = {"kind": "rocm", "capability": [9, 4], "gcn_arch": "gfx942", "cuda_version": None}
TENSOR_STATIC = dict.fromkeys(("weight_key", "activation_key"), "kFp8StaticTensorSym")
TENSOR_DYNAMIC = TENSOR_STATIC | {"activation_key": "kFp8DynamicTensorSym"}
MOVED: dict[str, tuple[Parts, Parts]] = {
    "a CUDA device": ({}, {"kind": "cpu", "capability": None}),
    "FlashInfer": (TENSOR_STATIC | {"libraries": ["flashinfer"]}, TENSOR_STATIC),
    "DeepGEMM": (
        {"libraries": ["deep_gemm"], "env": {"VLLM_USE_DEEP_GEMM": "1"}},
        {"env": {"VLLM_USE_DEEP_GEMM": "1"}},
    ),
    "a new CUDA toolkit": (
        TENSOR_DYNAMIC | {"allow_vllm_cutlass": True},
        TENSOR_DYNAMIC | {"allow_vllm_cutlass": True, "cuda_version": [12, 2]},
    ),
    "an architecture with FP8": (GFX942, GFX942 | {"gcn_arch": "gfx1100"}),
    "AITER": (GFX942 | {"libraries": ["aiter"], "env": {AITER: "1"}}, GFX942 | {"env": {AITER: "1"}}),
}
"""Questions that a vLLM must tell apart, or the simulated platform is not under it; by what only the first has."""


@contextmanager
def both(theirs: Theirs, real: bool) -> Iterator[Ask]:
    """Asks both selectors one question; None of what is no call, or none to this vLLM.

    Args:
        real: of the device that is here, which both find by themselves.

    Raises:
        BackendUnavailable: what a simulated platform replaces is not there, or is not asked.
    """
    if real:
        detected = Platform.detect()
        with here() as forget:
            yield lambda parts: _compared(theirs, parts, lambda call: forget(), detected)
        return
    with Simulated() as simulated:
        put: Put = lambda call: simulated.become(call.platform)  # noqa: E731
        for what, questions in MOVED.items():
            first, second = (_compared(theirs, USUAL | parts, put, None) for parts in questions)
            if first is None or second is None or first.theirs == second.theirs:
                raise unmoved(what)
        yield lambda parts: _compared(theirs, parts, put, None)


def _compared(theirs: Theirs, parts: Parts, put: Put, detected: Platform | None) -> Compared | None:
    try:
        call = call_of(parts, detected)
    except (ValueError, KeyError, TypeError):
        return None
    put(call)
    try:
        answer = theirs.answer(call)
    except NotTaken:
        return None
    return Compared(ours(call), answer, explained(call))


def compare(ask: Ask, questions: Iterator[Parts], progress: Callable[[int], None] = lambda count: None) -> Tally:
    """All questions asked, and of each kind of disagreement the smallest found."""
    tally = Tally()
    for number, parts in enumerate(questions):
        tally.add(parts, ask(parts))
        progress(number + 1)
    for key, kind in tally.kinds.items():
        kind.parts = shrink(kind.parts, partial(_is_apart_so, ask, key))
    return tally


def _is_apart_so(ask: Ask, kind: tuple[str, str], parts: Parts) -> bool:
    found = ask(parts)
    return found is not None and found.apart and found.kind == kind


def main(arguments: Sequence[str] | None = None) -> int:
    """The command: 0 where all agree, 1 where a question parts them, 2 where this vLLM cannot be asked."""
    parser = argparse.ArgumentParser("fp8moe_vllm.selection", description=__doc__)
    parser.add_argument("--cases", type=int, default=20_000, help="questions (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="a JSON file")
    parser.add_argument("--here", action="store_true", help="the device that is here, with its libraries")
    parser.add_argument("--anyway", action="store_true", help=f"also where vLLM is not {SPECIFIED}")
    parser.add_argument("--ask", metavar="QUESTION", help="this one alone, as a disagreement is told")
    asked = parser.parse_args(arguments)
    if asked.cases < 1:
        parser.error("--cases: expected 1 or more")
    try:
        alone = None if asked.ask is None else parse(asked.ask)
    except ValueError as error:
        parser.error(str(error))
    command = ["python", "-m", "fp8moe_vllm.selection", *(sys.argv[1:] if arguments is None else arguments)]
    try:
        with environment({}):  # vLLM copies some when it is loaded
            return _run(asked, alone, shlex.join(command))
    except BackendUnavailable as error:
        print(error, file=sys.stderr)
        return 2


def _run(asked: argparse.Namespace, alone: Parts | None, command: str) -> int:
    version = found_version()
    if version != SPECIFIED and not asked.anyway:
        raise BackendUnavailable(
            f"fp8moe_vllm.selection: found vllm {version}; the specification restates {SPECIFIED}, and another's "
            f"answers differ; {REMEDY}; or --anyway"
        )
    with both(Theirs(), asked.here) as ask:
        if alone is not None:
            return _one(ask, alone)
        questions = drawn(asked.cases, asked.seed)
        if asked.here:
            questions = (parts | {name: USUAL[name] for name in PLATFORM} for parts in questions)
        tally = compare(ask, questions, _progress)
    label = f"vllm {version} beside fp8moe's selector, {'the device here' if asked.here else 'simulated platforms'}"
    if version != SPECIFIED:
        label += f" ({OTHER})"
    options = [name for name in ("--here", "--anyway") if getattr(asked, name[2:])]
    print(f"{label}\n{tally.table()}")
    if tally.kinds:
        print(tally.told(shlex.join(["python", "-m", "fp8moe_vllm.selection", *options, "--ask"])))
    if asked.out is not None:
        about: dict[str, Any] = {"command": command, "label": label, "versions": versions() | {"vllm": version}}
        if asked.here:
            about["platform"] = str(Platform.detect())
        asked.out.write_text(json.dumps(about | tally.to_json(), indent=1) + "\n")
    return 1 if tally.kinds else 0


def _one(ask: Ask, parts: Parts) -> int:
    found = ask(parts)
    if found is None:
        raise BackendUnavailable("fp8moe_vllm.selection: this vLLM's types do not hold the question")
    print(f"question  {told(parts)}\nours      {found.ours} ({found.rule})\nvLLM      {found.theirs}")
    return 1 if found.apart else 0


def _progress(count: int) -> None:
    if count % TOLD_EVERY == 0:
        print(f"{count:,} questions asked", file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
