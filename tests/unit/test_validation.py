"""Bad input to a backend: each is a named error that says what was given and what is expected."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fp8moe.backends.torch_experts import BatchedTorchExperts, TorchExperts
from fp8moe.config import FusedMoEConfig, FusedMoEParallelConfig, RoutingMethodType
from fp8moe.experts import MoEWeights
from fp8moe.quant import FusedMoEQuantConfig, quantize
from fp8moe.registry import BackendUnavailable
from fp8moe.schemes import SCHEMES
from fp8moe.validation import InvalidMoEInput, scale_shape

EXPERTS, HIDDEN, INTER, TOKENS, TOP_K = 3, 384, 136, 5, 2
BOTH = pytest.mark.parametrize("backend", [TorchExperts, BatchedTorchExperts])


def config(**changes: Any) -> FusedMoEConfig:
    base = FusedMoEConfig(
        EXPERTS,
        TOP_K,
        HIDDEN,
        INTER,
        EXPERTS,
        "silu",
        "cpu",
        RoutingMethodType.Renormalize,
        FusedMoEParallelConfig.make_no_parallel(),
        torch.bfloat16,
    )
    return replace(base, **changes)


def layer(scheme: str) -> tuple[FusedMoEQuantConfig, MoEWeights]:
    quant = FusedMoEQuantConfig.from_keys(*SCHEMES[scheme])
    tensors = {"w13": torch.randn(EXPERTS, 2 * INTER, HIDDEN) / 16, "w2": torch.randn(EXPERTS, HIDDEN, INTER) / 16}
    if quant.w1.dtype is None:
        return quant, MoEWeights(**{name: tensor.bfloat16() for name, tensor in tensors.items()})
    assert quant.w1.shape is not None
    fields: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        parts = [quantize(part, quant.w1.shape) for part in tensor.chunk(2 if name == "w13" else 1, dim=1)]
        if quant.w1.shape.is_per_tensor():
            parts = [quantize(tensor, quant.w1.shape)]
        fields[name] = torch.cat([codes.view(torch.uint8) for codes, _ in parts], dim=1).view(torch.float8_e4m3fn)
        scale = torch.cat([scale for _, scale in parts], dim=1)
        fields[f"{name}_scale"] = scale.reshape(scale_shape(quant.w1.shape, *tensor.shape, 2 if name == "w13" else 1))
    if quant.a1.static and quant.a1.dtype is not None:
        fields |= {"a13_scale": torch.tensor(0.01), "a2_scale": torch.tensor([0.02])}
    return quant, MoEWeights(**fields)


def call() -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(TOKENS, HIDDEN).bfloat16(),
        "topk_weights": torch.rand(TOKENS, TOP_K),
        "topk_ids": torch.randint(0, EXPERTS, (TOKENS, TOP_K), dtype=torch.int32),
    }


@BOTH
@pytest.mark.parametrize("scheme", [name for name in SCHEMES if name != "nvfp4"])
def test_what_is_right_is_taken(backend: type[TorchExperts], scheme: str) -> None:
    quant, weights = layer(scheme)
    result = backend(config(), quant, weights).apply(**call())
    assert result.shape == (TOKENS, HIDDEN)
    assert result.dtype == torch.bfloat16
    assert result.isfinite().all()


WRONG_WEIGHTS: list[tuple[str, str, Callable[[MoEWeights], dict[str, Any]], str]] = [
    ("block", "w13", lambda w: {"w13": w.w13[:, :-1]}, "2I or I"),
    ("block", "w2", lambda w: {"w2": w.w2.transpose(1, 2)}, "hidden_dim, I"),
    ("block", "w13", lambda w: {"w13": w.w13.float()}, "float8_e4m3fn"),
    ("none", "w13", lambda w: {"w13": w.w13.to(torch.float8_e4m3fn)}, "unquantised"),
    ("block", "w2", lambda w: {"w2": w.w2.view(torch.uint8).view(torch.float8_e4m3fnuz)}, "the dtype of w13"),
    ("block", "w13_scale", lambda w: {"w13_scale": None}, "fp32 scales per 128x128"),
    ("block", "w13_scale", lambda w: {"w13_scale": w.w13_scale[:, :-1]}, "one scale per 128x128"),
    ("block", "w2_scale", lambda w: {"w2_scale": w.w2_scale.transpose(1, 2)}, "one scale per 128x128"),
    ("channel_tok", "w2_scale", lambda w: {"w2_scale": w.w2_scale[..., 0]}, "one scale per channel"),
    ("tensor_dyn", "w2_scale", lambda w: {"w2_scale": w.w2_scale[:1]}, "one scale per tensor"),
    ("block", "w13_scale", lambda w: {"w13_scale": w.w13_scale.double()}, "float32"),
    ("block", "w2_scale", lambda w: {"w2_scale": w.w2_scale * torch.nan}, "finite"),
    ("channel_tok", "w13_scale", lambda w: {"w13_scale": w.w13_scale / 0}, "finite"),
    ("none", "w13_scale", lambda w: {"w13_scale": torch.ones(3)}, "not quantised"),
    ("tensor_static", "a13_scale", lambda w: {"a13_scale": None}, "statically"),
    ("tensor_static", "a2_scale", lambda w: {"a2_scale": torch.ones(3)}, "one element"),
    ("tensor_static", "a13_scale", lambda w: {"a13_scale": torch.tensor(-1.0)}, "positive"),
    ("tensor_dyn", "a13_scale", lambda w: {"a13_scale": torch.tensor(1.0)}, "not quantised statically"),
    ("block", "w13_bias", lambda w: {"w13_bias": torch.ones(EXPERTS, INTER)}, "rows"),
    ("block", "w2_scale", lambda w: {"w2_scale": w.w2_scale.to("meta")}, "the device of w13"),
]


@BOTH
@pytest.mark.parametrize(("scheme", "field", "change", "expected"), WRONG_WEIGHTS)
def test_wrong_weights(backend, scheme, field, change, expected) -> None:
    quant, weights = layer(scheme)
    with pytest.raises(InvalidMoEInput, match=expected) as raised:
        backend(config(), quant, replace(weights, **change(weights)))
    assert raised.value.field == field
    assert str(raised.value).startswith(field)


WRONG_CALLS: list[tuple[str, Callable[[dict[str, Any]], dict[str, Any]], str]] = [
    ("hidden_states", lambda c: {"hidden_states": c["hidden_states"][:, :-1]}, "hidden_dim=384"),
    ("hidden_states", lambda c: {"hidden_states": c["hidden_states"][0]}, "hidden_dim=384"),
    ("hidden_states", lambda c: {"hidden_states": c["hidden_states"].float()}, "in_dtype"),
    ("topk_ids", lambda c: {"topk_ids": c["topk_ids"][:-1]}, "M, top-k"),
    ("topk_ids", lambda c: {"topk_ids": c["topk_ids"].flatten()}, "M, top-k"),
    ("topk_ids", lambda c: {"topk_ids": c["topk_ids"].float()}, "int32"),
    ("topk_weights", lambda c: {"topk_weights": c["topk_weights"][:, :1]}, "shape of topk_ids"),
    ("topk_weights", lambda c: {"topk_weights": c["topk_weights"].bfloat16()}, "float32"),
    ("topk_ids", lambda c: {"topk_ids": c["topk_ids"] * 0 + EXPERTS}, "num_local_experts"),
    ("topk_ids", lambda c: {"topk_ids": c["topk_ids"] * 0 - 2}, "-1 <= id"),
    ("apply_router_weight_on_input", lambda _: {"apply_router_weight_on_input": True}, "top-1"),
    ("expert_map", lambda _: {"expert_map": torch.zeros(EXPERTS + 1, dtype=torch.int32)}, "num_experts"),
    ("expert_map", lambda _: {"expert_map": torch.zeros(EXPERTS)}, "int32"),
    ("expert_map", lambda _: {"expert_map": torch.full((EXPERTS,), EXPERTS, dtype=torch.int64)}, "local id"),
    ("output", lambda c: {"output": c["hidden_states"][:-1].clone()}, "shape of hidden_states"),
    ("output", lambda c: {"output": c["hidden_states"].float()}, "in_dtype"),
    ("hidden_states", lambda c: {"hidden_states": c["hidden_states"].to("meta")}, "device"),
]


@BOTH
@pytest.mark.parametrize(("field", "change", "expected"), WRONG_CALLS)
def test_wrong_calls(backend, field, change, expected) -> None:
    experts = backend(config(), *layer("block"))
    given_call = call()
    with pytest.raises(InvalidMoEInput, match=expected) as raised:
        experts.apply(**{**given_call, **change(given_call)})
    assert raised.value.field == field


@settings(max_examples=60, deadline=None)
@given(
    token=st.integers(0, TOKENS - 1),
    slot=st.integers(0, TOP_K - 1),
    bad=st.integers(-(2**31), 2**31 - 1).filter(lambda value: not -1 <= value < EXPERTS),
    dtype=st.sampled_from([torch.int32, torch.int64]),
)
def test_an_id_out_of_range_names_its_place(token: int, slot: int, bad: int, dtype: torch.dtype) -> None:
    experts = TorchExperts(config(), *layer("tensor_dyn"))
    arguments = call()
    ids = torch.zeros(TOKENS, TOP_K, dtype=dtype)
    ids[token, slot] = bad
    with pytest.raises(InvalidMoEInput) as raised:
        experts.apply(**{**arguments, "topk_ids": ids})
    assert f"{bad} at token {token}, slot {slot}" in str(raised.value)


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(["w13_scale", "w2_scale"]),
    bad=st.sampled_from([float("nan"), float("inf"), float("-inf")]),
    place=st.integers(0, 10**6),
    scheme=st.sampled_from(["block", "channel_tok", "tensor_tok"]),
)
def test_a_scale_that_is_not_finite_is_refused(name: str, bad: float, place: int, scheme: str) -> None:
    quant, weights = layer(scheme)
    scale = getattr(weights, name).clone()
    scale.view(-1)[place % scale.numel()] = bad
    with pytest.raises(InvalidMoEInput, match="finite") as raised:
        TorchExperts(config(), quant, replace(weights, **{name: scale}))
    assert raised.value.field == name


def test_weights_of_another_type() -> None:
    with pytest.raises(InvalidMoEInput, match="MoEWeights"):
        TorchExperts(config(), FusedMoEQuantConfig(), {"w13": None})  # type: ignore[arg-type]


def test_what_torch_experts_lacks_is_unavailable_and_not_wrong() -> None:
    quant = FusedMoEQuantConfig.from_keys(*SCHEMES["nvfp4"])
    with pytest.raises(BackendUnavailable, match="FP8"):
        TorchExperts(config(), quant, layer("block")[1])


def test_an_activation_nobody_knows() -> None:
    experts = TorchExperts(config(activation="mish"), *layer("block"))
    with pytest.raises(ValueError, match="'mish': expected one of silu"):
        experts.apply(**call())
