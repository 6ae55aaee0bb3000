"""VLLM_CUTLASS and its batched form beside vLLM's released operators, on played ones with their registered schemas."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from conformance.build import CaseTensors, build
from fp8moe import PLATFORMS, BackendUnavailable, GroupShape, Platform
from fp8moe.backends import batched_vllm_cutlass, cutlass_stages, vllm_cutlass
from fp8moe.backends.torch_experts import BatchedTorchExperts, TorchExperts
from fp8moe.experts import FusedMoEPermuteExpertsUnpermute
from fp8moe.scaling import quantize
from tests.contracts.layers import CASES, LAYER, ByTorch, case, same, with_holes
from tests.contracts.released import VLLM

NAMESPACE = "fp8moe_played_cutlass"
OF_C = (cutlass_stages.GEMM, *cutlass_stages.QUANTISE, vllm_cutlass.SIZES, batched_vllm_cutlass.SIZES)


def as_declared(
    tensors: CaseTensors, cls: type[TorchExperts] | type[BatchedTorchExperts] = TorchExperts
) -> FusedMoEPermuteExpertsUnpermute:
    recipe = cutlass_stages.contract_on(PLATFORMS["h200"], tensors.quant).recipe
    return cls.with_recipe(recipe)(tensors.config, tensors.quant, tensors.weights)


def permute(
    values: Tensor,
    ids: Tensor,
    numbers: Tensor,
    placed: Tensor | None,
    experts: int,
    local: int,
    top_k: int,
    taken: Tensor,
    offsets: Tensor,
    places: Tensor,
    pairs: Tensor,
) -> None:
    """Rows by local expert, those without one at the end, where nothing is written."""
    assert torch.equal(numbers.flatten(), torch.arange(ids.numel(), dtype=torch.int32))
    assert experts == (local if placed is None else placed.numel())
    owner = ids.long().flatten() if placed is None else placed.long()[ids.long().flatten()]
    order = torch.argsort(torch.where(owner < 0, local, owner), stable=True)
    here = int((owner >= 0).sum())
    taken.view(torch.uint8).fill_(0x7F)  # NaN: what is there must not be looked at
    taken.view(torch.uint8)[:here] = values.view(torch.uint8)[order[:here] // top_k]
    offsets.copy_(torch.searchsorted(torch.where(owner < 0, local, owner)[order], torch.arange(local + 1)))
    places.view(-1)[order] = torch.arange(ids.numel(), dtype=torch.int32)
    pairs[:here] = order[:here].to(torch.int32)


def unpermute(values: Tensor, weights: Tensor, places: Tensor, offsets: Tensor | None, top_k: int, out: Tensor) -> None:
    assert offsets is not None
    total = torch.zeros(out.shape)
    for slot in range(top_k):
        row = places[:, slot].long()
        term = weights[:, slot, None] * values[row].float()
        total = total + torch.where((row < offsets[-1])[:, None], term, 0.0)
    out.copy_(total)


def sizes(offsets: Tensor, first: Tensor, second: Tensor, n: int, k: int, swapped: bool) -> None:
    counts = offsets.diff().to(torch.int32)
    for table, columns, terms in ((first, 2 * n, k), (second, k, n)):
        table[:, 0], table[:, 1], table[:, 2] = (columns, counts, terms) if swapped else (counts, columns, terms)


def gemm(*given: Any) -> None:
    out, a, b, a_scale, b_scale, offsets, table, a_strides, b_strides, c_strides, per_token, per_channel = given
    assert offsets.dtype == torch.int64
    assert per_token == per_channel
    assert all(stride.tolist() == [a.shape[1]] * len(b) for stride in (a_strides, b_strides))
    assert c_strides.tolist() == [out.shape[1]] * len(b)
    for expert in range(len(b)):
        m, n, k = table[expert].tolist()
        if len(a) <= 64:  # what the kernel does by itself; sizes that are the other way round go unnoticed
            m, n = n, m
        assert (n, k) == tuple(b.shape[1:])
        rows = slice(int(offsets[expert]), int(offsets[expert]) + m)
        scale = a_scale[rows] if per_token else a_scale
        matrix = b[expert].float() * b_scale[expert].reshape(-1, 1)
        out[rows] = ((a[rows].float() * scale) @ matrix.t()).to(out.dtype)


def batched_sizes(
    offsets: Tensor, first: Tensor, second: Tensor, counts: Tensor, experts: int, longest: int, n: int, k: int
) -> None:
    assert (offsets.dtype, len(counts)) == (torch.int32, experts)
    offsets.copy_(torch.arange(experts) * longest)
    swapped = experts * longest <= 64
    for table, columns, terms in ((first, 2 * n, k), (second, k, n)):
        table[:, 0], table[:, 1], table[:, 2] = (columns, counts, terms) if swapped else (counts, columns, terms)


def through(group: GroupShape, codes: Tensor, values: Tensor, scale: Tensor, **rule: Any) -> None:
    found, measured = quantize(values, group, **rule)
    codes.view(torch.uint8).copy_(found.view(torch.uint8))
    scale.copy_(measured.reshape(scale.shape))


def static(codes: Tensor, values: Tensor, scale: Tensor, shape: Any = None) -> None:
    codes.view(torch.uint8).copy_(
        quantize(values, GroupShape.PER_TENSOR, scale, scaling="reciprocal")[0].view(torch.uint8)
    )


def per_token(codes: Tensor, values: Tensor, scale: Tensor, bound: Tensor | None) -> None:
    through(GroupShape.PER_TOKEN, codes, values.nan_to_num(), scale, amax_floor=2.0**-9)


def per_tensor(codes: Tensor, values: Tensor, scale: Tensor) -> None:
    floor = cutlass_stages.SMALLEST_SCALE * 448
    through(GroupShape.PER_TENSOR, codes, values, scale, scaling="reciprocal", amax_floor=floor)


@pytest.fixture(scope="module", autouse=True)
def operators() -> Iterator[None]:
    """Registers played operators under the real ones' schemas, so that the dispatcher checks what they are given."""
    played: dict[str, Any] = {
        "moe_permute": permute,
        "moe_unpermute": unpermute,
        "cutlass_moe_mm": gemm,
        "get_cutlass_moe_mm_problem_sizes_from_expert_offsets": sizes,
        "get_cutlass_batched_moe_mm_data": batched_sizes,
        "static_scaled_fp8_quant": static,
        "dynamic_scaled_fp8_quant": per_tensor,
        "dynamic_per_token_scaled_fp8_quant": per_token,
    }
    schemas = VLLM.schemas("vllm/_C_stable_libtorch.abi3.so", OF_C)
    schemas |= VLLM.schemas("vllm/_moe_C_stable_libtorch.abi3.so", vllm_cutlass.PERMUTE)
    library = torch.library.Library(NAMESPACE, "DEF")
    for name, schema in schemas.items():
        library.define(schema)
        library.impl(name, played[name], "CPU")
    yield
    library._destroy()


