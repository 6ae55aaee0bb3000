"""Both Triton backends around their kernels: layouts, ranks, outputs, graphs and sizes. Their numbers are the suite's.

Two calls that must come to the same are compared bit for bit, so no figure here depends on a device's arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from conformance.bits import difference, why_not_bits
from conformance.build import CaseTensors, build
from conformance.cases import Case
from conformance.oracles import trace_of
from fp8moe import InvalidMoEInput, MoEWeights
from fp8moe.backends.batched_triton import BatchedTritonExperts
from fp8moe.backends.triton_experts import TritonExperts
from fp8moe.backends.triton_stages import TritonStages
from fp8moe.config import NON_GATED_ACTIVATIONS
from fp8moe.kernels import align
from fp8moe.kernels.few import FEW
from fp8moe.reference.replay import replay_moe

SCHEMES = ("block", "tensor_static", "tensor_dyn", "tensor_tok", "channel_tok", "none")
BOTH = pytest.mark.parametrize("cls", [TritonExperts, BatchedTritonExperts])
LAYER = Case(tokens=5, experts=3, top_k=2, hidden=136, inter=144, law="masked", values="iid")


def backend(cls: type[TritonStages], tensors: CaseTensors) -> TritonStages:
    return cls(tensors.config, tensors.quant, tensors.weights)


def run(cls: type[TritonStages], tensors: CaseTensors, **options: Any) -> Tensor:
    options = {
        "expert_map": tensors.expert_map,
        "apply_router_weight_on_input": tensors.apply_router_weight_on_input,
        **options,
    }
    return backend(cls, tensors).apply(tensors.hidden_states, tensors.topk_weights, tensors.topk_ids, **options)


def alike(expected: Tensor, got: Tensor) -> None:
    found = difference(expected, got)
    assert not found.differing, str(found)


@BOTH
def test_too_many_programs_are_refused_before_a_launch(cls: type[TritonStages], device: torch.device) -> None:
    """Three tiles of 256 columns, in programs of 64 and one more."""
    tensors = build(replace(LAYER, hidden=200, inter=128), device)
    with patch("fp8moe.kernels.grouped_gemm.MOST_PROGRAMS", 14), pytest.raises(InvalidMoEInput, match="split the call"):
        run(cls, tensors)
    with patch("fp8moe.kernels.grouped_gemm.MOST_PROGRAMS", 15):
        run(cls, tensors)


# -- how a call begins --


@pytest.mark.parametrize(("scheme", "pairs"), [("block", FEW), ("block", FEW + 2), ("channel_tok", FEW)])
def test_few_pairs_begin_with_one_launch(scheme: str, pairs: int, device: torch.device) -> None:
    tensors = build(replace(LAYER, scheme=scheme, tokens=pairs // LAYER.top_k, hidden=128, inter=128), device)
    with patch.object(align, "begin", wraps=align.begin) as begin:
        found = run(TritonExperts, tensors)
    assert begin.called == (scheme == "block" and pairs <= FEW)
    with patch("fp8moe.kernels.few.FEW", 0):
        alike(run(TritonExperts, tensors), found)


# -- activations that no model behind the suite's Standard backends has --


@pytest.mark.parametrize("activation", NON_GATED_ACTIVATIONS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_activations_without_a_gate(scheme: str, activation: str, device: torch.device) -> None:
    """In batches, against the replay; in the interpreter with sums that come out the same in any order."""
    dtype = "bf16" if activation == "silu_no_mul" else "fp16"
    tensors = build(replace(LAYER, scheme=scheme, activation=activation, dtype=dtype, values="exact_sums"), device)
    experts = backend(BatchedTritonExperts, tensors)
    if why := why_not_bits(tensors, experts.contract):
        pytest.skip(f"no replay on this device: {why}")
    pairs = tensors.topk_ids.numel()
    arithmetic, steps = experts.contract.arithmetic_for(pairs), experts.contract.steps_for(pairs)
    assert arithmetic is not None
    assert steps is not None
    expected = replay_moe(trace_of(tensors, experts.contract.recipe), arithmetic, steps).output
    assert bool(expected.any())
    alike(expected, tensors.call(experts))


# -- layouts --


def transposed(x: Tensor | None) -> Tensor | None:
    """The same values with the last two dimensions' strides exchanged; FP8 by its bytes."""
    if x is None or x.dim() < 2:
        return x
    raw = x.view(torch.uint8) if x.itemsize == 1 else x
    return raw.transpose(-1, -2).contiguous().transpose(-1, -2).view(x.dtype)


