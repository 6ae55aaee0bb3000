"""AITER, XPU and FLASHINFER_TRTLLM beside the libraries' released source, on played libraries: evidence class contract.

A played library has the signatures of the real one, read from its wheel, so that an argument that is no more, or one
that is missing, is an error. It reads the weights back by their layout's definition, and computes with TorchExperts: an
adapter that converts, scales, packs or places anything wrongly gives other bits than TorchExperts on the checkpoint.
None of this says that the real kernel does so, or that it is right.
"""

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

from conformance.build import CaseTensors, build
from conformance.cases import Case
from fp8moe import PLATFORMS, BackendUnavailable, InvalidMoEInput, MoEWeights, Platform
from fp8moe.backends import aiter, flashinfer_trtllm, xpu
from fp8moe.backends.libraries import LibraryExperts, loaded
from fp8moe.backends.torch_experts import TorchExperts
from tests.contracts.released import AITER, DEFAULT, FLASHINFER, XPU, played

LAYER = Case(tokens=7, experts=8, top_k=3, hidden=256, inter=128)
CASES = {
    "plain": {},
    "one token": {"tokens": 1},
    "a rank of two": {"ep": "2:1"},
    "weights on the input": {"top_k": 1, "weight_on_input": True},
    "rows apart": {"layout": "strided"},
    "few experts": {"law": "skewed", "seed": 3},
}


def case(scheme: str, **fields: Any) -> Case:
    return replace(LAYER, scheme=scheme, **fields)


def bits(values: Tensor) -> Tensor:
    return values.contiguous().view(torch.uint8)


def same(got: Tensor, expected: Tensor) -> bool:
    return got.dtype == expected.dtype and torch.equal(bits(got), bits(expected))


def with_holes(tensors: CaseTensors) -> tuple[CaseTensors, CaseTensors]:
    """Without an expert in one place, and in all of one token's; and the same for who knows no -1: another expert with
    no weight, on another rank where there is one. (With fewer rows an expert's product may have other bits.)"""
    other = 0 if tensors.expert_map is None else int((tensors.expert_map < 0).int().argmax())
    ids, filled, weights = tensors.topk_ids.clone(), tensors.topk_ids.clone(), tensors.topk_weights.clone()
    for place in ((0, 0), (-1, slice(None))):
        ids[place], filled[place], weights[place] = -1, other, 0.0
    return replace(tensors, topk_ids=ids), replace(tensors, topk_ids=filled, topk_weights=weights)


