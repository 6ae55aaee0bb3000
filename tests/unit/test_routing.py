"""Routing against a second implementation in plain Python, one token at a time, and the routing faults by name."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fp8moe.config import RoutingMethodType as Method
from fp8moe.routing import grouped_topk, route

LAWFUL = (
    Method.Default,
    Method.Renormalize,
    Method.DeepSeekV3,
    Method.Llama4,
    Method.RenormalizeNaive,
    Method.TopK,
)
SCORES_FIRST = (Method.Default, Method.RenormalizeNaive, Method.DeepSeekV3)
ULPS = 64 * torch.finfo(torch.float32).eps  # exp and a sum over at most 64 experts, each correctly rounded or nearly


# -- the reference: fp64, one row, no torch --


def softmax(row: list[float]) -> list[float]:
    top = max(row)
    parts = [math.exp(value - top) for value in row]
    return [part / math.fsum(parts) for part in parts]


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value)) if value >= 0 else math.exp(value) / (1 + math.exp(value))


def best(keys: dict[int, float], count: int) -> list[int]:
    return sorted(keys, key=lambda index: (-keys[index], index))[:count]


def reference(
    method: Method,
    row: list[float],
    k: int,
    *,
    groups: int = 1,
    kept: int = 1,
    bias: list[float] | None = None,
    renormalize: bool = True,
    factor: float = 1.0,
) -> dict[int, float]:
    """Expert to weight for one token of finite logits."""
    if method in (Method.Renormalize, Method.Llama4, Method.TopK):
        ids = best(dict(enumerate(row)), k)
        chosen = [row[index] for index in ids]
        if method == Method.Renormalize:
            chosen = softmax(chosen)
        elif method == Method.Llama4:
            chosen = [sigmoid(value) for value in chosen]
        return {index: weight * factor for index, weight in zip(ids, chosen, strict=True)}
    scores = [sigmoid(value) for value in row] if method == Method.DeepSeekV3 else softmax(row)
    biased = [score + shift for score, shift in zip(scores, bias or [0.0] * len(row), strict=True)]
    size = len(row) // groups
    allowed = range(len(row))
    if kept < groups:
        members = [biased[g * size : (g + 1) * size] for g in range(groups)]
        both = method == Method.DeepSeekV3 or bias is not None
        of_group = {g: sum(sorted(values)[-2:]) if both else max(values) for g, values in enumerate(members)}
        allowed = [index for g in best(of_group, kept) for index in range(g * size, (g + 1) * size)]
    ids = best({index: biased[index] for index in allowed}, k)
    chosen = [scores[index] for index in ids]
    if method == Method.RenormalizeNaive or (method == Method.DeepSeekV3 and renormalize):
        chosen = [score / math.fsum(chosen) for score in chosen]
    return {index: weight * factor for index, weight in zip(ids, chosen, strict=True)}


def assert_routes_as(expected: list[dict[int, float]], weights: torch.Tensor, ids: torch.Tensor) -> None:
    assert weights.dtype == torch.float32
    assert ids.dtype == torch.int32
    for row, (want, w, i) in enumerate(zip(expected, weights.tolist(), ids.tolist(), strict=True)):
        assert i == list(want), f"token {row}: experts {i}, expected {list(want)}"
        for expert, got in zip(i, w, strict=True):
            near = abs(got - want[expert]) <= ULPS * abs(want[expert])
            assert near, f"token {row}, expert {expert}: weight {got!r}, expected {want[expert]!r}"


# Far enough apart that scores, and sums of two scores, keep their order in fp32: distinct sums of two sigmoids of the
# positive half differ by 1e-5 at least. (With both signs, sigmoid(a) + sigmoid(-a) = 1 would tie all but exactly.)
GRID = st.integers(1, 16).map(lambda step: step / 2)


@st.composite
def questions(draw: st.DrawFn) -> tuple[Method, list[list[float]], int, dict[str, object]]:
    method = draw(st.sampled_from(LAWFUL))
    groups = draw(st.sampled_from((1, 1, 2, 4))) if method in SCORES_FIRST else 1
    experts = groups * draw(st.integers(1, 8))
    kept = draw(st.integers(1, groups))
    k = 1 if method == Method.Llama4 else draw(st.integers(1, kept * experts // groups))
    rows = draw(st.lists(st.lists(GRID, min_size=experts, max_size=experts), max_size=4))
    options: dict[str, object] = {"factor": draw(st.sampled_from((1.0, 2.5)))}
    if groups > 1:
        options |= {"groups": groups, "kept": kept}
    if method == Method.DeepSeekV3:
        options["renormalize"] = draw(st.booleans())
    return method, rows, k, options


@settings(max_examples=300, deadline=None)
@given(questions())
def test_agrees_with_reference(question: tuple[Method, list[list[float]], int, dict[str, object]]) -> None:
    method, rows, k, options = question
    experts = len(rows[0]) if rows else 8 * int(options.get("groups", 1))
    weights, ids = route(
        method,
        torch.tensor(rows).reshape(len(rows), experts),
        k,
        num_expert_group=options.get("groups"),
        topk_group=options.get("kept"),
        renormalize=options.get("renormalize"),
        routed_scaling_factor=options["factor"],
    )
    assert weights.shape == ids.shape == (len(rows), k)
    assert_routes_as([reference(method, row, k, **options) for row in rows], weights, ids)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_bias_agrees_with_reference(data: st.DataObject) -> None:
    method = data.draw(st.sampled_from(SCORES_FIRST))
    logits = torch.tensor(data.draw(st.permutations([step / 4 for step in range(1, 17)])))[None]
    bias = data.draw(st.permutations([step * 2.0 for step in range(-8, 8)]))  # larger than any score: no near ties
    options = data.draw(st.sampled_from(({}, {"groups": 4, "kept": 2}, {"groups": 8, "kept": 4})))
    weights, ids = route(
        method,
        logits,
        4,
        correction_bias=torch.tensor(bias),
        num_expert_group=options.get("groups"),
        topk_group=options.get("kept"),
    )
    assert_routes_as([reference(method, logits[0].tolist(), 4, bias=bias, **options)], weights, ids)


ANY_FLOAT = st.floats(width=32, allow_nan=True, allow_infinity=True)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_ids_are_distinct_and_in_range_whatever_the_logits(data: st.DataObject) -> None:
    method = data.draw(st.sampled_from(LAWFUL))
    special = st.sampled_from((math.nan, math.inf, -math.inf, 0.0, -0.0))
    rows = data.draw(st.lists(st.lists(ANY_FLOAT | special, min_size=8, max_size=8), min_size=1, max_size=4))
    k = 1 if method == Method.Llama4 else data.draw(st.integers(1, 4))
    steer = {"num_expert_group": 4, "topk_group": 2} if method in SCORES_FIRST and data.draw(st.booleans()) else {}
    weights, ids = route(method, torch.tensor(rows), k, **steer)
    for row, chosen in zip(rows, ids.tolist(), strict=True):
        assert len(set(chosen)) == k
        assert all(0 <= expert < 8 for expert in chosen)
        if steer:
            assert len({expert // 2 for expert in chosen}) <= 2, f"{chosen} of {row} is not within two groups"
    broken = torch.tensor(rows).isnan().any(-1)
    assert weights[broken].isnan().all()
    if method in (Method.Renormalize, Method.RenormalizeNaive, Method.Default):
        broken |= (torch.tensor(rows) == math.inf).any(-1)
    if method != Method.TopK:
        assert weights[~broken].isfinite().all()


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(LAWFUL), st.permutations(range(6)), st.sampled_from((torch.float32, torch.bfloat16, torch.float16))
)
def test_tokens_do_not_see_each_other(method: Method, order: list[int], dtype: torch.dtype) -> None:
    logits = torch.randn(6, 16, generator=torch.Generator().manual_seed(1)).to(dtype)
    logits[3] = math.nan
    k = 1 if method == Method.Llama4 else 3
    weights, ids = route(method, logits, k)
    shuffled_weights, shuffled_ids = route(method, logits[order], k)
    torch.testing.assert_close(shuffled_weights, weights[order], rtol=0, atol=0, equal_nan=True)
    assert torch.equal(shuffled_ids, ids[order])


# -- what each name means, on one row that can be read --

ROW = torch.tensor([[0.0, 2.0, 1.0, -1.0]])


def test_default_is_softmax_then_topk() -> None:
    weights, ids = route(Method.Default, ROW, 2)
    assert ids.tolist() == [[1, 2]]
    torch.testing.assert_close(weights, torch.softmax(ROW, -1)[:, [1, 2]], rtol=ULPS, atol=0)


def test_renormalize_and_naive_give_the_same_weights() -> None:
    weights, ids = route(Method.Renormalize, ROW, 2)
    naive_weights, naive_ids = route(Method.RenormalizeNaive, ROW, 2)
    torch.testing.assert_close(weights, torch.softmax(ROW[:, [1, 2]], -1), rtol=ULPS, atol=0)
    torch.testing.assert_close(naive_weights, weights, rtol=ULPS, atol=0)
    assert torch.equal(ids, naive_ids)


def test_llama4_is_the_sigmoid_of_the_best() -> None:
    weights, ids = route(Method.Llama4, ROW, 1)
    assert ids.tolist() == [[1]]
    torch.testing.assert_close(weights, torch.sigmoid(torch.tensor([[2.0]])), rtol=ULPS, atol=0)


def test_topk_returns_the_logits() -> None:
    weights, ids = route(Method.TopK, ROW, 3)
    assert ids.tolist() == [[1, 2, 0]]
    assert weights.tolist() == [[2.0, 1.0, 0.0]]


@pytest.mark.parametrize("method", LAWFUL)
def test_ties_go_to_the_lowest_id(method: Method) -> None:
    k = 1 if method == Method.Llama4 else 5
    _, ids = route(method, torch.zeros(2, 600), k)
    assert ids.tolist() == [list(range(k))] * 2
    _, ids = route(method, torch.tensor([[-0.0, 0.0, -0.0]]), 1)
    assert ids.tolist() == [[0]]


@pytest.mark.parametrize("method", LAWFUL)
def test_no_tokens(method: Method) -> None:
    weights, ids = route(method, torch.empty(0, 16), 1)
    assert weights.shape == ids.shape == (0, 1)
    if method in SCORES_FIRST:
        bias = torch.zeros(16)
        weights, _ = route(method, torch.empty(0, 16), 4, num_expert_group=4, topk_group=2, correction_bias=bias)
        assert weights.shape == (0, 4)


def test_logits_of_16_bits_are_widened_before_anything_else() -> None:
    logits = torch.randn(32, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    for method in SCORES_FIRST:
        weights, ids = route(method, logits, 8)
        wide_weights, wide_ids = route(method, logits.float(), 8)
        assert torch.equal(weights, wide_weights)
        assert torch.equal(ids, wide_ids)


def test_inputs_are_not_changed() -> None:
    logits, bias = torch.randn(4, 16), torch.randn(16)
    copies = logits.clone(), bias.clone()
    route(Method.DeepSeekV3, logits, 4, num_expert_group=4, topk_group=2, correction_bias=bias)
    assert torch.equal(logits, copies[0])
    assert torch.equal(bias, copies[1])


def test_grouped_softmax_takes_the_best_of_a_group() -> None:
    # Group 0 has the best expert, group 1 the best pair: DeepSeek-V2 keeps the first, DeepSeek-V3 the second.
    logits = torch.tensor([[2.0, -4.0, 1.5, 1.5]])
    for renormalize in (True, False):
        _, ids = grouped_topk(logits, 2, scoring="softmax", num_expert_group=2, topk_group=1, renormalize=renormalize)
        assert ids.tolist() == [[0, 1]]
    _, ids = grouped_topk(logits, 2, scoring="sigmoid", num_expert_group=2, topk_group=1)
    assert ids.tolist() == [[2, 3]]


def test_groups_of_one_expert() -> None:
    _, ids = route(Method.DeepSeekV3, ROW, 2, num_expert_group=4, topk_group=2)
    assert ids.tolist() == [[1, 2]]


# -- faults of real routers; the names are those of the project's fault catalogue --


def test_fault_topk_nan_duplicates() -> None:
    logits = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    clean_weights, clean_ids = route(Method.Renormalize, logits, 4)
    logits[1] = math.nan
    for method in (Method.Renormalize, *SCORES_FIRST):
        weights, ids = route(method, logits, 4)
        assert ids[1].tolist() == [0, 1, 2, 3]
        assert weights[1].isnan().all()
        assert weights[[0, 2]].isfinite().all()
    weights, ids = route(Method.Renormalize, logits, 4)
    assert torch.equal(ids[[0, 2]], clean_ids[[0, 2]])
    assert torch.equal(weights[[0, 2]], clean_weights[[0, 2]])


def test_one_nan_is_not_chosen_and_not_hidden() -> None:
    logits = torch.tensor([[1.0, math.nan, 3.0, 2.0]])
    for method in (Method.Renormalize, Method.TopK, Method.DeepSeekV3):
        weights, ids = route(method, logits, 2)
        assert ids.tolist() == [[2, 3]]
        assert weights.isnan().all()


@pytest.mark.parametrize("method", [Method.Default, Method.Renormalize, Method.RenormalizeNaive, Method.DeepSeekV3])
def test_a_row_that_names_no_expert_gets_weights_0(method: Method) -> None:
    weights, ids = route(method, torch.full((2, 8), -math.inf), 3)
    assert weights.tolist() == [[0.0] * 3] * 2
    assert ids.tolist() == [[0, 1, 2]] * 2


@pytest.mark.parametrize("method", SCORES_FIRST)
def test_fault_bias_leaks_into_weights(method: Method) -> None:
    logits = torch.tensor([[0.5, -0.5, 0.25, -0.25]])
    bias = torch.tensor([0.0, 10.0, 0.0, 10.0])
    weights, ids = route(method, logits, 2, correction_bias=bias)
    assert ids.tolist() == [[3, 1]]
    scores = torch.sigmoid(logits) if method == Method.DeepSeekV3 else torch.softmax(logits, -1)
    expected = scores[:, [3, 1]]
    if method != Method.Default:
        expected = expected / expected.sum()
    torch.testing.assert_close(weights, expected, rtol=ULPS, atol=0)


def test_fault_renorm_zero_div() -> None:
    # All underflow; the bias rescues two of them, so 0 / 0 is what a plain division would compute.
    logits = torch.full((1, 4), -200.0)
    weights, ids = route(Method.DeepSeekV3, logits, 2, correction_bias=torch.tensor([0.0, 1.0, 2.0, 0.0]))
    assert ids.tolist() == [[2, 1]]
    assert weights.tolist() == [[0.0, 0.0]]


def test_fault_group_mask_zero() -> None:
    # Every biased score in the kept group is negative, so a mask of 0 would let the other group win.
    bias = torch.tensor([-2.0, -3.0, -4.0, -9.0])
    _, ids = route(Method.DeepSeekV3, torch.zeros(1, 4), 2, num_expert_group=2, topk_group=1, correction_bias=bias)
    assert ids.tolist() == [[0, 1]]


def test_fault_routed_scale_dropped_or_applied_twice() -> None:
    for method in LAWFUL:
        plain, _ = route(method, ROW, 1)
        scaled, _ = route(method, ROW, 1, routed_scaling_factor=2.5)
        assert torch.equal(scaled, plain * 2.5)


def test_fault_renorm_flag_ignored() -> None:
    logits = torch.tensor([[3.0, 2.0, -1.0, 0.0]])
    scores = torch.sigmoid(logits[:, :2])
    raw, _ = route(Method.DeepSeekV3, logits, 2, renormalize=False)
    torch.testing.assert_close(raw, scores, rtol=ULPS, atol=0)
    whole, _ = route(Method.DeepSeekV3, logits, 2)
    torch.testing.assert_close(whole, scores / scores.sum(), rtol=ULPS, atol=0)


def test_fault_router_bf16_logits() -> None:
    # These two differ in fp32 and are one number in bf16.
    _, ids = route(Method.Renormalize, torch.tensor([[1.0, 1.001]]), 1)
    assert ids.tolist() == [[1]]


@pytest.mark.parametrize("experts", [512, 513, 896])
def test_fault_expert_scan_cap(experts: int) -> None:
    logits = torch.zeros(1, experts)
    logits[0, -1] = 1.0
    for method in LAWFUL:
        _, ids = route(method, logits, 1)
        assert ids.tolist() == [[experts - 1]]
