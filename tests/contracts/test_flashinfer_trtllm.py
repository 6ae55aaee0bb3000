"""FlashInfer's TRTLLM kernels beside their released source, on a played library."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from conformance.bounds import judge
from conformance.build import CaseTensors, build
from conformance.oracles import trace_of
from fp8moe import PLATFORMS, BackendUnavailable, InvalidMoEInput, MoEWeights, Platform
from fp8moe.backends import flashinfer_trtllm
from fp8moe.backends.torch_experts import TorchExperts
from fp8moe.quant import kFp8Dynamic128Sym
from fp8moe.scaling import dequantize, quantize
from tests.contracts.layers import CASES, LAYER, as_fnuz, bits, case, last_of_slots, same, with_holes, with_repeats
from tests.contracts.released import FLASHINFER, played

AS_DECLARED = TorchExperts.with_recipe(flashinfer_trtllm.FlashInferTrtllmExperts.contract.recipe)


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
        ids = last_of_slots(ids)  # as its sort of few tokens
        experts = AS_DECLARED(replace(self.config, in_dtype=torch.bfloat16), self.quant, weights)
        # The dequantised states are the quantised ones again: each group's largest code is 448.
        experts.apply(hidden.bfloat16(), routing, ids, expert_map=placed, output=given["output"])


def rounded(tensors: CaseTensors) -> CaseTensors:
    """As the kernel gets them: states through FP8 and bf16, routing weights in bf16."""
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
    experts = AS_DECLARED(tensors.config, tensors.quant, tensors.weights)
    as_got = rounded(tensors)
    expected = experts.apply(as_got.hidden_states, as_got.topk_weights, as_got.topk_ids, expert_map=as_got.expert_map)
    assert same(tensors.call(adapter), expected)


@pytest.mark.parametrize("fields", [{}, {"ep": "2:1"}])
def test_trtllm_knows_no_absent_pair(fields: dict[str, Any]) -> None:
    tensors = with_holes(case("block", **fields))
    as_got = rounded(tensors)
    experts = AS_DECLARED(tensors.config, tensors.quant, tensors.weights)
    expected = experts.apply(as_got.hidden_states, as_got.topk_weights, as_got.topk_ids, expert_map=as_got.expert_map)
    assert same(tensors.call(PlayedTrtllm(tensors.config, tensors.quant, tensors.weights)), expected)


@pytest.mark.parametrize("fields", [{}, {"ep": "2:1"}])
def test_trtllm_knows_an_expert_once_a_token(fields: dict[str, Any]) -> None:
    tensors, once = with_repeats(case("block", **fields))
    as_got = rounded(once)
    experts = AS_DECLARED(tensors.config, tensors.quant, tensors.weights)
    expected = experts.apply(as_got.hidden_states, as_got.topk_weights, as_got.topk_ids, expert_map=as_got.expert_map)
    assert same(tensors.call(PlayedTrtllm(tensors.config, tensors.quant, tensors.weights)), expected)


@pytest.mark.parametrize("fields", CASES.values(), ids=CASES)
def test_what_is_computed_as_its_source_says_is_judged_to_be_right(fields: dict[str, Any]) -> None:
    """And what takes the first GEMM's result to the activation in fp32 is not."""
    tensors = build(case("block", **fields), "cpu")
    contract = PlayedTrtllm.contract
    trace = trace_of(tensors, contract.recipe)
    judgement = judge(trace, tensors.call(PlayedTrtllm(tensors.config, tensors.quant, tensors.weights)), None)
    assert judgement.passed, judgement.reason
    wide = TorchExperts.with_recipe(replace(contract.recipe, gemm1_output="float32"))
    assert not judge(trace, tensors.call(wide(tensors.config, tensors.quant, tensors.weights)), None).passed


