"""Intel's kernels beside their released source, on a played library."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from conformance.build import build
from fp8moe import BackendUnavailable, InvalidMoEInput, MoEWeights, Platform
from fp8moe.backends import xpu
from fp8moe.backends.libraries import LibraryCall
from fp8moe.backends.torch_experts import TorchExperts
from tests.contracts.layers import CASES, as_fnuz, case, same, with_holes
from tests.contracts.released import XPU

WeightsAlone = TorchExperts.with_recipe(xpu.XpuExperts.contract.recipe)


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

            def apply(moe, *args: Any, **kwargs: Any) -> None:
                self.answer(moe.given, call.bind(moe, *args, **kwargs).arguments)

        return SimpleNamespace(XpuFusedMoe=XpuFusedMoe, FUSEDMOE_AVAILABLE=True, FUSEDMOE_UNAVAILABLE_REASON=None)

    def answer(self, made: Mapping[str, Any], given: Mapping[str, Any]) -> None:
        assert made["w13"].is_contiguous()
        assert made["w2"].is_contiguous()
        turned = [made[name].transpose(1, 2).contiguous() for name in ("w13", "w2")]
        bias = made["w13_bias"]
        if made["activation"] == "swigluoai":  # its operator takes gate and up in turn
            turned[0] = torch.cat([turned[0][:, ::2], turned[0][:, 1::2]], 1)
            bias = None if bias is None else torch.cat([bias[:, ::2], bias[:, 1::2]], 1)
        weights = MoEWeights(*turned, made["w13_scales"], made["w2_scales"], bias, made["w2_bias"])
        experts = WeightsAlone(self.config, self.quant, weights)
        assert made["activation"] == self.config.activation
        assert (given["topk_ids"] >= 0).all()
        placed, ranks, local = given["expert_map"], made["ep_size"], made["num_experts"]
        if placed is None and ranks > 1:  # the library then has a map of its own
            placed = torch.arange(ranks * local, dtype=torch.int32) - made["ep_rank"] * local
            placed = placed.masked_fill((placed < 0) | (placed >= local), -1)
        experts.apply(
            given["hidden_states"],
            given["topk_weights"],
            given["topk_ids"],
            expert_map=placed,
            output=given["output"],
        )


@pytest.mark.parametrize("scheme", ["none", "tensor_none", "tensor_dyn"])
@pytest.mark.parametrize(
    "fields",
    [*CASES.values(), {"bias": True}, {"activation": "gelu"}, {"activation": "swigluoai", "bias": True}],
    ids=[*CASES, "bias", "gelu", "swigluoai"],
)
def test_xpu(scheme: str, fields: dict[str, Any]) -> None:
    tensors = build(case(scheme, **fields), "cpu")
    expected = tensors.call(WeightsAlone(tensors.config, tensors.quant, tensors.weights))
    adapter = PlayedXpu(tensors.config, tensors.quant, tensors.weights)
    assert same(tensors.call(adapter), expected)


@pytest.mark.parametrize("scheme", ["none", "tensor_dyn"])
@pytest.mark.parametrize("fields", [{}, {"ep": "2:1"}])
def test_xpu_knows_no_absent_pair(scheme: str, fields: dict[str, Any]) -> None:
    tensors = with_holes(case(scheme, **fields))
    expected = tensors.call(WeightsAlone(tensors.config, tensors.quant, tensors.weights))
    assert same(tensors.call(PlayedXpu(tensors.config, tensors.quant, tensors.weights)), expected)


def test_ids_of_one_rank_are_that_ranks() -> None:
    """The library takes them for global ones where it knows of several ranks."""
    tensors = build(case("none", ep="2:1"), "cpu")
    local = replace(tensors, topk_ids=tensors.topk_ids % 4, expert_map=None)
    expected = local.call(WeightsAlone(tensors.config, tensors.quant, tensors.weights))
    assert same(local.call(PlayedXpu(tensors.config, tensors.quant, tensors.weights)), expected)


@pytest.mark.parametrize(("activation", "rounding"), [("silu", "input"), ("gelu", "input"), ("swigluoai", "float32")])
def test_what_its_operators_round_is_declared(activation: str, rounding: str) -> None:
    tensors = build(case("none", activation=activation), "cpu")
    assert PlayedXpu(tensors.config, tensors.quant, tensors.weights).contract.recipe.gate_output == rounding


def test_other_activations_are_refused() -> None:
    tensors = build(case("none", activation="swiglustep"), "cpu")
    with pytest.raises(BackendUnavailable, match="activation=swiglustep: expected gelu, silu, swigluoai"):
        PlayedXpu(tensors.config, tensors.quant, tensors.weights)


@pytest.mark.parametrize("scheme", ["block", "channel_tok", "tensor_static"])
def test_schemes_that_the_library_would_take_for_others_are_refused(scheme: str) -> None:
    tensors = build(case(scheme), "cpu")
    with pytest.raises(BackendUnavailable, match=f"{scheme}: expected none, tensor_none, tensor_dyn"):
        PlayedXpu(tensors.config, tensors.quant, tensors.weights)


def test_xpu_has_as_many_experts_on_each_rank() -> None:
    tensors = build(case("none", ep="2:1"), "cpu")
    assert tensors.expert_map is not None
    adapter = PlayedXpu(tensors.config, tensors.quant, tensors.weights)
    adapter.config = replace(adapter.config, num_local_experts=6)
    call = LibraryCall.of(tensors.hidden_states, tensors.topk_weights, tensors.topk_ids, tensors.expert_map, 6)
    with pytest.raises(InvalidMoEInput, match="expert_map is of 8 experts: expected 12"):
        adapter.compute(call, tensors.hidden_states.clone())


def test_a_token_has_as_many_experts_as_the_library_was_told() -> None:
    """It makes its buffers for that many, and writes as many as there are."""
    tensors = build(case("none"), "cpu")
    adapter = PlayedXpu(tensors.config, tensors.quant, tensors.weights)
    fewer = replace(tensors, topk_ids=tensors.topk_ids[:, :2], topk_weights=tensors.topk_weights[:, :2])
    with pytest.raises(InvalidMoEInput, match="topk_ids is of 2 for each token: expected experts_per_token = 3"):
        fewer.call(adapter)


def test_xpu_without_its_extensions_says_why() -> None:
    class Without(PlayedXpu):
        def library(self) -> Any:
            return SimpleNamespace(FUSEDMOE_AVAILABLE=False, FUSEDMOE_UNAVAILABLE_REASON="libsycl.so.9 is missing")

    tensors = build(case("none"), "cpu")
    with pytest.raises(BackendUnavailable, match=r"do not load: libsycl.so.9 is missing; install vllm-xpu-kernels"):
        Without(tensors.config, tensors.quant, tensors.weights)


def test_codes_of_another_format_are_refused() -> None:
    tensors = build(case("tensor_none"), "cpu")
    with pytest.raises(
        BackendUnavailable, match=r"weights of dtype torch.float8_e4m3fnuz: expected torch.float8_e4m3fn"
    ):
        PlayedXpu(tensors.config, tensors.quant, as_fnuz(tensors.weights))
