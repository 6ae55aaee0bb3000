"""AITER beside its released source, on a played library."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from enum import IntEnum
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from conformance.build import build
from fp8moe import PLATFORMS, BackendUnavailable, InvalidMoEInput, MoEWeights, Platform
from fp8moe.backends import aiter
from fp8moe.backends.torch_experts import TorchExperts
from tests.contracts.layers import CASES, case, last_of_slots, same, with_holes, with_repeats
from tests.contracts.released import AITER, played


def enumeration(name: str) -> type[IntEnum]:
    """From the header that the compiled module is made of."""
    text = AITER.source("aiter_meta/csrc/include/aiter_enum.h")
    found = re.search(rf"enum class {name}\s*:\s*int\s*{{([^}}]*)}}", text)
    assert found, f"no {name}"
    members: dict[str, int] = {}
    for entry in filter(None, (part.strip() for part in found[1].split(","))):
        key, _, value = (part.strip() for part in entry.partition("="))
        members[key] = int(value) if value else max(members.values(), default=-1) + 1
    return IntEnum(name, members)  # type: ignore[return-value]


def from_tiles(shuffled: Tensor) -> Tensor:
    """(E, n, k): place by place of a tile of 16 rows and 32 columns, in parts of 16 bytes."""
    experts, n, k = shuffled.shape
    part = 16 // shuffled.element_size()
    numbers = torch.uint8 if shuffled.element_size() == 1 else torch.int16
    flat = shuffled.view(numbers).reshape(experts, -1)
    row, column = torch.meshgrid(torch.arange(n), torch.arange(k), indexing="ij")
    tile = (row // 16) * (k // 32) + column // 32
    place = tile * 512 + column % 32 // part * 16 * part + row % 16 * part + column % part
    return flat[:, place.flatten()].reshape(experts, n, k)


class PlayedAiter(aiter.AiterExperts):
    device = "mi355x"

    def platform(self) -> Platform:
        return PLATFORMS[self.device]

    def library(self) -> Any:
        self.kinds = {name: enumeration(name) for name in ("QuantType", "ActivationType")}
        signature = AITER.signature("aiter/fused_moe.py", "fused_moe")
        return SimpleNamespace(fused_moe=played(signature, self.answer), **self.kinds)

    def answer(self, given: Mapping[str, Any]) -> Tensor:
        wide = self.quant.w1.dtype is None
        for name in ("w1", "w2"):
            assert given[name].is_shuffled
        assert (given["topk_ids"].dtype, given["topk_weight"].dtype) == (torch.int32, torch.float32)
        assert (given["topk_ids"] >= 0).all()
        self.seen = given["quant_type"].name
        fnuz = given["w1"].dtype == torch.float8_e4m3fnuz
        scales = [given[name] for name in ("w1_scale", "w2_scale", "a1_scale", "a2_scale")]
        if fnuz:
            scales = [None if value is None else value / 2 for value in scales]
        dtype = given["w1"].dtype if wide else torch.float8_e4m3fn
        w13, w2 = (from_tiles(given[name]).view(dtype) for name in ("w1", "w2"))
        weights = MoEWeights(w13, w2, *scales[:2], None, None, *scales[2:])
        experts = TorchExperts(self.config, self.quant, weights)
        mask, ids = given["expert_mask"], given["topk_ids"]
        assert mask[-1] == 0
        placed = torch.where(mask == 1, mask.cumsum(0) - 1, -1).to(torch.int32)
        ids = last_of_slots(placed[ids.long()])  # as its sort
        assert given["dtype"] == given["hidden_states"].dtype
        return experts.apply(given["hidden_states"], given["topk_weight"], ids)


class PlayedAiterFnuz(PlayedAiter):
    device = "mi300x"


@pytest.mark.parametrize("cls", [PlayedAiter, PlayedAiterFnuz])
@pytest.mark.parametrize("scheme", ["block", "tensor_static", "tensor_dyn", "channel_tok", "none"])
@pytest.mark.parametrize("fields", CASES.values(), ids=CASES)
def test_aiter(cls: type[PlayedAiter], scheme: str, fields: dict[str, Any]) -> None:
    tensors = build(case(scheme, **fields), "cpu")
    adapter = cls(tensors.config, tensors.quant, tensors.weights)
    expected = tensors.call(TorchExperts(tensors.config, tensors.quant, tensors.weights))
    assert same(tensors.call(adapter), expected)
    assert adapter.seen == {"block": "per_128x128", "channel_tok": "per_Token", "none": "No"}.get(scheme, "per_Tensor")


@pytest.mark.parametrize("scheme", ["block", "tensor_dyn", "channel_tok", "none"])
@pytest.mark.parametrize("fields", [{}, {"ep": "2:1"}])
def test_aiter_knows_no_absent_pair(scheme: str, fields: dict[str, Any]) -> None:
    tensors = with_holes(case(scheme, **fields))
    expected = tensors.call(TorchExperts(tensors.config, tensors.quant, tensors.weights))
    assert same(tensors.call(PlayedAiter(tensors.config, tensors.quant, tensors.weights)), expected)


@pytest.mark.parametrize("scheme", ["block", "channel_tok", "none"])
@pytest.mark.parametrize("fields", [{}, {"ep": "2:1"}])
def test_aiter_knows_an_expert_once_a_token(scheme: str, fields: dict[str, Any]) -> None:
    tensors, once = with_repeats(case(scheme, **fields))
    expected = once.call(TorchExperts(tensors.config, tensors.quant, tensors.weights))
    assert same(tensors.call(PlayedAiter(tensors.config, tensors.quant, tensors.weights)), expected)


def test_what_its_source_rounds_to_16_bits_is_declared() -> None:
    """The intermediate, and the second GEMM's results, each added to the output as it comes."""
    stages = AITER.source("aiter/fused_moe.py").partition("def fused_moe_2stages(")[2]
    assert re.search(r"a2 = torch\.empty\(\s*\(token_num, topk, inter_dim\),\s*dtype=dtype,", stages)
    kernels = "aiter_meta/3rdparty/composable_kernel/include/ck/tensor_operation/gpu/device/impl"
    for name in ("device_moe_gemm.hpp", "device_moe_gemm_blockscale.hpp"):
        assert re.search(r"IsInputGemm \? \w+::Set\s*: \w+::AtomicAdd", AITER.source(f"{kernels}/{name}"))
    recipe = aiter.AiterExperts.contract.recipe
    assert (recipe.activation_output, recipe.weighted, recipe.combine) == ("input", "input", "input")


