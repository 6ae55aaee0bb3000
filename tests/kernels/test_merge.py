"""A token's slots with one expert, merged: as torch does it where fp64 is exact, and in no order of the slots."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from conformance.build import build
from conformance.cases import Case
from fp8moe import PLATFORMS, Platform
from fp8moe.backends.flashinfer_cutlass import FlashInferCutlassExperts
from fp8moe.kernels.merge import merge_slots
from fp8moe.validation import ID_DTYPES
from tests.contracts.merged import merged_by_torch

pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
"""Of numpy, in Triton's interpreter."""

LAYER = {"scheme": "none", "tokens": 9, "experts": 8, "top_k": 3, "law": "repeated", "hidden": 128, "inter": 128}
SETTINGS = settings(max_examples=120, deadline=None)
WEIGHTS = {
    "alike": st.floats(0.0625, 1.0, width=32),
    "any": st.floats(width=32, allow_nan=False, allow_infinity=False),
    # Sums of these depend on their order in fp64, overflow fp32, or vanish.
    "apart": st.sampled_from(
        [0.0, -0.0, 1.0, -1.0, 3.0, 2.0**-24, 2.0**-53, -(2.0**-60), 2.0**60, -(2.0**60), 3e38, -3e38, 2.0**-149]
    ),
    "not finite": st.sampled_from([1.0, -2.0, float("inf"), float("-inf"), float("nan")]),
}


@dataclass(frozen=True)
class Call:
    """The arguments of `merge_slots`, on the CPU."""

    ids: Tensor
    weights: Tensor
    expert_map: Tensor | None
    experts: int

    def by_torch(self, **merge: bool) -> tuple[Tensor, Tensor, Tensor]:
        return merged_by_torch(self.ids, self.weights, self.expert_map, self.experts, **merge)

    def on(self, device: torch.device, **merge: bool) -> tuple[Tensor, Tensor, Tensor]:
        placed = None if self.expert_map is None else self.expert_map.to(device)
        found = merge_slots(self.ids.to(device), self.weights.to(device), placed, self.experts, **merge)
        assert [each.dtype for each in found] == [torch.int32, torch.float32, torch.bool]
        ids, weights, without = (each.cpu() for each in found)
        return ids, weights, without

    def weights_of(self, token: int, expert: int) -> list[float]:
        ids, weights, _ = self.by_torch(merge=False)
        return weights[token][ids[token] == expert].tolist()


@st.composite
def calls(draw: st.DrawFn, *weights: str) -> Call:
    """Of few experts, so that most tokens have one twice."""
    tokens, top_k, experts = draw(st.integers(0, 9)), draw(st.integers(1, 10)), draw(st.integers(1, 5))
    elsewhere = draw(st.none() | st.integers(0, 3))
    expert_map, every = None, experts
    if elsewhere is not None:
        local = draw(st.permutations([*range(experts), *[-1] * elsewhere]))
        expert_map, every = torch.tensor(local, dtype=draw(st.sampled_from([torch.int32, torch.int64]))), len(local)
    pairs = tokens * top_k
    outside = st.sampled_from([-1, -7, every, every + 1, 2**31 - 1, -(2**31)])
    ids = draw(st.lists(st.integers(0, every - 1) | outside, min_size=pairs, max_size=pairs))
    values = draw(st.lists(WEIGHTS[draw(st.sampled_from(weights))], min_size=pairs, max_size=pairs))
    return Call(
        torch.tensor(ids, dtype=torch.int64).to(draw(st.sampled_from(ID_DTYPES))).view(tokens, top_k),
        torch.tensor(values, dtype=torch.float32).view(tokens, top_k),
        expert_map,
        experts,
    )


def bits(values: Tensor) -> Tensor:
    """With all NaN the same: the sign of the one that infinity times 0 makes is the device's."""
    return torch.where(values.isnan(), torch.nan, values).view(torch.int32)