class Played(ByTorch, cutlass_stages.CutlassStages):
    def platform(self) -> Platform:
        return PLATFORMS["h200"]

    def library(self) -> Any:
        namespace = getattr(torch.ops, NAMESPACE)
        names = (*OF_C, *vllm_cutlass.PERMUTE)
        return SimpleNamespace(**{name: getattr(namespace, name) for name in names})


class PlayedCutlass(Played, vllm_cutlass.VllmCutlassExperts):
    pass


class PlayedBatchedCutlass(Played, batched_vllm_cutlass.BatchedVllmCutlassExperts):
    pass


@pytest.mark.parametrize("scheme", ["channel_tok", "tensor_dyn", "tensor_static"])
@pytest.mark.parametrize(
    "fields",
    [
        *CASES.values(),
        {"inter": 48},
        {"activation": "gelu"},
        {"activation": "swigluoai"},
        {"dtype": "fp16"},
        {"tokens": 40, "ep": "2:0"},
    ],
    ids=[*CASES, "narrow", "gelu", "swigluoai", "fp16", "more than 64 rows"],
)
def test_vllms_cutlass(scheme: str, fields: dict[str, Any]) -> None:
    tensors = build(case(scheme, **fields), "cpu")
    adapter = PlayedCutlass(tensors.config, tensors.quant, tensors.weights)
    experts = as_declared(tensors)
    assert same(tensors.call(adapter), tensors.call(experts))


@pytest.mark.parametrize("scheme", ["channel_tok", "tensor_dyn", "tensor_static"])
@pytest.mark.parametrize("fields", [{}, {"ep": "2:1"}])
def test_vllms_cutlass_knows_no_absent_pair(scheme: str, fields: dict[str, Any]) -> None:
    tensors = with_holes(case(scheme, **fields))
    expected = tensors.call(as_declared(tensors))
    assert same(tensors.call(PlayedCutlass(tensors.config, tensors.quant, tensors.weights)), expected)


@pytest.mark.parametrize("rows", [63, 64, 65])
def test_sizes_are_told_the_way_round_that_the_kernel_computes(rows: int) -> None:
    tensors = build(case("channel_tok", tokens=rows, top_k=1), "cpu")
    adapter = PlayedCutlass(tensors.config, tensors.quant, tensors.weights)
    assert same(tensors.call(adapter), tensors.call(as_declared(tensors)))


