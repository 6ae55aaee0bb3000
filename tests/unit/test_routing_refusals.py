"""What the router refuses, and how a layer gets its method."""

import math

import pytest
import torch

from fp8moe.config import RoutingMethodType as Method
from fp8moe.routing import grouped_topk, route, routing_method_of
from fp8moe.validation import InvalidMoEInput

ROW = torch.tensor([[0.0, 2.0, 1.0, -1.0]])


@pytest.mark.parametrize("method", [Method.Custom, Method.Simulated, Method.Unspecified])
def test_methods_without_a_law_say_what_to_do(method: Method) -> None:
    with pytest.raises(ValueError, match=rf"{method.name}: .*(apply|grouped_topk)"):
        route(method, ROW, 1)


@pytest.mark.parametrize(
    ("field", "method", "arguments"),
    [
        ("method", 17, {}),
        ("method", "softmax", {}),
        ("router_logits", Method.Default, {"router_logits": [[1.0, 2.0]]}),
        ("router_logits", Method.Default, {"router_logits": torch.zeros(4)}),
        ("router_logits", Method.Default, {"router_logits": torch.zeros(4, 0)}),
        ("router_logits", Method.Default, {"router_logits": torch.zeros(2, 4, dtype=torch.float64)}),
        ("router_logits", Method.Default, {"router_logits": torch.zeros(2, 4, dtype=torch.int32)}),
        ("top_k", Method.Default, {"top_k": 0}),
        ("top_k", Method.Default, {"top_k": 5}),
        ("top_k", Method.Default, {"top_k": 1.0}),
        ("top_k", Method.Default, {"top_k": True}),
        ("top_k", Method.Llama4, {"top_k": 2}),
        ("top_k", Method.DeepSeekV3, {"top_k": 3, "num_expert_group": 2, "topk_group": 1}),
        ("num_expert_group", Method.DeepSeekV3, {"num_expert_group": 3, "topk_group": 1}),
        ("num_expert_group", Method.DeepSeekV3, {"num_expert_group": 2}),
        ("num_expert_group", Method.DeepSeekV3, {"topk_group": 1}),
        ("num_expert_group", Method.DeepSeekV3, {"num_expert_group": 8, "topk_group": 1}),
        ("num_expert_group", Method.Renormalize, {"num_expert_group": 2, "topk_group": 1}),
        ("topk_group", Method.DeepSeekV3, {"num_expert_group": 2, "topk_group": 3}),
        ("topk_group", Method.DeepSeekV3, {"num_expert_group": 2, "topk_group": 0}),
        ("correction_bias", Method.TopK, {"correction_bias": torch.zeros(4)}),
        ("correction_bias", Method.DeepSeekV3, {"correction_bias": torch.zeros(3)}),
        ("correction_bias", Method.DeepSeekV3, {"correction_bias": torch.zeros(4, dtype=torch.int64)}),
        ("correction_bias", Method.DeepSeekV3, {"correction_bias": torch.tensor([0, 1, 2, math.nan])}),
        ("correction_bias", Method.DeepSeekV3, {"correction_bias": torch.zeros(4, device="meta")}),
        ("correction_bias", Method.DeepSeekV3, {"correction_bias": [0.0] * 4}),
        ("renormalize", Method.Default, {"renormalize": True}),
        ("renormalize", Method.Renormalize, {"renormalize": False}),
        ("renormalize", Method.RenormalizeNaive, {"renormalize": False}),
        ("renormalize", Method.TopK, {"renormalize": True}),
        ("routed_scaling_factor", Method.Default, {"routed_scaling_factor": math.nan}),
        ("routed_scaling_factor", Method.Default, {"routed_scaling_factor": 0.0}),
        ("routed_scaling_factor", Method.Default, {"routed_scaling_factor": None}),
    ],
)
def test_refusals_name_the_field(field: str, method: Method, arguments: dict[str, object]) -> None:
    given = {"router_logits": torch.zeros(2, 4), "top_k": 1} | arguments
    with pytest.raises(InvalidMoEInput, match=rf"^{field} is .*: expected ") as caught:
        route(method, given.pop("router_logits"), given.pop("top_k"), **given)
    assert caught.value.field == field


def test_grouped_topk_refuses_other_scorings() -> None:
    with pytest.raises(InvalidMoEInput, match="softmax"):
        grouped_topk(ROW, 1, scoring="sqrt", num_expert_group=2, topk_group=1)


# -- how a layer gets its method --


@pytest.mark.parametrize(
    ("expected", "arguments"),
    [
        (Method.Llama4, {"custom": "llama4", "scoring": "sigmoid"}),
        (Method.Llama4, {"custom": "Llama4"}),
        (Method.Custom, {"custom": "hash_of_the_token"}),
        (Method.DeepSeekV3, {"grouped": True, "scoring": "sigmoid"}),
        (Method.Unspecified, {"grouped": True}),
        (Method.Simulated, {"simulated": True}),
        (Method.Simulated, {"simulated": True, "grouped": True, "custom": "llama4"}),
        (Method.Llama4, {"scoring": "sigmoid", "top_k": 1}),
        (Method.DeepSeekV3, {"scoring": "sigmoid", "top_k": 2}),
        (Method.DeepSeekV3, {"scoring": "sigmoid", "top_k": 2, "renormalize": False}),
        (Method.Renormalize, {"renormalize": True}),
        (Method.Default, {"renormalize": False}),
        (Method.Unspecified, {"scoring": "sqrtsoftplus"}),
    ],
)
def test_routing_method_of(expected: Method, arguments: dict[str, object]) -> None:
    given = {"scoring": "softmax", "top_k": 8, "renormalize": True} | arguments
    assert routing_method_of(given.pop("scoring"), **given) is expected
