"""A gate's part that is rounded before its product with the up's: its interval, its overflow, what it looks like."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from conformance.bounds import judge
from conformance.bounds.intermediate import activation_range
from conformance.bounds.judgement import may_overflow
from conformance.build import CaseTensors, build
from conformance.cases import Case
from conformance.oracles import trace_of
from fp8moe.activations import GATED, NON_GATED, activate
from fp8moe.backends.torch_experts import TorchExperts
from fp8moe.recipe import FP32, Recipe
from fp8moe.reference.activation import activation_of
from fp8moe.reference.rounding import format_of

GATE = Recipe(gate_output="input")
ROWS, COLUMNS = 64, 512


def box(name: str, width: float) -> tuple[Tensor, Tensor]:
    """Gates and ups of every size short of where torch's sigmoid underflows, each with both ends of what it may be."""
    generator = torch.Generator().manual_seed(len(name))
    shape = (ROWS, COLUMNS * (2 if name in GATED else 1))
    centre = torch.randn(shape, generator=generator) * 2.0 ** torch.randint(-8, 4, (ROWS, 1), generator=generator)
    reach = width * centre.abs()
    return (centre - reach).double(), (centre + reach).double()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [*GATED, *NON_GATED])
def test_what_a_backend_computes_is_inside(name: str, dtype: torch.dtype) -> None:
    """Points anywhere in the box, torch's own fp32, the gate's part through 16 bits."""
    generator = torch.Generator().manual_seed(3)
    for width in (0.0, 2.0**-20, 2.0**-8, 0.5):
        low, high = box(name, width)
        bottom, top = activation_range(activation_of(name), (low, high), format_of(dtype))
        for _ in range(4):
            inside = (low + (high - low) * torch.rand(low.shape, generator=generator)).float()
            inside = torch.minimum(torch.maximum(inside, low.float()), high.float())
            got = activate(name, inside, dtype).double()
            assert bool(((bottom <= got) & (got <= top)).all()), (name, width)


@pytest.mark.parametrize("name", GATED)
def test_a_point_is_nearly_one(name: str) -> None:
    """Where the gate's part is known to fp32 it is one number of 16 bits, but where two are equally near or its erf
    cancels; and that is not what it is without its rounding."""
    low, high = box(name, 0.0)
    bottom, top = activation_range(activation_of(name), (low, high), format_of(torch.bfloat16))
    narrow = top - bottom <= 2.0**-20 * torch.maximum(bottom.abs(), top.abs())
    assert float(narrow.double().mean()) > 0.9
    plain, _ = activation_range(activation_of(name), (low, high))
    assert float((plain < bottom - (top - bottom)).double().mean()) > 0.2


def far_gate() -> CaseTensors:
    """Gates above 65,504 and ups so small that every product is a number of fp16."""
    tensors = build(Case(tokens=9, dtype="fp16", seed=1))
    scale = tensors.weights.w13_scale
    assert scale is not None
    half = scale.shape[1] // 2
    factor = torch.cat([torch.full((half,), 2.0**17), torch.full((half,), 2.0**-17)])
    return replace(tensors, weights=replace(tensors.weights, w13_scale=scale * factor[:, None]))


def test_a_gate_beyond_fp16_is_excused_where_it_is_declared() -> None:
    tensors = far_gate()
    output = tensors.call(TorchExperts.with_recipe(GATE)(tensors.config, tensors.quant, tensors.weights))
    declared, plain = (trace_of(tensors, recipe) for recipe in (GATE, Recipe()))
    assert bool(torch.isfinite(plain.R).all())
    assert not bool(torch.isfinite(output).all())
    assert bool(may_overflow(declared).all())
    assert not bool(may_overflow(plain).any())
    assert judge(declared, output, FP32).passed
    assert "finite" in judge(plain, output, FP32).reason


@pytest.mark.parametrize("scheme", ["block", "channel_tok", "tensor_dyn", "tensor_static"])
def test_it_shows_among_declared_roundings(scheme: str) -> None:
    """As vLLM's silu_and_mul between two GEMMs of 16 bits: declared it passes, undeclared it is outside."""
    around = Recipe(gemm1_output="input", activation_output="input")
    tensors = build(Case(tokens=17, scheme=scheme))  # type: ignore[arg-type]
    whole = replace(around, gate_output="input")
    output = tensors.call(TorchExperts.with_recipe(whole)(tensors.config, tensors.quant, tensors.weights))
    assert judge(trace_of(tensors, whole), output, FP32).passed
    assert not judge(trace_of(tensors, around), output, FP32).passed


def test_an_unknown_rounding_names_the_field() -> None:
    with pytest.raises(ValueError, match="gate_output='bf16': expected one of 'float32', 'input'"):
        Recipe(gate_output="bf16")  # type: ignore[arg-type]
