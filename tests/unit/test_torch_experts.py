"""TorchExperts and its batched sister: every recipe is computed as declared, on every scheme and activation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from conformance.bits import observed
from conformance.build import CaseTensors, build
from conformance.cases import SCHEME_NAMES, Case
from conformance.checks import check_case
from conformance.plan import Subject, Target
from conformance.results import Status
from fp8moe import experts as experts_module
from fp8moe.backends.torch_experts import BatchedTorchExperts, TorchExperts
from fp8moe.config import ACTIVATIONS, FusedMoEActivationFormat
from fp8moe.dispatch import combine, weighted_input
from fp8moe.platforms import PLATFORMS
from fp8moe.recipe import Recipe
from fp8moe.registry import backend_named, seed_backends
from fp8moe.validation import InvalidMoEInput

pytestmark = pytest.mark.usefixtures("one_thread")

HERE = Target("cpu", PLATFORMS["cpu"], "cpu")
RECIPES = {
    "power_of_two": Recipe(scale_rounding="power_of_two"),
    "reciprocal": Recipe(scaling="reciprocal"),
    "floor": Recipe(amax_floor=1e-4),
    "other_floors": Recipe(amax_floor=0.0, intermediate_amax_floor=2.0**-9),
    "input_weights_16bit": Recipe(input_weights="input"),
    "expert_scope": Recipe(dynamic_tensor_scope="expert"),
    "gemm1_16bit": Recipe(gemm1_output="input"),
    "gemm1_float8": Recipe(gemm1_output="float8"),
    "gemm1_float8_e8m0": Recipe("power_of_two", gemm1_output="float8", intermediate_amax_floor=2.0**-9),
    "gate_16bit": Recipe(gate_output="input"),
    "activation_16bit": Recipe(activation_output="input"),
    "not_requantised": Recipe(requantize=False),
    "input_16bit": Recipe(quantize_input=False),
    "weights_alone": Recipe(quantize_input=False, requantize=False, activation_output="input", gemm1_output="input"),
    "weighted_16bit": Recipe(weighted="input"),
    "scale_reciprocal": Recipe(scale_division="reciprocal"),
    "factor": Recipe(scale_division="inverse", scaling="reciprocal"),
    "hoppers_factor": Recipe(scale_division="approximate_inverse", scaling="reciprocal", activation_output="input"),
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


# -- batches --


class Batches(BatchedTorchExperts):
    """Keeps what `apply_batched` was given, and shows its rows."""

    def apply_batched(self, hidden_states: Tensor, expert_num_tokens: Tensor) -> Tensor:
        self.given, self.counts = hidden_states, expert_num_tokens
        results = super().apply_batched(hidden_states, expert_num_tokens)
        if self.observe is not None:
            self.observe("first_gemm", hidden_states)  # by place, as (E, T, columns)
            self.observe("second_gemm", results.flatten(0, 1))  # and as (E * T, columns)
        return results


def call(tensors: CaseTensors) -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, Any]]:
    options = {
        "expert_map": tensors.expert_map,
        "apply_router_weight_on_input": tensors.apply_router_weight_on_input,
    }
    return (tensors.hidden_states, tensors.topk_weights, tensors.topk_ids), options


ROUTED = {
    "all to one": Case(tokens=7, experts=4, law="all_to_one"),
    "an expert twice in a row": Case(tokens=7, experts=4, law="repeated", top_k=3),
    "empty slots": Case(tokens=9, experts=4, law="masked"),
    "another rank": Case(tokens=9, experts=8, ep="4:1"),
    "weight on input": Case(tokens=7, experts=4, top_k=1, weight_on_input=True),
    "one token": Case(tokens=1, experts=4),
    "no tokens": Case(tokens=0, experts=4),
}


@pytest.mark.parametrize("scheme", ["block", "channel_tok", "none"])
@pytest.mark.parametrize("name", ROUTED)
def test_batches_come_to_what_tokens_do(name: str, scheme: str) -> None:
    """The same numbers through `apply_batched`; a batch is as long as the busiest expert has tokens, and not longer."""
    tensors = build(replace(ROUTED[name], scheme=scheme, hidden=144, inter=136, values="exact_sums"))
    arguments, options = call(tensors)
    batched = Batches(tensors.config, tensors.quant, tensors.weights)
    got = batched.apply(*arguments, **options)
    expected = TorchExperts(tensors.config, tensors.quant, tensors.weights).apply(*arguments, **options)
    spacing = torch.finfo(torch.bfloat16).eps * expected.double().abs()
    # BLAS may sum in another order for another number of rows, which moves a result by a step of bf16 at most.
    assert (
        (got.double() - expected.double()).abs() <= spacing + 2.0**-20 * expected.double().abs().amax(1, True)
    ).all()
    local = tensors.topk_ids.long()
    if tensors.expert_map is not None:
        local = torch.where(local < 0, -1, tensors.expert_map.long()[local.clamp(min=0)])
    counts = torch.bincount(local[local >= 0], minlength=tensors.config.num_local_experts)
    assert batched.counts.dtype == torch.int32
    assert batched.counts.tolist() == counts.tolist()
    assert batched.given.shape == (tensors.config.num_local_experts, int(counts.max()), 144)
    assert batched.given.dtype == tensors.hidden_states.dtype


def test_a_batch_has_its_tokens_in_their_order() -> None:
    tensors = build(Case(tokens=3, experts=2, top_k=2, hidden=128, inter=128))
    ids = torch.tensor([[1, 0], [-1, 1], [1, 1]], dtype=torch.int32)
    batched = Batches(tensors.config, tensors.quant, tensors.weights)
    batched.apply(tensors.hidden_states, tensors.topk_weights, ids)
    x = tensors.hidden_states
    assert batched.counts.tolist() == [1, 4]
    assert torch.equal(batched.given[0, :1], x[:1])
    assert torch.equal(batched.given[1], x[[0, 1, 2, 2]])
    assert not bool(batched.given[0, 1:].any())


def test_a_batch_is_weighted_where_the_input_is() -> None:
    tensors = build(Case(tokens=3, experts=2, top_k=1, hidden=128, inter=128, weight_on_input=True))
    batched = Batches(tensors.config, tensors.quant, tensors.weights)
    ids = torch.zeros(3, 1, dtype=torch.int32)
    batched.apply(tensors.hidden_states, tensors.topk_weights, ids, apply_router_weight_on_input=True)
    assert torch.equal(batched.given[0], weighted_input(tensors.hidden_states, tensors.topk_weights))


@pytest.mark.parametrize("name", ROUTED)
def test_stages_are_shown_in_the_order_of_the_pairs(name: str) -> None:
    """A row for each of token * top_k + slot, whatever the batches look like; absent pairs have some row or other."""
    tensors = build(replace(ROUTED[name], hidden=144, inter=136))
    arguments, options = call(tensors)
    batched = Batches(tensors.config, tensors.quant, tensors.weights)
    with observed(batched) as seen:
        output = batched.apply(*arguments, **options)
    top_k = tensors.topk_ids.shape[1]
    given = tensors.hidden_states
    if tensors.apply_router_weight_on_input:
        given = weighted_input(given, tensors.topk_weights)
    local = tensors.topk_ids.long()
    if tensors.expert_map is not None:
        local = torch.where(local < 0, -1, tensors.expert_map.long()[local.clamp(min=0)])
    present = local.reshape(-1) >= 0
    assert seen["first_gemm"].shape == seen["second_gemm"].shape == (local.numel(), 144)
    assert torch.equal(seen["first_gemm"][present], given.repeat_interleave(top_k, 0)[present])
    assert torch.equal(seen["combine"], output)
    weights = torch.ones_like(tensors.topk_weights) if options["apply_router_weight_on_input"] else arguments[1]
    slots = seen["second_gemm"].view(*local.shape, 144)
    assert torch.equal(combine(slots, weights, local >= 0, output.dtype, False), output)


class Misshapen(BatchedTorchExperts):
    def apply_batched(self, hidden_states: Tensor, expert_num_tokens: Tensor) -> Tensor:
        return hidden_states[:, :1]


class Failing(BatchedTorchExperts):
    def apply_batched(self, hidden_states: Tensor, expert_num_tokens: Tensor) -> Tensor:
        raise ZeroDivisionError


def test_a_batched_result_of_another_shape_is_refused() -> None:
    tensors = build(Case(tokens=4, experts=2, law="all_to_one"))
    with pytest.raises(InvalidMoEInput, match=r"result is of shape \(2, 1, 256\): expected \(E, T, H\)"):
        Misshapen(tensors.config, tensors.quant, tensors.weights).apply(*call(tensors)[0])


def test_an_observer_outlives_an_error() -> None:
    """The base class puts its own in between for the time of a call."""
    tensors = build(Case(tokens=4, experts=2))
    experts = Failing(tensors.config, tensors.quant, tensors.weights)
    seen: list[str] = []

    def mine(stage: str, _values: Tensor) -> None:
        seen.append(stage)

    experts.observe = mine
    with pytest.raises(ZeroDivisionError):
        experts.apply(*call(tensors)[0])
    assert experts.observe is mine


def test_under_capture_a_batch_is_as_long_as_it_could_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may look at how long the longest is; the results are the same, and an id out of range counts as -1."""
    tensors = build(Case(tokens=5, experts=4, top_k=2, law="masked"))
    batched = Batches(tensors.config, tensors.quant, tensors.weights)
    (hidden, weights, ids), _ = call(tensors)
    expected = batched.apply(hidden, weights, ids)
    wrong = torch.where(ids < 0, 4, ids)
    assert bool((wrong != ids).any())
    monkeypatch.setattr(experts_module, "is_capturing", lambda _device: True)
    got = batched.apply(hidden, weights, ids)
    assert batched.given.shape == (4, 10, 256)
    assert torch.equal(got, expected)
    assert torch.equal(batched.apply(hidden, weights, wrong), expected)
    monkeypatch.undo()
    with pytest.raises(InvalidMoEInput, match="in an earlier replay of a captured graph, where it counted as -1"):
        batched.apply(hidden, weights, ids)
    assert torch.equal(batched.apply(hidden, weights, ids), expected)
    with pytest.raises(InvalidMoEInput, match="4 at token"):
        batched.apply(hidden, weights, wrong)
    assert torch.equal(batched.apply(hidden, weights, ids), expected)


def test_formats_and_lists() -> None:
    assert TorchExperts.activation_format() is FusedMoEActivationFormat.Standard
    assert BatchedTorchExperts.activation_format() is FusedMoEActivationFormat.BatchedExperts
    assert not {TorchExperts, BatchedTorchExperts} & {spec.experts_cls for spec in seed_backends()}
    with pytest.raises(KeyError, match="no backend is named 'TorchExperts'"):
        backend_named("TorchExperts")