def test_aiter_numbers_experts_by_their_global_ids() -> None:
    tensors = build(case("block", ep="2:1"), "cpu")
    assert tensors.expert_map is not None
    turned = torch.where(tensors.expert_map >= 0, 3 - tensors.expert_map, -1)
    adapter = PlayedAiter(tensors.config, tensors.quant, tensors.weights)
    with pytest.raises(InvalidMoEInput, match="expert_map is not ascending"):
        replace(tensors, expert_map=turned).call(adapter)


@pytest.mark.parametrize("fields", [{"inter": 192}, {"hidden": 320}])
def test_layers_of_parts_of_blocks_are_refused(fields: dict[str, Any]) -> None:
    """A scale of the gate's last rows would be one of the up's first as well."""
    tensors = build(case("block", **fields), "cpu")
    with pytest.raises(BackendUnavailable, match=r"=(192|320): expected a multiple of 128"):
        PlayedAiter(tensors.config, tensors.quant, tensors.weights)


def test_biases_that_the_library_passes_over_are_refused() -> None:
    tensors = build(case("block", bias=True), "cpu")
    with pytest.raises(BackendUnavailable, match="biases: AITER passes over them"):
        PlayedAiter(tensors.config, tensors.quant, tensors.weights)


def test_a_device_that_the_selector_takes_and_the_library_does_not_is_refused() -> None:
    class On90a(PlayedAiter):
        device = "mi250x"

    tensors = build(case("block"), "cpu")
    with pytest.raises(BackendUnavailable, match="for ROCm on gfx942 and gfx950, not gfx90a"):
        On90a(tensors.config, tensors.quant, tensors.weights)


def test_an_activation_that_wants_the_gate_that_is_not_there_is_refused() -> None:
    tensors = build(case("block", activation="relu2_no_mul"), "cpu")
    config = replace(tensors.config, activation="silu")
    with pytest.raises(BackendUnavailable, match=r"silu does not go without a gate \(is_act_and_mul=False\)"):
        PlayedAiter(config, tensors.quant, tensors.weights)