def apart(x: Tensor | None) -> Tensor | None:
    """The same values with something else between any two of them."""
    if x is None:
        return None
    raw = x.view(torch.uint8) if x.itemsize == 1 else x
    pairs = torch.stack([raw, torch.full_like(raw, 7)], -1)
    return pairs.view(x.dtype)[..., 0] if x.itemsize == 1 else pairs[..., 0]


def relaid(weights: MoEWeights, how: Callable[[Tensor | None], Tensor | None]) -> MoEWeights:
    return MoEWeights(*(how(value) for value in vars(weights).values()))


LAYOUTS: dict[str, tuple[str, Callable[[CaseTensors], CaseTensors]]] = {
    "hidden states transposed": ("block", lambda t: replace(t, hidden_states=transposed(t.hidden_states))),
    "hidden states apart": ("none", lambda t: replace(t, hidden_states=apart(t.hidden_states))),
    "routing transposed": (
        "tensor_dyn",
        lambda t: replace(t, topk_ids=transposed(t.topk_ids), topk_weights=transposed(t.topk_weights)),
    ),
    "routing apart": (
        "tensor_static",
        lambda t: replace(t, topk_ids=apart(t.topk_ids), topk_weights=apart(t.topk_weights)),
    ),
    "ids of 64 bits": ("channel_tok", lambda t: replace(t, topk_ids=t.topk_ids.long())),
    "weights transposed": ("block", lambda t: replace(t, weights=relaid(t.weights, transposed))),
    "weights apart": ("none", lambda t: replace(t, weights=relaid(t.weights, apart))),
    "scales per tensor apart": ("tensor_static", lambda t: replace(t, weights=relaid(t.weights, apart))),
    "scales per channel apart": ("channel_tok", lambda t: replace(t, weights=relaid(t.weights, apart))),
}
"""To each a scheme, and what changes: weights together with their scales and biases."""


@BOTH
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(cls: type[TritonStages], layout: str, device: torch.device) -> None:
    scheme, change = LAYOUTS[layout]
    tensors = build(replace(LAYER, scheme=scheme, bias=True), device)
    alike(run(cls, tensors), run(cls, change(tensors)))


@BOTH
@pytest.mark.parametrize("scheme", ["block", "none"])
def test_given_output(cls: type[TritonStages], scheme: str, device: torch.device) -> None:
    tensors = build(replace(LAYER, scheme=scheme), device)
    alone = run(cls, tensors)
    wide = torch.full((5, 2 * 136), 7.0, dtype=alone.dtype, device=device)
    output = wide[:, ::2]
    assert run(cls, tensors, output=output) is output
    alike(alone, output)
    assert bool((wide[:, 1::2] == 7.0).all())
    in_place = tensors.hidden_states.clone()
    assert run(cls, replace(tensors, hidden_states=in_place), output=in_place) is in_place
    alike(alone, in_place)


@BOTH
@pytest.mark.parametrize("scheme", SCHEMES)
def test_no_tokens_and_no_slots(cls: type[TritonStages], scheme: str, device: torch.device) -> None:
    tensors = build(replace(LAYER, scheme=scheme), device)
    none = replace(
        tensors,
        hidden_states=tensors.hidden_states[:0],
        topk_ids=tensors.topk_ids[:0],
        topk_weights=tensors.topk_weights[:0],
    )
    assert run(cls, none).shape == (0, 136)
    slots = replace(tensors, topk_ids=tensors.topk_ids[:, :0], topk_weights=tensors.topk_weights[:, :0])
    given = torch.full_like(tensors.hidden_states, torch.nan)
    assert run(cls, slots, output=given) is given
    assert not bool(given.any())
    nobody = replace(tensors, topk_ids=torch.full_like(tensors.topk_ids, -1))
    assert not bool(run(cls, nobody).any())


# -- whose tokens --


