"""TorchExperts and its batched sister: every recipe is computed as declared, on every scheme and activation."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from conformance.build import build
from conformance.cases import SCHEME_NAMES, Case
from conformance.computes import check_case
from conformance.plan import Subject, Target
from conformance.results import Status
from fp8moe.backends.torch_experts import BatchedTorchExperts, TorchExperts
from fp8moe.config import ACTIVATIONS, FusedMoEActivationFormat
from fp8moe.platforms import PLATFORMS
from fp8moe.recipe import Recipe
from fp8moe.registry import backend_named, seed_backends

HERE = Target("cpu", PLATFORMS["cpu"], "cpu")
RECIPES = {
    "power_of_two": Recipe(scale_rounding="power_of_two"),
    "reciprocal": Recipe(scaling="reciprocal"),
    "floor": Recipe(amax_floor=1e-4),
    "expert_scope": Recipe(dynamic_tensor_scope="expert"),
    "gemm1_16bit": Recipe(gemm1_output="input"),
    "activation_16bit": Recipe(activation_output="input"),
    "not_requantised": Recipe(requantize=False),
    "slots_16bit": Recipe(gemm2_output="input"),
    "combine_16bit": Recipe(combine="input"),
    "deep_gemm_like": Recipe("power_of_two", gemm1_output="input", gemm2_output="input"),
}
BOTH = pytest.mark.parametrize("base", [TorchExperts, BatchedTorchExperts])


def assert_passes(cls: type[TorchExperts], case: Case) -> None:
    result = check_case(case, Subject(cls.__name__, cls, cls.__name__), HERE)
    assert result.status is Status.PASSED, result.reason


@BOTH
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("scheme", ["block", "tensor_dyn", "channel_tok"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_a_recipe_is_computed_as_it_is_declared(base: type[TorchExperts], recipe: str, scheme: str, dtype: str) -> None:
    cls = base.with_recipe(RECIPES[recipe])
    scope = "expert" if base is BatchedTorchExperts else RECIPES[recipe].dynamic_tensor_scope
    assert cls.contract.recipe == replace(RECIPES[recipe], dynamic_tensor_scope=scope)
    assert_passes(cls, Case(scheme=scheme, dtype=dtype, tokens=9, top_k=3, values="block_scales", bias=True))


@BOTH
@pytest.mark.parametrize("scheme", SCHEME_NAMES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_scheme_and_activation(base: type[TorchExperts], scheme: str, activation: str) -> None:
    assert_passes(base, Case(scheme=scheme, activation=activation, tokens=5, hidden=144, inter=136, seed=3))


@pytest.mark.parametrize("scheme", ["block", "tensor_static", "channel_tok"])
def test_fnuz_weights(scheme: str) -> None:
    assert_passes(TorchExperts, Case(scheme=scheme, tokens=5, fnuz=True))


@BOTH
def test_the_result_is_written_where_asked(base: type[TorchExperts]) -> None:
    tensors = build(Case(tokens=4))
    experts = base(tensors.config, tensors.quant, tensors.weights)
    arguments = (tensors.hidden_states, tensors.topk_weights, tensors.topk_ids)
    expected = experts.apply(*arguments)
    output = torch.full_like(tensors.hidden_states, torch.nan)
    assert experts.apply(*arguments, output=output) is output
    assert torch.equal(output, expected)


@BOTH
def test_shards_add_up_to_the_whole(base: type[TorchExperts]) -> None:
    """Expert parallelism: each rank's result, summed, against the whole in the 16-bit spacing of their sum."""
    whole = build(Case(tokens=16, experts=8, top_k=3))
    arguments = (whole.hidden_states, whole.topk_weights, whole.topk_ids)
    expected = base(whole.config, whole.quant, whole.weights).apply(*arguments).double()
    total = torch.zeros_like(expected)
    largest = torch.zeros_like(expected)
    for rank in range(4):
        mine = slice(2 * rank, 2 * rank + 2)
        config = replace(whole.config, num_local_experts=2)
        names = ("w13", "w2", "w13_scale", "w2_scale")
        weights = replace(whole.weights, **{name: getattr(whole.weights, name)[mine] for name in names})
        expert_map = torch.full((8,), -1, dtype=torch.int32)
        expert_map[mine] = torch.arange(2, dtype=torch.int32)
        part = base(config, whole.quant, weights).apply(*arguments, expert_map=expert_map).double()
        total, largest = total + part, torch.maximum(largest, part.abs())
    spacing = torch.finfo(torch.bfloat16).eps * torch.maximum(largest, expected.abs())
    assert ((total - expected).abs() <= 3 * spacing).all()  # four halves for the parts, one for the whole


def test_formats_and_lists() -> None:
    assert TorchExperts.activation_format() is FusedMoEActivationFormat.Standard
    assert BatchedTorchExperts.activation_format() is FusedMoEActivationFormat.BatchedExperts
    assert not {TorchExperts, BatchedTorchExperts} & {spec.experts_cls for spec in seed_backends()}
    with pytest.raises(KeyError, match="no backend is named 'TorchExperts'"):
        backend_named("TorchExperts")