def test_what_its_source_stores_in_16_bits_and_in_8_is_declared() -> None:
    source = FLASHINFER.source("flashinfer/data/csrc/trtllm_fused_moe_kernel_launcher.cu")
    (of_blocks,) = re.findall(r"class Fp8BlockScaleLauncher : .*?^};", source, re.DOTALL | re.MULTILINE)
    assert re.search(r"gemm1_output = alloc_tensor\(\{[^}]*\}, dl_uint8", of_blocks)
    assert re.search(r"gemm2_output = alloc_tensor\(\{[^}]*\}, dl_bfloat16", of_blocks)
    recipe = flashinfer_trtllm.FlashInferTrtllmExperts.contract.recipe
    assert (recipe.gemm1_output, recipe.gemm2_output, recipe.routing_weights) == ("float8", "input", "input")


def test_its_least_scale_is_declared() -> None:
    """Of the second GEMM's inputs, whose kernel is in the source, with the gate's and the up's scales for each 128."""
    source = FLASHINFER.source("flashinfer/data/csrc/fused_moe/trtllm_backend/trtllm_fused_moe_dev_kernel.cu")
    _, _, kernel = source.partition("void activationDeepSeekKernel(")
    kernel, _, _ = re.sub(r"\s+", "", kernel).partition("__global__")
    assert "scaleOut=fmaxf(aMaxArr[tokenInCtaIdx]/E4m3MaxVal,std::numeric_limits<float>::min());" in kernel
    assert "totalNumPaddedTokens*((hiddenIdx/128)+(params.innerDim/2/128))" in kernel
    assert "x1=scale1Arr[tokenInCtaIdx]*dataX1Arr[tokenInCtaIdx];" in kernel
    assert "outArr[tokenInCtaIdx]/scaleOut" in kernel
    recipe = flashinfer_trtllm.FlashInferTrtllmExperts.contract.recipe
    assert recipe.intermediate_amax_floor == 448 * torch.finfo(torch.float32).tiny
    assert (recipe.scale_division, recipe.scaling) == ("divide", "divide")


def test_trtllm_takes_experts_that_follow_each_other() -> None:
    tensors = build(case("block", ep="2:1"), "cpu")
    adapter = PlayedTrtllm(tensors.config, tensors.quant, tensors.weights)
    for placed in ([0, -1, 1, -1, 2, -1, 3, -1], [-1, -1, -1, -1, -1, -1, 0, 1]):
        with pytest.raises(InvalidMoEInput, match="expert_map is not one run of experts"):
            replace(tensors, expert_map=torch.tensor(placed, dtype=torch.int32)).call(adapter)


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


def test_kernels_that_would_be_fetched_unasked_are_told(tmp_path: Path) -> None:
    """Without the distribution of compiled kernels FlashInfer looks into a folder, and fetches what is not there."""
    assert f"{flashinfer_trtllm.CUBINS}: pathlib.Path = _get_cubin_dir()" in FLASHINFER.source("flashinfer/jit/env.py")
    for folder in (tmp_path, tmp_path / "none"):
        told = flashinfer_trtllm.no_cubins(folder)
        assert told.startswith(f"no kernels in {folder}, and FlashInfer would fetch them at the first call; install")
    (tmp_path / "kernels").mkdir()
    assert flashinfer_trtllm.no_cubins(tmp_path) == ""


def test_codes_of_another_format_are_refused() -> None:
    tensors = build(case("block"), "cpu")
    with pytest.raises(
        BackendUnavailable, match=r"weights of dtype torch.float8_e4m3fnuz: expected torch.float8_e4m3fn"
    ):
        PlayedTrtllm(tensors.config, tensors.quant, as_fnuz(tensors.weights))


def test_an_activation_that_wants_the_gate_that_is_not_there_is_refused() -> None:
    tensors = build(case("block", activation="relu2_no_mul"), "cpu")
    config = replace(tensors.config, activation="silu")
    with pytest.raises(BackendUnavailable, match=r"silu does not go without a gate \(is_act_and_mul=False\)"):
        PlayedTrtllm(config, tensors.quant, tensors.weights)