@BOTH
@pytest.mark.parametrize(
    ("scheme", "dtype"), [("block", torch.int32), ("tensor_dyn", torch.int64), ("none", torch.int32)]
)
def test_a_map_of_experts(cls: type[TritonStages], scheme: str, dtype: torch.dtype, device: torch.device) -> None:
    """Through a map that is no shift, and with the ids that it gives."""
    tensors = build(replace(LAYER, scheme=scheme), device)
    config = replace(tensors.config, num_experts=7)
    expert_map = torch.tensor([-1, 2, 0, -1, -1, 1, -1], dtype=dtype, device=device)
    ids = (torch.arange(10, device=device, dtype=torch.int32) % 8 - 1).view(5, 2)
    mapped = torch.where(ids >= 0, expert_map[ids.clamp(min=0).long()].int(), -1)
    there = replace(tensors, config=config, topk_ids=ids)
    here = replace(tensors, config=config, topk_ids=mapped)
    alike(run(cls, here), run(cls, there, expert_map=expert_map))
    assert bool(run(cls, here).any())


@BOTH
@pytest.mark.parametrize("scheme", ["block", "channel_tok", "none"])
def test_a_nan_stays_in_its_token(cls: type[TritonStages], scheme: str, device: torch.device) -> None:
    tensors = build(replace(LAYER, scheme=scheme), device)
    ids = torch.tensor([[0, 1], [0, 1], [1, 2], [2, 0], [-1, -1]], dtype=torch.int32, device=device)
    clean = run(cls, replace(tensors, topk_ids=ids))
    hidden = tensors.hidden_states.clone()
    hidden[2, 5] = torch.nan
    hidden[4] = torch.nan
    got = run(cls, replace(tensors, topk_ids=ids, hidden_states=hidden))
    assert bool(got[2].isnan().all())
    assert not bool(got[4].any())
    alike(clean[[0, 1, 3]], got[[0, 1, 3]])