# -- AITER --


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
    """(E, n, k): place by place of a tile of 16 rows and two parts of 16 columns."""
    experts, n, k = shuffled.shape
    flat = bits(shuffled).reshape(experts, -1)
    row, column = torch.meshgrid(torch.arange(n), torch.arange(k), indexing="ij")
    tile = (row // 16) * (k // 32) + column // 32
    place = tile * 512 + column % 32 // 16 * 256 + row % 16 * 16 + column % 16
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
        w13, w2 = (given[name] if wide else from_tiles(given[name]).view(torch.float8_e4m3fn) for name in ("w1", "w2"))
        weights = MoEWeights(w13, w2, *scales[:2], given["bias1"], given["bias2"], *scales[2:])
        experts = TorchExperts(self.config, self.quant, weights)
        mask = given["expert_mask"]
        placed = None
        if mask is not None:
            assert mask[-1] == 0
            placed = torch.where(mask[:-1] == 1, mask[:-1].cumsum(0) - 1, -1).to(torch.int32)
        assert given["dtype"] == given["hidden_states"].dtype
        return experts.apply(given["hidden_states"], given["topk_weight"], given["topk_ids"], expert_map=placed)


class PlayedAiterFnuz(PlayedAiter):
    device = "mi300x"


@pytest.mark.parametrize("cls", [PlayedAiter, PlayedAiterFnuz])
@pytest.mark.parametrize("scheme", ["block", "tensor_static", "tensor_dyn", "channel_tok"])
@pytest.mark.parametrize("fields", CASES.values(), ids=CASES)
def test_aiter(cls: type[PlayedAiter], scheme: str, fields: dict[str, Any]) -> None:
    tensors = build(case(scheme, **fields), "cpu")
    adapter = cls(tensors.config, tensors.quant, tensors.weights)
    expected = tensors.call(TorchExperts(tensors.config, tensors.quant, tensors.weights))
    assert same(tensors.call(adapter), expected)
    assert adapter.seen == {"block": "per_128x128", "channel_tok": "per_Token"}.get(scheme, "per_Tensor")


@pytest.mark.parametrize("scheme", ["block", "channel_tok"])
@pytest.mark.parametrize("fields", [{}, {"ep": "2:1"}])
def test_aiter_knows_no_absent_pair(scheme: str, fields: dict[str, Any]) -> None:
    tensors, filled = with_holes(build(case(scheme, **fields), "cpu"))
    expected = filled.call(TorchExperts(tensors.config, tensors.quant, tensors.weights))
    assert same(tensors.call(PlayedAiter(tensors.config, tensors.quant, tensors.weights)), expected)


def test_aiter_numbers_experts_by_their_global_ids() -> None:
    tensors = build(case("block", ep="2:1"), "cpu")
    assert tensors.expert_map is not None
    turned = torch.where(tensors.expert_map >= 0, 3 - tensors.expert_map, -1)
    adapter = PlayedAiter(tensors.config, tensors.quant, tensors.weights)
    with pytest.raises(InvalidMoEInput, match="expert_map is not ascending"):
        replace(tensors, expert_map=turned).call(adapter)


# -- XPU --


class PlayedXpu(xpu.XpuExperts):
    def platform(self) -> Platform:
        return Platform("xpu")

    def library(self) -> Any:
        path = "vllm_xpu_kernels/fused_moe_interface.py"
        for name in ("FUSEDMOE_AVAILABLE", "FUSEDMOE_UNAVAILABLE_REASON"):
            assert name in XPU.source(path)
        made, call = (XPU.signature(path, f"XpuFusedMoe.{name}") for name in ("__init__", "apply"))

        class XpuFusedMoe:
            def __init__(moe, *args: Any, **kwargs: Any) -> None:
                moe.given = made.bind(moe, *args, **kwargs).arguments
                moe.total_experts_num = moe.given["num_experts"] * moe.given["ep_size"]

            def apply(moe, *args: Any, **kwargs: Any) -> None:
                self.answer(moe.given, call.bind(moe, *args, **kwargs).arguments)

        return SimpleNamespace(XpuFusedMoe=XpuFusedMoe, FUSEDMOE_AVAILABLE=True, FUSEDMOE_UNAVAILABLE_REASON=None)

    def answer(self, made: Mapping[str, Any], given: Mapping[str, Any]) -> None:
        assert made["w13"].is_contiguous()
        assert made["w2"].is_contiguous()
        turned = [made[name].transpose(1, 2).contiguous() for name in ("w13", "w2")]
        weights = MoEWeights(*turned, made["w13_scales"], made["w2_scales"], made["w13_bias"], made["w2_bias"])
        experts = TorchExperts(self.config, self.quant, weights)
        assert made["activation"] == self.config.activation
        assert (given["topk_ids"] >= 0).all()
        experts.apply(
            given["hidden_states"],
            given["topk_weights"],
            given["topk_ids"],
            expert_map=given["expert_map"],
            output=given["output"],
        )


@pytest.mark.parametrize("scheme", ["none", "tensor_none"])
@pytest.mark.parametrize("fields", [*CASES.values(), {"bias": True}], ids=[*CASES, "bias"])
def test_xpu(scheme: str, fields: dict[str, Any]) -> None:
    tensors = build(case(scheme, **fields), "cpu")
    expected = tensors.call(TorchExperts(tensors.config, tensors.quant, tensors.weights))
    adapter = PlayedXpu(tensors.config, tensors.quant, tensors.weights)
    assert same(tensors.call(adapter), expected)
    if not tensors.apply_router_weight_on_input:
        holes, filled = with_holes(tensors)
        assert same(holes.call(adapter), filled.call(TorchExperts(tensors.config, tensors.quant, tensors.weights)))


def test_xpu_has_as_many_experts_on_each_rank() -> None:
    tensors = build(case("none", ep="2:1"), "cpu")
    assert tensors.expert_map is not None
    adapter = PlayedXpu(tensors.config, tensors.quant, tensors.weights)
    adapter.moe.total_experts_num = 12
    with pytest.raises(InvalidMoEInput, match="expert_map is of 8 experts: expected 12"):
        tensors.call(adapter)


def test_xpu_without_its_extensions_says_why() -> None:
    class Without(PlayedXpu):
        def library(self) -> Any:
            return SimpleNamespace(FUSEDMOE_AVAILABLE=False, FUSEDMOE_UNAVAILABLE_REASON="libsycl.so.9 is missing")

    tensors = build(case("none"), "cpu")
    with pytest.raises(BackendUnavailable, match=r"do not load: libsycl.so.9 is missing; install vllm-xpu-kernels"):
        Without(tensors.config, tensors.quant, tensors.weights)


# -- FLASHINFER_TRTLLM --


def from_rows(values: Tensor, width: int) -> Tensor:
    """(E, n, k): in each run of 8 rows times `width`, place i + 8 j holds row width i + j."""
    n = values.shape[1]
    row = torch.arange(n)
    run = 8 * width
    place = row // run * run + row % run // width + 8 * (row % run % width)
    return values[:, place]


class PlayedTrtllm(flashinfer_trtllm.FlashInferTrtllmExperts):
    def platform(self) -> Platform:
        return PLATFORMS["b200"]

    def library(self) -> Any:
        names: dict[str, Any] = {}
        exec(compile(FLASHINFER.source("flashinfer/tllm_enums.py"), "tllm_enums", "exec"), names)
        public = FLASHINFER.source("flashinfer/fused_moe/__init__.py")
        for name in flashinfer_trtllm.NAMES:
            assert f'"{name}"' in public, f"flashinfer.fused_moe gives no {name}"
        function = flashinfer_trtllm.NAMES[0]
        signature = FLASHINFER.signature("flashinfer/fused_moe/core.py", function)
        enums = {name: names[name] for name in flashinfer_trtllm.NAMES[1:]}
        return SimpleNamespace(**enums, **{function: played(signature, self.answer)})

    def answer(self, given: Mapping[str, Any]) -> None:
        assert (int(given["weight_layout"]), given["use_shuffled_weight"]) == (2, True)
        assert given["fp8_quantization_type"].name == "DeepSeekFp8"
        assert given["hidden_states_scale"].is_contiguous()
        inter, local = given["intermediate_size"], given["local_num_experts"]
        first, second = (
            from_rows(bits(given[name]).transpose(1, 2).flatten(2), 2) for name in ("gemm1_weights", "gemm2_weights")
        )
        scale = given["gemm1_weights_scale"]
        blocks = scale.shape[1] // 2
        weights = MoEWeights(
            torch.cat([first[:, inter:], first[:, :inter]], 1).view(torch.float8_e4m3fn),
            second.contiguous().view(torch.float8_e4m3fn),
            torch.cat([scale[:, blocks:], scale[:, :blocks]], 1),
            given["gemm2_weights_scale"],
        )
        words = given["topk_ids"]
        ids, lower = words >> 16, words & 0xFFFF
        routing = torch.where(lower >= 1 << 15, lower - (1 << 16), lower).to(torch.int16).view(torch.bfloat16).float()
        spread = given["hidden_states_scale"].t().repeat_interleave(128, 1)[:, : self.config.hidden_dim]
        hidden = given["hidden_states"].float() * spread
        placed = torch.arange(given["num_experts"], dtype=torch.int32) - given["local_expert_offset"]
        placed = placed.masked_fill((placed < 0) | (placed >= local), -1)
        self.seen = hidden
        experts = TorchExperts(replace(self.config, in_dtype=torch.bfloat16), self.quant, weights)
        # The dequantised states are the quantised ones again: each group's largest code is 448.
        experts.apply(hidden.bfloat16(), routing, ids, expert_map=placed, output=given["output"])


def rounded(tensors: CaseTensors) -> CaseTensors:
    """As the kernel gets them: states through FP8 and bf16, routing weights in bf16."""
    from fp8moe.quant import kFp8Dynamic128Sym
    from fp8moe.scaling import dequantize, quantize

    given = tensors.hidden_states
    if tensors.case.weight_on_input:
        given = (given.float() * tensors.topk_weights).to(given.dtype)
    codes, scale = quantize(given, kFp8Dynamic128Sym)
    states = dequantize(codes, scale, kFp8Dynamic128Sym).to(given.dtype)
    weights = torch.ones_like(tensors.topk_weights) if tensors.case.weight_on_input else tensors.topk_weights
    return replace(tensors, hidden_states=states, topk_weights=weights.bfloat16().float())


@pytest.mark.parametrize("fields", CASES.values(), ids=CASES)
def test_trtllm(fields: dict[str, Any]) -> None:
    tensors = build(case("block", **fields), "cpu")
    adapter = PlayedTrtllm(tensors.config, tensors.quant, tensors.weights)
    experts = TorchExperts(tensors.config, tensors.quant, tensors.weights)
    for given, filled in (
        (tensors, tensors),
        *(() if tensors.apply_router_weight_on_input else (with_holes(tensors),)),
    ):
        as_got = rounded(filled)
        expected = experts.apply(
            as_got.hidden_states, as_got.topk_weights, as_got.topk_ids, expert_map=as_got.expert_map
        )
        assert same(given.call(adapter), expected)


def test_trtllm_takes_experts_that_follow_each_other() -> None:
    tensors = build(case("block", ep="2:1"), "cpu")
    adapter = PlayedTrtllm(tensors.config, tensors.quant, tensors.weights)
    in_turn = torch.tensor([0, -1, 1, -1, 2, -1, 3, -1], dtype=torch.int32)
    with pytest.raises(InvalidMoEInput, match="expert_map is not one run of experts"):
        replace(tensors, expert_map=in_turn).call(adapter)


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"scheme": "tensor_static"}, "tensor_static: only `block` has an entry that takes chosen experts"),
        ({"inter": 192}, "intermediate_size_per_partition=192: expected a multiple of 128"),
        ({"hidden": 320}, "hidden_dim=320: expected a multiple of 128"),
        ({"experts": 6}, "num_experts=6: expected a multiple of 4"),
        ({"experts": 16, "top_k": 11}, "experts_per_token=11: expected at most 10"),
        ({"dtype": "fp16"}, "in_dtype=torch.float16: expected torch.bfloat16"),
        ({"bias": True}, "biases: it has none"),
    ],
)
def test_what_trtllm_cannot_take_is_refused_before_it_is_loaded(fields: dict[str, Any], why: str) -> None:
    tensors = build(replace(LAYER, **fields), "cpu")
    with pytest.raises(BackendUnavailable, match=re.escape(why)):
        PlayedTrtllm(tensors.config, tensors.quant, tensors.weights)


