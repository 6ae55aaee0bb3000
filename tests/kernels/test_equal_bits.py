"""Both backends on Hopper against the replay of what they declare: every output and every stage, bit for bit.

The cases are a product of sizes around the tiles, crossed with laws, values and options in turn. All tokens of each are
replayed, on the GPU itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import pytest
import torch

from conformance.bits import compare_stages, difference, observed, parting_stage, why_not_bits
from conformance.build import build
from conformance.cases import LAWS, VALUES, Case
from conformance.oracles import trace_of
from fp8moe.backends.batched_triton import BatchedTritonExperts
from fp8moe.backends.triton_arithmetic import LARGE_TILE, SMALL_TILE, tile_height
from fp8moe.backends.triton_experts import TritonExperts
from fp8moe.backends.triton_stages import TritonStages
from fp8moe.reference.replay import replay_moe

BACKENDS = (TritonExperts, BatchedTritonExperts)
SCHEMES = ("block", "tensor_static", "tensor_dyn", "tensor_tok", "channel_tok", "none")
TOKENS = (1, 7, 15, 33, 64, 129, 257, 513, 777, 1000)
EXPERTS_AND_TOP_K = ((8, 2), (1, 1), (16, 3), (4, 1), (5, 2), (64, 4), (3, 3))
SIZES = ((128, 128), (144, 72), (200, 264), (392, 136), (320, 392), (136, 208), (256, 256), (264, 400), (400, 144))
"""Hidden and intermediate size: with and without a remainder to the tiles' 128 columns and to the steps along K."""
EACH = len(TOKENS) * 2


def cases(cls: type[TritonStages], scheme: str) -> Iterator[Case]:
    """EACH cases: every number of tokens in both dtypes, and all else in turn."""
    assert cls.support is not None
    activations = sorted(cls.support.activations)
    first = (BACKENDS.index(cls) * len(SCHEMES) + SCHEMES.index(scheme)) * EACH
    for number, (tokens, dtype) in enumerate(product(TOKENS, ("bf16", "fp16")), first):
        experts, top_k = EXPERTS_AND_TOP_K[number % len(EXPERTS_AND_TOP_K)]
        hidden, inter = SIZES[number % len(SIZES)]
        law = LAWS[number % len(LAWS)] if experts > 4 else "uniform"
        case = Case(
            scheme=scheme,
            dtype=dtype,
            tokens=tokens,
            experts=experts,
            top_k=top_k,
            hidden=hidden,
            inter=inter,
            law=law,
            values=VALUES[number % len(VALUES)],
            activation=activations[number // 2 % len(activations)],
            bias=number % 3 == 0,
            layout="strided" if number % 5 == 0 else "contiguous",
            seed=number,
        )
        if experts % 2 == 0 and number % 4 < 2:
            case = replace(case, ep="2:1")
        yield replace(case, weight_on_input=True) if top_k == 1 and number % 2 else case


def height_of(cls: type[TritonStages], case: Case) -> int:
    return LARGE_TILE if cls.batched else tile_height(case.tokens * case.top_k, case.experts)


def compared(cls: type[TritonStages], case: Case, device: torch.device) -> str:
    """How a case's output and stages differ from the replay, in words; "" where all their bits are equal."""
    tensors = build(case, device)
    backend = cls(tensors.config, tensors.quant, tensors.weights)
    contract = backend.contract
    why = why_not_bits(tensors, contract)
    assert not why, f"{case} cannot be replayed: {why}"
    pairs = int(tensors.topk_ids.numel())
    arithmetic, steps = contract.arithmetic_for(pairs), contract.steps_for(pairs)
    assert arithmetic is not None
    assert steps is not None
    with observed(backend) as seen:
        output = tensors.call(backend)
    replay = replay_moe(trace_of(tensors, contract.recipe), arithmetic, steps)
    found, parted = difference(replay.output, output), parting_stage(compare_stages(seen, output, tensors, replay))
    if parted is None:
        return ""
    told = f"{case} ({arithmetic.unit}): {found}"
    return told if parted.stage == "combine" else f"{told}; they part at {parted.stage}: {parted.difference}"


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("cls", BACKENDS)
def test_every_bit_is_the_replays(cls: type[TritonStages], scheme: str, hopper: torch.device) -> None:
    told = [compared(cls, case, hopper) for case in cases(cls, scheme)]
    differing = [text for text in told if text]
    assert len(told) == EACH
    assert not differing, f"{len(differing)} of {len(told)} cases differ:\n" + "\n".join(differing)


def test_the_cases_are_many() -> None:
    """On any machine: what the test above goes through on Hopper."""
    every = {(cls, case) for cls, scheme in product(BACKENDS, SCHEMES) for case in cases(cls, scheme)}
    assert len(every) == len(BACKENDS) * len(SCHEMES) * EACH >= 240
    for cls, scheme in product(BACKENDS, SCHEMES):
        chosen = list(cases(cls, scheme))
        assert {height_of(cls, case) for case in chosen} == ({LARGE_TILE} if cls.batched else {SMALL_TILE, LARGE_TILE})
        assert {case.dtype for case in chosen} == {"bf16", "fp16"}
        assert (min(case.tokens for case in chosen), max(case.tokens for case in chosen)) == (1, 1000)
    for name, known in (("law", LAWS), ("values", VALUES)):
        assert {getattr(case, name) for _, case in every} == set(known)
    for option in ("ep", "bias", "weight_on_input"):
        assert {bool(getattr(case, option)) for _, case in every} == {True, False}


EXACT = Case(experts=2, top_k=2, hidden=136, inter=136, tokens=3, values="exact_sums")


@pytest.mark.parametrize("scheme", [scheme for scheme in SCHEMES if scheme != "none"])
@pytest.mark.parametrize("cls", BACKENDS)
def test_where_sums_are_exact(cls: type[TritonStages], scheme: str, device: torch.device) -> None:
    """The same comparison where the interpreter can make it: its sums of 16-bit products have an order of their own."""
    case = replace(EXACT, scheme=scheme, dtype="fp16" if cls.batched else "bf16", bias=True)
    tensors = build(case, device)
    if why := why_not_bits(tensors, cls(tensors.config, tensors.quant, tensors.weights).contract):
        pytest.skip(f"no replay on this device: {why}")
    assert compared(cls, case, device) == ""
