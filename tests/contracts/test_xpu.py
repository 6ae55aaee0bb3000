"""Intel's kernels beside their released source, on a played library."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest

from conformance.build import build
from fp8moe import BackendUnavailable, InvalidMoEInput, MoEWeights, Platform
from fp8moe.backends import xpu
from fp8moe.backends.torch_experts import TorchExperts
from tests.contracts.layers import CASES, case, same, with_holes
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
                moe.total_experts_num = moe.given["num_experts"] * moe.given["ep_size"]

            def apply(moe, *args: Any, **kwargs: Any) -> None:
                self.answer(moe.given, call.bind(moe, *args, **kwargs).arguments)

        return SimpleNamespace(XpuFusedMoe=XpuFusedMoe, FUSEDMOE_AVAILABLE=True, FUSEDMOE_UNAVAILABLE_REASON=None)

    def answer(self, made: Mapping[str, Any], given: Mapping[str, Any]) -> None:
        assert made["w13"].is_contiguous()
        assert made["w2"].is_contiguous()
        turned = [made[name].transpose(1, 2).contiguous() for name in ("w13", "w2")]
        weights = MoEWeights(*turned, made["w13_scales"], made["w2_scales"], made["w13_bias"], made["w2_bias"])
        experts = WeightsAlone(self.config, self.quant, weights)
        assert made["activation"] == self.config.activation
        assert (given["topk_ids"] >= 0).all()
        experts.apply(
            given["hidden_states"],
            given["topk_weights"],
            given["topk_ids"],
            expert_map=given["expert_map"],
            output=given["output"],
        )


@pytest.mark.parametrize("scheme", ["none", "tensor_none", "tensor_dyn"])
@pytest.mark.parametrize("fields", [*CASES.values(), {"bias": True}], ids=[*CASES, "bias"])
def test_xpu(scheme: str, fields: dict[str, Any]) -> None:
    tensors = build(case(scheme, **fields), "cpu")
    expected = tensors.call(WeightsAlone(tensors.config, tensors.quant, tensors.weights))
    adapter = PlayedXpu(tensors.config, tensors.quant, tensors.weights)
    assert same(tensors.call(adapter), expected)
    if not tensors.apply_router_weight_on_input:
        holes, filled = with_holes(tensors)
        assert same(holes.call(adapter), filled.call(WeightsAlone(tensors.config, tensors.quant, tensors.weights)))


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