def exact(weights: list[float]) -> bool:
    """Whether fp64 adds them without rounding, in every order."""
    sizes = [Fraction(abs(weight)) for weight in weights if weight]
    return not sizes or sum(sizes) <= 2**29 * min(sizes)


@SETTINGS
@given(calls("alike", "not finite"))
def test_as_by_torch(device: torch.device, call: Call) -> None:
    """Bit for bit; what is not finite is so in every order, and makes NaN of a token's other experts."""
    (ids, sums, without), expected = call.on(device), call.by_torch()
    assert torch.equal(ids, expected[0])
    assert torch.equal(bits(sums), bits(expected[1]))
    assert torch.equal(without, expected[2])


@SETTINGS
@given(calls("any", "apart"))
@example(Call(torch.zeros(1, 4, dtype=torch.int64), torch.tensor([[-128.0, -128.0, -(2.0**60), 2.0**60]]), None, 1))
def test_sums_are_fp64s_smallest_weight_first(device: torch.device, call: Call) -> None:
    (ids, sums, without), (ids_by_torch, sums_by_torch, without_by_torch) = call.on(device), call.by_torch()
    assert torch.equal(ids, ids_by_torch)
    assert torch.equal(without, without_by_torch)
    for token, slot in torch.cartesian_prod(torch.arange(ids.shape[0]), torch.arange(ids.shape[1])).tolist():
        own = call.weights_of(token, int(ids[token, slot])) if ids[token, slot] < call.experts else []
        total = torch.zeros((), dtype=torch.float64)
        for weight in sorted(own):
            total += weight
        assert bits(sums[token, slot]) == bits(total.float())
        if exact(own):
            assert bits(sums[token, slot]) == bits(sums_by_torch[token, slot])


@SETTINGS
@given(calls("any", "apart"), st.randoms(use_true_random=False))
def test_no_order_of_the_slots_shows(device: torch.device, call: Call, random: Random) -> None:
    order = random.sample(range(call.ids.shape[1]), call.ids.shape[1])

    def sums(call: Call) -> list[dict[int, int]]:
        ids, weights, _ = call.on(device)
        rows = zip(ids.tolist(), bits(weights).tolist(), strict=True)
        return [{expert: found for expert, found in zip(*row, strict=True) if expert < call.experts} for row in rows]

    assert sums(call) == sums(replace(call, ids=call.ids[:, order], weights=call.weights[:, order]))