@BOTH
@pytest.mark.parametrize("scheme", ["block", "tensor_dyn", "tensor_tok", "none"])
def test_same_bits_whatever_lies_in_memory(
    cls: type[TritonStages], scheme: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is allocated holds NaN the second time; pairs that are absent must not bring it in."""
    tensors = build(replace(LAYER, scheme=scheme), device)
    weights = tensors.topk_weights.masked_fill(tensors.topk_ids < 0, torch.nan)
    tensors = replace(tensors, topk_weights=weights)
    assert bool(weights.isnan().any())
    first = run(cls, tensors)
    allocate = torch.empty

    def poisoned(*size: Any, **options: Any) -> Tensor:
        tensor = allocate(*size, **options)
        return tensor.view(torch.uint8).fill_(0xFF).view(tensor.dtype) if tensor.numel() else tensor

    monkeypatch.setattr(torch, "empty", poisoned)
    alike(first, run(cls, tensors))
    assert not bool(first.isnan().any())


@BOTH
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_token_does_not_depend_on_its_batch(cls: type[TritonStages], scheme: str, device: torch.device) -> None:
    """Where that is declared, and in the interpreter, which declares nothing of its sums, where they are exact.

    The sizes are on both sides of where the height of a tile changes.
    """
    tensors = build(replace(LAYER, scheme=scheme, law="router", values="exact_sums", tokens=28), device)
    invariant = backend(cls, tensors).contract.batch_invariant
    if invariant is None and (device.type != "cpu" or scheme in ("none", "tensor_dyn")):
        pytest.skip("it is not known whether it is")
    if invariant is False:
        pytest.skip("it declares that it is not")
    some = torch.tensor([17, 3, 20], device=device)
    names = ("hidden_states", "topk_weights", "topk_ids")
    few = replace(tensors, **{name: getattr(tensors, name)[some] for name in names})
    alike(run(cls, tensors)[some], run(cls, few))


# -- graphs --


class Captured:
    """One call of a backend, captured after an eager one: Triton compiles in that, which no capture may do."""

    def __init__(self, experts: TritonStages, tensors: CaseTensors) -> None:
        names = ("hidden_states", "topk_weights", "topk_ids")
        self.hidden_states, self.topk_weights, self.topk_ids = (getattr(tensors, name).clone() for name in names)
        self.output = torch.full_like(self.hidden_states, torch.nan)
        self.experts = experts
        self.eager()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            experts.apply(self.hidden_states, self.topk_weights, self.topk_ids, output=self.output)

    def eager(self) -> Tensor:
        return self.experts.apply(self.hidden_states, self.topk_weights, self.topk_ids)

    def replay(self) -> Tensor:
        self.output.fill_(torch.nan)
        self.graph.replay()
        torch.cuda.synchronize()
        return self.output


@BOTH
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("tokens", [3, 33])
def test_captured_in_a_graph(cls: type[TritonStages], scheme: str, tokens: int, gpu: torch.device) -> None:
    """A replay has the bits of the eager call, also of tokens and routing that came after the capture."""
    case = replace(LAYER, scheme=scheme, tokens=tokens, experts=4, hidden=264, bias=True)
    tensors = build(case, gpu)
    captured = Captured(backend(cls, tensors), tensors)
    alike(captured.eager(), captured.replay())
    captured.hidden_states.copy_(captured.hidden_states.flip(0) * 2)
    captured.topk_ids.copy_(build(replace(case, law="all_to_one", seed=1), gpu).topk_ids)
    alike(captured.eager(), captured.replay())


@BOTH
@pytest.mark.parametrize("scheme", ["block", "none"])
@pytest.mark.parametrize("wrong", [3, 10**9, -(2**31), -2])
def test_an_id_out_of_range_in_a_graph(cls: type[TritonStages], scheme: str, wrong: int, gpu: torch.device) -> None:
    """Nothing can raise while a graph is replayed: the id counts as -1 there, and the next eager call raises."""
    tensors = build(replace(LAYER, scheme=scheme, law="router"), gpu)
    captured = Captured(backend(cls, tensors), tensors)
    captured.replay()
    alike(captured.eager(), captured.output)
    captured.topk_ids[1, 1] = -1
    expected = captured.eager()
    captured.topk_ids[1, 1] = wrong
    alike(expected, captured.replay())
    captured.topk_ids[1, 1] = -1
    with pytest.raises(InvalidMoEInput, match="in an earlier replay of a captured graph"):
        captured.eager()
    alike(expected, captured.eager())
    alike(expected, captured.replay())
    alike(expected, captured.eager())


@BOTH
def test_an_id_out_of_range_behind_a_map_in_a_graph(cls: type[TritonStages], gpu: torch.device) -> None:
    """Ids past the map, which would be read out of its bounds."""
    tensors = build(replace(LAYER, experts=6, ep="2:1", law="router"), gpu)
    experts, ids, output = backend(cls, tensors), tensors.topk_ids.clone(), torch.empty_like(tensors.hidden_states)
    call = (tensors.hidden_states, tensors.topk_weights, ids)
    experts.apply(*call, expert_map=tensors.expert_map)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        experts.apply(*call, expert_map=tensors.expert_map, output=output)
    ids[0] = -1
    expected = experts.apply(*call, expert_map=tensors.expert_map)
    ids[0] = torch.tensor([6, 2**30], dtype=ids.dtype, device=gpu)
    graph.replay()
    torch.cuda.synchronize()
    alike(expected, output)
    ids[0] = -1
    with pytest.raises(InvalidMoEInput, match="-1 <= id < 6 in every replay"):
        experts.apply(*call, expert_map=tensors.expert_map)
    alike(expected, experts.apply(*call, expert_map=tensors.expert_map))


# -- sizes --


@pytest.mark.parametrize("scheme", ["block", "tensor_tok", "none"])
@pytest.mark.parametrize(
    ("cls", "hidden", "inter"),
    [(TritonExperts, 128, 4096), (TritonExperts, 8192, 128), (BatchedTritonExperts, 128, 4096)],
)
def test_tensors_past_two_to_the_31_elements(
    cls: type[TritonStages], hidden: int, inter: int, scheme: str, gpu: torch.device
) -> None:
    """The first GEMM's result, or hidden states and results, with more elements than an int32 counts."""
    case = Case(tokens=64, experts=1, top_k=1, hidden=hidden, inter=inter, scheme=scheme, law="router")
    few = build(case, gpu)
    copies = 2**31 // (8192 * 64) + 2
    names = ("hidden_states", "topk_weights", "topk_ids")
    many = replace(few, **{name: getattr(few, name).repeat(copies, 1) for name in names})
    expected, got = run(cls, few), run(cls, many)
    assert bool(expected.any())
    for part in (got[:64], got[-64:]):
        alike(expected, part)
    del got
    torch.cuda.empty_cache()
