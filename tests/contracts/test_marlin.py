"""MARLIN beside vLLM's released operators, on played ones with the schemas that its compiled files register."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from conformance.build import CaseTensors, build
from fp8moe import PLATFORMS, BackendUnavailable, MoEWeights, Platform
from fp8moe.backends import marlin
from fp8moe.backends.torch_experts import TorchExperts
from fp8moe.kernels import few
from tests.contracts import played_marlin
from tests.contracts.few import few_by_torch
from tests.contracts.layers import CASES, LAYER, ByTorch, case, same, with_holes
from tests.contracts.released import VLLM

NAMESPACE = "fp8moe_played_marlin"
AsDeclared = TorchExperts.with_recipe(marlin.MarlinExperts.contract.recipe)


@pytest.fixture(scope="module")
def operators() -> Iterator[dict[str, str]]:
    """Registers played operators under the real ones' schemas, so that the dispatcher checks what they are given."""
    schemas = VLLM.schemas("vllm/_moe_C_stable_libtorch.abi3.so", marlin.OPERATORS)
    played = {"moe_align_block_size": played_marlin.align, "moe_wna16_marlin_gemm": played_marlin.gemm}
    library = torch.library.Library(NAMESPACE, "DEF")
    for name, schema in schemas.items():
        library.define(schema)
        library.impl(name, played[name], "CPU")
    yield schemas
    library._destroy()


@pytest.fixture
def by_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lays few pairs out as it does many."""
    monkeypatch.setattr(few, "FEW", 0)
    monkeypatch.setattr(few, "place_few_pairs", None)


@pytest.fixture
def in_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(few, "place_few_pairs", few_by_torch)
    monkeypatch.setattr(marlin.MarlinExperts, "_many_by_library", None)


class PlayedMarlin(ByTorch, marlin.MarlinExperts):
    def platform(self) -> Platform:
        return PLATFORMS["h200"]

    def multiprocessors(self) -> int:
        return 3

    def library(self) -> Any:
        return SimpleNamespace(**{name: getattr(getattr(torch.ops, NAMESPACE), name) for name in marlin.OPERATORS})


def with_rounded_scales(tensors: CaseTensors) -> MoEWeights:
    """As the kernel has them: in the hidden states' dtype."""
    rounded = {
        name: getattr(tensors.weights, name).to(tensors.config.in_dtype).float() for name in ("w13_scale", "w2_scale")
    }
    return replace(tensors.weights, **rounded)


def declared(tensors: CaseTensors) -> TorchExperts:
    return AsDeclared(tensors.config, tensors.quant, with_rounded_scales(tensors))


@pytest.mark.parametrize("scheme", ["block", "tensor_dyn", "channel_tok"])
@pytest.mark.parametrize(
    "fields",
    [*CASES.values(), {"bias": True}, {"inter": 192}, {"activation": "gelu"}, {"dtype": "fp16"}, {"tokens": 42}],
    ids=[*CASES, "bias", "filled up", "gelu", "fp16", "larger tiles"],
)
@pytest.mark.usefixtures("operators", "in_one_launch")
def test_marlin(scheme: str, fields: dict[str, Any]) -> None:
    tensors = build(case(scheme, **fields), "cpu")
    adapter = PlayedMarlin(tensors.config, tensors.quant, tensors.weights)
    assert same(tensors.call(adapter), tensors.call(declared(tensors)))


@pytest.mark.parametrize("scheme", ["block", "tensor_dyn", "channel_tok"])
@pytest.mark.parametrize("inter", [128, 192])
@pytest.mark.parametrize("activation", sorted(marlin.MarlinExperts.support.activations))
@pytest.mark.usefixtures("operators", "in_one_launch")
def test_marlin_with_every_activation(scheme: str, inter: int, activation: str) -> None:
    tensors = build(case(scheme, inter=inter, activation=activation, bias=activation == "swigluoai"), "cpu")
    adapter = PlayedMarlin(tensors.config, tensors.quant, tensors.weights)
    assert same(tensors.call(adapter), tensors.call(declared(tensors)))


@pytest.mark.parametrize("scheme", ["block", "tensor_dyn", "channel_tok"])
@pytest.mark.parametrize("fields", [{}, {"ep": "2:1"}])
@pytest.mark.parametrize("lay_out", ["in_one_launch", "by_the_library"])
@pytest.mark.usefixtures("operators")
def test_marlin_knows_no_absent_pair(
    scheme: str, fields: dict[str, Any], lay_out: str, request: pytest.FixtureRequest
) -> None:
    request.getfixturevalue(lay_out)
    tensors = with_holes(case(scheme, **fields))
    expected = tensors.call(declared(tensors))
    assert same(tensors.call(PlayedMarlin(tensors.config, tensors.quant, tensors.weights)), expected)


@pytest.mark.parametrize("fields", [*CASES.values(), {"tokens": 70}], ids=[*CASES, "larger tiles"])
@pytest.mark.usefixtures("operators", "by_the_library")
def test_marlin_of_many_pairs(fields: dict[str, Any]) -> None:
    tensors = build(case("block", **fields), "cpu")
    adapter = PlayedMarlin(tensors.config, tensors.quant, tensors.weights)
    assert same(tensors.call(adapter), tensors.call(declared(tensors)))


def test_the_id_of_the_weights_type_is_what_the_release_computes() -> None:
    """exponent, mantissa, sign, bias, finite alone, NaN's kind, from the lowest bit on (vllm/scalar_type.py)."""
    source = VLLM.source("vllm/scalar_type.py")
    assert re.search(r"float8_e4m3fn = ScalarType\.float_\(\s*4, 3, True, NanRepr\.EXTD_RANGE_MAX_MIN", source)
    fields = ((4, 8), (3, 8), (1, 1), (0, 32), (1, 1), (2, 8))
    packed, at = 0, 0
    for value, width in fields:
        packed, at = packed | value << at, at + width
    assert packed == marlin.E4M3


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"scheme": "none"}, "weights of dtype torch.bfloat16: expected torch.float8_e4m3fn"),
        ({"hidden": 192}, "hidden_dim=192: expected a multiple of 128"),
        ({"experts": 993, "hidden": 128, "inter": 16}, "num_experts=993: expected at most 992"),
        ({"activation": "swiglustep"}, "activation=swiglustep: expected gelu, gelu_no_mul, relu2_no_mul, silu"),
    ],
)
def test_what_marlin_cannot_take_is_refused(fields: dict[str, Any], why: str) -> None:
    tensors = build(replace(LAYER, **fields), "cpu")
    with pytest.raises(BackendUnavailable, match=re.escape(why)):
        PlayedMarlin(tensors.config, tensors.quant, tensors.weights)
