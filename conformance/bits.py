"""Equal bits: an output, and each stage on the way to it, against the replay of what the backend declares."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from conformance.build import CaseTensors
from fp8moe.experts import FusedMoEPermuteExpertsUnpermute
from fp8moe.recipe import Contract
from fp8moe.reference.problem import Pairs
from fp8moe.reference.replay import STAGES, Replay, why_not_replayed

EXACT_SUMS = "exact_sums"
"""The value regime in which every sum of FP8 products is exact, in whatever order it is taken."""
ORDERED_BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def why_not_bits(tensors: CaseTensors, contract: Contract) -> str:
    """Why a case's verdict is the bound's; "" where it is equality with the replay."""
    exact = tensors.case.values == EXACT_SUMS and tensors.quant.a1.dtype is not None
    pairs = int(tensors.topk_ids.numel())
    return why_not_replayed(contract, tensors.quant, tensors.weights, pairs, exact_sums=exact)


@dataclass(frozen=True)
class Difference:
    """Where two tensors of one shape differ. NaN equals NaN, and -0 equals 0.

    Args:
        differing: elements that differ.
        elements: all of them.
        row, column: of the pair of numbers that are farthest apart.
        expected, got: these numbers.
        steps: numbers of the format that lie between them, plus one; 0 where one of them is NaN.
    """

    differing: int
    elements: int
    row: int = 0
    column: int = 0
    expected: float = 0.0
    got: float = 0.0
    steps: int = 0

    def __str__(self) -> str:
        if not self.differing:
            return f"all {self.elements} equal"
        apart = f"{self.steps} step{'s' if self.steps > 1 else ''} of the format apart" if self.steps else "one is NaN"
        return (
            f"{self.differing} of {self.elements} differ; the farthest at row {self.row}, column {self.column}: "
            f"expected {self.expected:.9g}, got {self.got:.9g}, {apart}"
        )


def difference(expected: Tensor, got: Tensor) -> Difference:
    """Compares (rows, columns) tensors of one dtype: fp32, bf16 or fp16."""
    unequal = (expected != got) & ~(expected.isnan() & got.isnan())
    differing = int(unequal.sum())
    if not differing:
        return Difference(0, expected.numel())
    apart = (_place(expected) - _place(got)).abs()
    nan = expected.isnan() | got.isnan()
    apart = torch.where(unequal, torch.where(nan, torch.iinfo(torch.int64).max, apart), -1)
    where = int(apart.argmax())
    row, column = divmod(where, expected.shape[1])
    steps = 0 if bool(nan[row, column]) else int(apart[row, column])
    return Difference(
        differing, expected.numel(), row, column, float(expected[row, column]), float(got[row, column]), steps
    )


def _place(values: Tensor) -> Tensor:
    """Each number's place in the order of its format's numbers, int64; both zeros are 0."""
    bits = values.contiguous().view(ORDERED_BITS[values.dtype]).to(torch.int64)
    largest = torch.iinfo(ORDERED_BITS[values.dtype]).max
    return torch.where(bits < 0, -(bits & largest), bits)


class StageShapeError(ValueError):
    """A stage that a backend shows has another form than the stage has."""


@dataclass(frozen=True)
class StageResult:
    """One stage of a backend beside the replay's; `difference` None where the backend does not show the stage.

    `where` says whose the row of the farthest pair of numbers is.
    """

    stage: str
    difference: Difference | None
    where: str = ""

    def __str__(self) -> str:
        return f"{self.stage}: {self.difference}" + (f" ({self.where})" if self.where else "")


@contextmanager
def observed(backend: FusedMoEPermuteExpertsUnpermute) -> Iterator[dict[str, Tensor]]:
    """Keeps a copy of each stage that the backend shows in a call.

    Raises:
        ValueError: within the call, for a stage that is unknown or shown twice.
    """
    seen: dict[str, Tensor] = {}

    def keep(stage: str, values: Tensor) -> None:
        if stage not in STAGES:
            raise ValueError(f"observe: stage={stage!r}: expected one of {', '.join(STAGES)}")
        if stage in seen:
            raise ValueError(f"observe: stage={stage!r} is shown twice in a call: show it once, for all pairs")
        seen[stage] = values.detach().clone()

    backend.observe = keep
    try:
        yield seen
    finally:
        backend.observe = None


def compare_stages(
    seen: Mapping[str, Tensor], output: Tensor, tensors: CaseTensors, replay: Replay
) -> Iterator[StageResult]:
    """What a backend showed of its stages beside the replay, in their order; the last one is the output it gave.

    A row of a stage before that is a token-expert pair of a judged token.

    Raises:
        StageShapeError: a stage has another shape than it must have.
    """
    seen = {**seen, "combine": output}
    judged = (replay.pairs.token >= 0).nonzero()[:, 0]
    place = _places(replay.pairs, int(tensors.topk_ids.shape[1]))[judged]
    for stage in STAGES:
        if stage not in replay.stages:
            continue
        expected = replay.stages[stage]
        if stage not in seen:
            yield StageResult(stage, None)
        elif stage == "combine":
            yield StageResult(stage, difference(expected, seen[stage].to(expected.device)[replay.tokens]))
        else:
            shown = seen[stage]
            form = (int(tensors.topk_ids.numel()), expected.shape[1])
            if tuple(shown.shape) != form:
                raise StageShapeError(
                    f"observe: stage={stage!r} has the shape {tuple(shown.shape)}: expected {form}, a row for each "
                    "token-expert pair"
                )
            found = difference(expected[judged].float(), shown.to(expected.device)[place].float())
            yield StageResult(stage, found, _whose(replay.pairs, judged, found) if found.differing else "")


def _whose(pairs: Pairs, judged: Tensor, found: Difference) -> str:
    pair = judged[found.row]
    return f"that row is token {int(pairs.row[pair])}, slot {int(pairs.slot[pair])}, expert {int(pairs.expert[pair])}"


def _places(pairs: Pairs, top_k: int) -> Tensor:
    """Each pair's number: token * top_k + slot."""
    return pairs.row * top_k + pairs.slot


def parting_stage(results: Iterable[StageResult]) -> StageResult | None:
    """The first stage that differs; None where none does, or none is shown."""
    return next((r for r in results if r.difference is not None and r.difference.differing), None)


def digest(values: Tensor) -> str:
    """Sixteen hexadecimal digits that stand for a tensor's dtype, shape and bits, the same on every machine."""
    here = values.detach().cpu().contiguous()
    form = f"{str(here.dtype).removeprefix('torch.')} {'x'.join(map(str, here.shape))} ".encode()
    return hashlib.sha256(form + here.view(torch.uint8).numpy().tobytes()).hexdigest()[:16]