@SETTINGS
@given(calls("apart", "not finite"))
def test_unmerged_slots_keep_their_weights(device: torch.device, call: Call) -> None:
    (ids, weights, without), expected = call.on(device, merge=False), call.by_torch(merge=False)
    assert torch.equal(ids, expected[0])
    assert torch.equal(bits(weights), bits(expected[1]))
    assert torch.equal(without, expected[2])


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("mapped", [None, torch.int32, torch.int64])
@pytest.mark.parametrize(("tokens", "top_k", "experts"), [(1, 1, 1), (700, 8, 5), (130, 2, 3), (33, 20, 40)])
def test_many_tokens_with_any_strides(
    tokens: int, top_k: int, experts: int, mapped: torch.dtype | None, merge: bool, device: torch.device
) -> None:
    generator = torch.Generator().manual_seed(tokens)
    ids = torch.randint(-1, experts + 1, (tokens, 2 * top_k), generator=generator)[:, ::2]
    weights = torch.rand(top_k, tokens, generator=generator).t() + 0.5
    expert_map = None if mapped is None else torch.arange(experts, dtype=mapped).sub(experts // 3)
    call = Call(ids, weights, None if expert_map is None else expert_map.clamp(min=-1), experts)
    on_device = merge_slots(
        ids.to(device).repeat_interleave(2, 1)[:, ::2],
        weights.t().contiguous().to(device).t(),
        None if call.expert_map is None else call.expert_map.to(device),
        experts,
        merge=merge,
    )
    for found, expected in zip(on_device, call.by_torch(merge=merge), strict=True):
        assert torch.equal(found.cpu(), expected)


def test_the_first_slot_has_the_sum(device: torch.device) -> None:
    ids, weights = torch.tensor([[3, 7, 3, 3], [1, 2, -1, 4]]), torch.tensor([[1.0, 2.0, 4.0, 8.0]] * 2)
    found, sums, without = Call(ids, weights, torch.tensor([0, 1, 2, 3, -1, -1, 5, 2]), 4).on(device)
    assert found.tolist() == [[3, 2, 4, 4], [1, 2, 4, 4]]
    assert sums.tolist() == [[13.0, 2.0, 0.0, 0.0], [1.0, 2.0, 0.0, 0.0]]
    assert without.tolist() == [[False], [False]]


def test_a_local_id_that_no_expert_has_is_elsewhere(device: torch.device) -> None:
    """An eager call raises for such a map; in a captured one it counts as -1."""
    ids, weights = torch.tensor([[0, 1, 2, 2]]), torch.ones(1, 4)
    found, sums, without = Call(ids, weights, torch.tensor([2, 3, 1]), 2).on(device)
    assert (found.tolist(), sums.tolist(), without.tolist()) == ([[2, 2, 1, 2]], [[0.0, 0.0, 2.0, 0.0]], [[False]])


def test_captured_in_a_graph_it_merges_what_is_there_when_it_is_replayed(gpu: torch.device) -> None:
    ids, weights = torch.zeros(40, 3, dtype=torch.int32, device=gpu), torch.ones(40, 3, device=gpu)
    expert_map = torch.tensor([1, -1, 0], device=gpu)
    merge_slots(ids, weights, expert_map, 2)  # compiles it
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = merge_slots(ids, weights, expert_map, 2)
    generator = torch.Generator().manual_seed(0)
    ids.copy_(torch.randint(-1, 3, ids.shape, generator=generator))
    weights.copy_(torch.rand(weights.shape, generator=generator) + 0.5)
    graph.replay()
    expected = Call(ids.cpu(), weights.cpu(), expert_map.cpu(), 2).by_torch()
    assert all(torch.equal(got.cpu(), want) for got, want in zip(found, expected, strict=True))


class Played(FlashInferCutlassExperts):
    """Keeps what its library is given."""

    def platform(self) -> Platform:
        return PLATFORMS["h200"]

    def library(self) -> Any:
        return SimpleNamespace(
            ActivationType=SimpleNamespace(Swiglu="Swiglu", Relu2="Relu2"), cutlass_fused_moe=self.keep
        )

    def keep(self, **given: Any) -> None:
        self.given = given
        given["output"].fill_(torch.nan)


@pytest.mark.parametrize("ep", ["1:0", "2:1"])
@pytest.mark.parametrize(
    ("fields", "merge"),
    [
        ({}, True),
        ({"top_k": 1, "law": "uniform"}, False),
        ({"scheme": "tensor_static", "activation": "relu2_no_mul", "top_k": 2}, False),
        ({"scheme": "tensor_static", "activation": "relu2_no_mul", "top_k": 3}, True),
    ],
    ids=["no bits declared", "one slot", "declared bits", "of a sort that loses slots"],
)
def test_flashinfers_cutlass_merges_where_no_bits_are_declared(
    fields: dict[str, Any], merge: bool, ep: str, device: torch.device
) -> None:
    tensors = build(Case(**(LAYER | {"ep": ep} | fields)), device.type)
    ids = tensors.topk_ids.clone()
    ids[4] = -1
    adapter = Played(tensors.config, tensors.quant, tensors.weights)
    output = replace(tensors, topk_ids=ids).call(adapter)
    expert_map = None if tensors.expert_map is None else tensors.expert_map.cpu()
    call = Call(ids.cpu(), tensors.topk_weights.cpu(), expert_map, tensors.config.num_local_experts)
    placed, weights, _ = call.by_torch(merge=merge)
    assert torch.equal(adapter.given["token_selected_experts"].cpu(), placed)
    assert torch.equal(bits(adapter.given["token_final_scales"].cpu()), bits(weights))
    assert not output[4].any()