# -- all of them --


@pytest.mark.parametrize(
    ("cls", "why"),
    [
        (aiter.AiterExperts, "AITER is for ROCm on gfx90a, gfx942 or gfx950, not cpu"),
        (xpu.XpuExperts, "needs an Intel XPU, and this device is cpu"),
        (flashinfer_trtllm.FlashInferTrtllmExperts, "TRTLLM's kernels are for CUDA SM10x, not cpu"),
    ],
)
def test_another_device_is_told_and_nothing_is_loaded(
    cls: type[LibraryExperts], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fp8moe.backends.libraries.detected_platform", lambda: PLATFORMS["cpu"])
    tensors = build(case("block"), "cpu")
    with pytest.raises(BackendUnavailable, match=why):
        cls(tensors.config, tensors.quant, tensors.weights)


def test_a_missing_library_and_another_version_name_the_remedy() -> None:
    with pytest.raises(BackendUnavailable, match=r"X: no_such_library does not load \(ModuleNotFound.*\); get it"):
        loaded("no_such_library", (), "X", "get it")
    with pytest.raises(BackendUnavailable, match="X: json has no swirl: another version; get it"):
        loaded("json", ("loads", "swirl"), "X", "get it")


def test_a_parameter_that_is_no_more_is_an_error() -> None:
    call = played(AITER.signature("aiter/fused_moe.py", "fused_moe"), lambda given: given)
    with pytest.raises(TypeError, match="swirl"):
        call(1, 2, 3, 4, 5, swirl=6)
    with pytest.raises(TypeError, match="topk_ids"):
        call(1, 2, 3, 4)
    assert DEFAULT not in call(1, 2, 3, 4, 5).values()
