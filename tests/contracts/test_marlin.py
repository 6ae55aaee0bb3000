"""MARLIN beside vLLM's released operators, on played ones with the schemas that its compiled files register."""

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
from fp8moe import PLATFORMS, BackendUnavailable, MoEWeights, Platform
from fp8moe.backends import marlin
from fp8moe.backends.torch_experts import TorchExperts
from fp8moe.layouts.marlin import EXPONENT_BITS
from tests.contracts.layers import CASES, LAYER, ByTorch, case, same, with_holes
from tests.contracts.released import VLLM
from tests.unit.test_layouts_marlin import read, unpermuted

NAMESPACE = "fp8moe_played_marlin"
AsDeclared = TorchExperts.with_recipe(marlin.MarlinExperts.contract.recipe)


def align(
    ids: Tensor, experts: int, rows: int, order: Tensor, owners: Tensor, count: Tensor, placed: Tensor | None
) -> None:
    """Each expert's pairs, filled up to whole tiles with a number that no pair has; experts elsewhere are left out."""
    flat = ids.flatten()
    order.fill_(flat.numel())
    owners.fill_(-1)
    at = 0
    for expert in range(experts):
        local = expert if placed is None else int(placed[expert])
        pairs = (flat == expert).nonzero()[:, 0]
        if local < 0 or not len(pairs):
            continue
        order[at : at + len(pairs)] = pairs.to(torch.int32)
        tiles = -(-len(pairs) // rows)
        owners[at // rows : at // rows + tiles] = local
        at += tiles * rows
    count.fill_(at)


def gemm(*given: Any) -> Tensor:
    a, c, codes, bias, scale, a_scales, global_scale, zeros, g_idx, perm, workspace, *rest = given
    order, owners, count, weights, rows, top_k, weighted, kind, m, n, k, full, atomic, fp32, zp, *threads = rest
    assert (a_scales, global_scale, zeros, g_idx, perm) == (None,) * 5
    assert (kind, full, atomic, fp32, zp, threads) == (2814749767172868, True, False, True, False, [-1, -1, -1])
    assert (a.shape, c.shape, a.is_contiguous()) == ((m, k), (m * top_k, n), True)
    assert workspace.dtype == torch.int32
    assert not workspace.any()
    exponent = 2 ** (EXPONENT_BITS[a.dtype] - 1) - 8
    for expert in sorted(set(owners[: int(count) // rows].tolist())):
        places = [order[t * rows : (t + 1) * rows] for t in range(int(count) // rows) if owners[t] == expert]
        pairs = torch.cat(places)
        pairs = pairs[pairs < m * top_k].long()
        groups = unpermuted(scale[expert], grouped=scale.shape[1] > 1).float() * 2.0**-exponent
        spread = groups.repeat_interleave(k // scale.shape[1], 0).T
        matrix = read(codes[expert], n, k).view(torch.float8_e4m3fn).float() * spread
        # On a device it was found to round before each step.
        result = (a[pairs // top_k].float() @ matrix.t()).to(c.dtype)
        if bias is not None:
            result = result + unpermuted(bias[expert], grouped=False).to(c.dtype)
        if weighted:
            result = result * weights.flatten()[pairs, None].to(c.dtype)
        c[pairs] = result
    return c.clone()


@pytest.fixture(scope="module")
def operators() -> Iterator[dict[str, str]]:
    """Registers played operators under the real ones' schemas, so that the dispatcher checks what they are given."""
    schemas = VLLM.schemas("vllm/_moe_C_stable_libtorch.abi3.so", marlin.OPERATORS)
    played = {"moe_align_block_size": align, "moe_wna16_marlin_gemm": gemm}
    library = torch.library.Library(NAMESPACE, "DEF")
    for name, schema in schemas.items():
        library.define(schema)
        library.impl(name, played[name], "CPU")
    yield schemas
    library._destroy()


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
    [*CASES.values(), {"bias": True}, {"inter": 192}, {"activation": "gelu"}, {"dtype": "fp16"}, {"tokens": 70}],
    ids=[*CASES, "bias", "filled up", "gelu", "fp16", "larger tiles"],
)
@pytest.mark.usefixtures("operators")
def test_marlin(scheme: str, fields: dict[str, Any]) -> None:
    tensors = build(case(scheme, **fields), "cpu")
    adapter = PlayedMarlin(tensors.config, tensors.quant, tensors.weights)
    assert same(tensors.call(adapter), tensors.call(declared(tensors)))


@pytest.mark.parametrize("scheme", ["block", "tensor_dyn", "channel_tok"])
@pytest.mark.parametrize("inter", [128, 192])
@pytest.mark.parametrize("activation", sorted(marlin.MarlinExperts.support.activations))
@pytest.mark.usefixtures("operators")
def test_marlin_with_every_activation(scheme: str, inter: int, activation: str) -> None:
    tensors = build(case(scheme, inter=inter, activation=activation, bias=activation == "swigluoai"), "cpu")
    adapter = PlayedMarlin(tensors.config, tensors.quant, tensors.weights)
    assert same(tensors.call(adapter), tensors.call(declared(tensors)))


@pytest.mark.parametrize("scheme", ["block", "tensor_dyn", "channel_tok"])
@pytest.mark.parametrize("fields", [{}, {"ep": "2:1"}])
@pytest.mark.usefixtures("operators")
def test_marlin_knows_no_absent_pair(scheme: str, fields: dict[str, Any]) -> None:
    tensors = with_holes(case(scheme, **fields))
    expected = tensors.call(declared(tensors))
    assert same(tensors.call(PlayedMarlin(tensors.config, tensors.quant, tensors.weights)), expected)


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
        ({"activation": "swiglustep"}, "activation=swiglustep: expected gelu, gelu_no_mul, relu2_no_mul, silu"),
    ],
)
def test_what_marlin_cannot_take_is_refused(fields: dict[str, Any], why: str) -> None:
    tensors = build(replace(LAYER, **fields), "cpu")
    with pytest.raises(BackendUnavailable, match=re.escape(why)):
        PlayedMarlin(tensors.config, tensors.quant, tensors.weights)
