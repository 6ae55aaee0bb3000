"""Two processes on the same memory: whose tensors a case is given, and what is no longer the same case."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields

import pytest
import torch
from torch import Tensor

from conformance.build import CaseTensors, build
from conformance.cases import Case
from conformance.timing.shared import INPUTS, Given, on_memory_of
from fp8moe.experts import MoEWeights

CASE = Case(tokens=3, experts=4, top_k=2, hidden=128, inter=128)
WEIGHTS = tuple(one.name for one in fields(MoEWeights))


@pytest.fixture(scope="module")
def own() -> CaseTensors:
    return build(CASE, "cpu")


@pytest.fixture
def given() -> dict[str, Tensor | None]:
    """The same case's tensors as another process has built them."""
    (layer,) = Given.of([build(CASE, "cpu")], torch.empty(0)).layers
    return dict(layer)


def tensor(given: dict[str, Tensor | None], name: str) -> Tensor:
    found = given[name]
    assert found is not None
    return found


def test_what_is_given_are_weights_and_inputs_of_each_layer_by_name(own: CaseTensors) -> None:
    other, output = build(CASE, "cpu"), torch.empty(3, 128)
    found = Given.of([own, other], output)
    assert found.output is output
    assert len(found.layers) == 2
    for layer, tensors in zip(found.layers, (own, other), strict=True):
        assert set(layer) == {*WEIGHTS, *INPUTS}
        assert all(layer[name] is getattr(tensors.weights, name) for name in WEIGHTS)
        assert all(layer[name] is getattr(tensors, name) for name in INPUTS)
    assert found.layers[0]["w13_bias"] is None  # a case without bias


def test_what_is_received_is_the_same_memory(own: CaseTensors) -> None:
    output = torch.zeros(3, 128)
    received = Given.received(Given.of([own], output).sent())
    received.output[1, 2] = 7.0
    assert output[1, 2] == 7.0
    (layer,) = received.layers
    on_memory_of(layer, own)
    assert layer["w2_bias"] is None
    assert torch.equal(tensor(dict(layer), "topk_ids"), own.topk_ids)


def test_tensors_of_the_same_layout_take_the_place_of_its_own(
    own: CaseTensors, given: dict[str, Tensor | None]
) -> None:
    found = on_memory_of(given, own)
    assert all(getattr(found.weights, name) is given[name] for name in WEIGHTS)
    assert all(getattr(found, name) is given[name] for name in INPUTS)
    assert found.weights.w13 is not own.weights.w13
    assert (found.case, found.config, found.quant) == (own.case, own.config, own.quant)
    assert found.expert_map is own.expert_map
    assert found.apply_router_weight_on_input == own.apply_router_weight_on_input


@pytest.mark.parametrize("name", INPUTS)
def test_strides_of_inputs_do_not_matter(own: CaseTensors, given: dict[str, Tensor | None], name: str) -> None:
    values = tensor(given, name)
    apart = given[name] = torch.zeros(len(values), 512, dtype=values.dtype)[:, 7 : 7 + values.shape[1]]
    assert getattr(on_memory_of(given, own), name) is apart


def turned(values: Tensor) -> Tensor:
    """The same values with the other one of the last two dimensions contiguous."""
    return values.transpose(1, 2).contiguous().transpose(1, 2)


@pytest.mark.parametrize(
    ("name", "change", "told"),
    [
        ("w13", lambda values: values[:, :-1], "(4, 255, 128) torch.float8_e4m3fn strides (32768, 128, 1)"),
        ("w13", turned, "(4, 256, 128) torch.float8_e4m3fn strides (32768, 1, 256)"),
        ("w2", lambda values: values[:2], "(2, 128, 128) torch.float8_e4m3fn strides (16384, 128, 1)"),
        ("w2", lambda values: values.view(torch.uint8), "(4, 128, 128) torch.uint8 strides (16384, 128, 1)"),
        ("w2", turned, "(4, 128, 128) torch.float8_e4m3fn strides (16384, 1, 128)"),
        ("w13_scale", lambda values: values.double(), "(4, 2, 1) torch.float64 strides (2, 1)"),
        ("w2_scale", lambda values: None, "none"),
        ("w2_bias", lambda values: torch.zeros(4, 128), "(4, 128) torch.float32 strides (128, 1)"),
        ("hidden_states", lambda values: values[:2], "(2, 128) torch.bfloat16"),
        ("hidden_states", lambda values: values.half(), "(3, 128) torch.float16"),
        ("topk_ids", lambda values: values.long(), "(3, 2) torch.int64"),
        ("topk_weights", lambda values: values.T, "(2, 3) torch.float32"),
    ],
)
def test_a_tensor_of_another_layout_is_told_by_name(
    own: CaseTensors,
    given: dict[str, Tensor | None],
    name: str,
    change: Callable[[Tensor | None], Tensor | None],
    told: str,
) -> None:
    given[name] = change(given[name])
    with pytest.raises(ValueError, match="they build the case differently") as caught:
        on_memory_of(given, own)
    assert str(caught.value).startswith(f"{name}: {told}")
    assert " in one version, " in str(caught.value)


@pytest.mark.parametrize("name", ["w13", "w2_scale", "topk_ids"])
def test_a_missing_tensor_is_told_by_name(own: CaseTensors, given: dict[str, Tensor | None], name: str) -> None:
    del given[name]
    with pytest.raises(ValueError, match=rf"^{name}: none in one version, \(\d+, .* in the other: they build"):
        on_memory_of(given, own)


def test_a_tensor_that_this_version_does_not_know_is_told_by_name(
    own: CaseTensors, given: dict[str, Tensor | None]
) -> None:
    given["w13_zero"] = torch.zeros(4)
    with pytest.raises(ValueError, match=r"^w13_zero: \(4,\) torch.float32 strides \(1,\) in one version, none in the"):
        on_memory_of(given, own)


def test_what_one_version_has_no_field_for_is_none_in_the_other(
    own: CaseTensors, given: dict[str, Tensor | None]
) -> None:
    del given["w13_bias"]
    assert on_memory_of(given, own).weights.w13_bias is None