class OnBlackwell(PlayedCutlass):
    def platform(self) -> Platform:
        return PLATFORMS["b200"]

    def fallback(self) -> FusedMoEPermuteExpertsUnpermute:
        return TorchExperts(self.config, self.quant, self.weights)


@pytest.mark.parametrize(("tokens", "by_cutlass"), [(1, False), (8, False), (9, True)])
@pytest.mark.parametrize("holes", [False, True])
def test_few_tokens_go_to_triton_on_blackwell(tokens: int, by_cutlass: bool, holes: bool) -> None:
    made = case("channel_tok", tokens=tokens, ep="2:1")
    tensors = with_holes(made) if holes else build(made, "cpu")
    adapter = OnBlackwell(tensors.config, tensors.quant, tensors.weights)
    recipe = (as_declared(tensors) if by_cutlass else TorchExperts).contract.recipe
    assert adapter.contract.for_tokens(tokens).recipe == recipe
    expected = TorchExperts.with_recipe(recipe)(tensors.config, tensors.quant, tensors.weights)
    assert same(tensors.call(adapter), tensors.call(expected))


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"scheme": "block"}, "block: expected channel_tok, tensor_dyn, tensor_static"),
        ({"hidden": 200}, "hidden_dim=200: expected a multiple of 16"),
        ({"inter": 40}, "intermediate_size_per_partition=40: expected a multiple of 16"),
        ({"activation": "swiglustep"}, "activation=swiglustep: expected gelu, silu, swigluoai"),
        ({"bias": True}, "biases: the grouped GEMM has none"),
    ],
)
def test_what_vllms_cutlass_cannot_take_is_refused(fields: dict[str, Any], why: str) -> None:
    tensors = build(replace(LAYER, **({"scheme": "channel_tok"} | fields)), "cpu")
    with pytest.raises(BackendUnavailable, match=re.escape(why)):
        PlayedCutlass(tensors.config, tensors.quant, tensors.weights)


@pytest.mark.parametrize("scheme", ["channel_tok", "tensor_static"])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"tokens": 1},
        {"law": "skewed"},
        {"ep": "2:1"},
        {"inter": 48},
        {"activation": "gelu"},
        {"activation": "swigluoai"},
        {"tokens": 40},
    ],
    ids=["plain", "one token", "few experts", "a rank of two", "narrow", "gelu", "swigluoai", "more than 64 rows"],
)
def test_vllms_batched_cutlass(scheme: str, fields: dict[str, Any]) -> None:
    for tensors in (build(case(scheme, **fields), "cpu"), with_holes(case(scheme, **fields))):
        adapter = PlayedBatchedCutlass(tensors.config, tensors.quant, tensors.weights)
        experts = as_declared(tensors, BatchedTorchExperts)
        assert same(tensors.call(adapter), tensors.call(experts))


def test_the_scales_order_is_that_of_the_product_the_kernel_computes() -> None:
    tensors = build(case("channel_tok"), "cpu")
    contract = PlayedCutlass(tensors.config, tensors.quant, tensors.weights).contract
    orders = {rows: steps.scale_order for rows in (64, 65) if (steps := contract.steps_for(rows)) is not None}
    assert orders == {64: "activation_first", 65: "weights_first"}
    assert OnBlackwell(tensors.config, tensors.quant, tensors.weights).contract.for_tokens(9).steps is None


@pytest.mark.parametrize("longest", [1, 8, 9])
def test_batches_are_long_enough_for_the_product_that_is_declared(
    longest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = build(case("channel_tok"), "cpu")  # eight experts: 64 rows and more than that
    adapter = PlayedBatchedCutlass(tensors.config, tensors.quant, tensors.weights)
    rows = []
    whole = adapter.gemm
    monkeypatch.setattr(adapter, "gemm", lambda out, *given: (rows.append(len(out)), whole(out, *given)))
    batches = tensors.hidden_states[:1].expand(8, longest, -1).contiguous()
    found = adapter.apply_batched(batches, torch.full((8,), longest))
    assert found.shape == batches.shape
    assert rows == [72, 72]
    steps = adapter.contract.steps_for(1)
    assert steps is not None
    assert steps.scale_order == "weights_first"


def test_one_scale_for_all_experts_batches_is_refused() -> None:
    tensors = build(case("tensor_dyn"), "cpu")
    with pytest.raises(BackendUnavailable, match="tensor_dyn: expected channel_tok, tensor_static"):
        PlayedBatchedCutlass(tensors.config, tensors.quant, tensors.weights)
