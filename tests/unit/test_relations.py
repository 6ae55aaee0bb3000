"""Relations accuse no honest backend: whatever it declares, however it sums; and each says where it has a say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from conformance.cases import SCHEME_NAMES, Case
from conformance.checks import check_case
from conformance.named_check import Check
from conformance.plan import Subject, Target
from conformance.relations import RELATIONS, relation_case
from conformance.relations.changed import shuffled
from conformance.relations.grounds import scaled_output, token_by_token
from conformance.relations.memory import FilledScratch
from conformance.relations.telling import PREFIX, TELLING
from conformance.results import CheckResult, Status
from conformance.trial import Ended, Trial
from fp8moe.backends.torch_experts import BatchedTorchExperts, TorchExperts
from fp8moe.platforms import PLATFORMS
from fp8moe.recipe import Recipe
from fp8moe.reference.units import UNITS, chain
from fp8moe.validation import InvalidMoEInput
from tests.unit import honest_experts as honest

HERE = Target("cpu", PLATFORMS["cpu"], "cpu")
ROUNDED = Recipe(
    scale_division="reciprocal",
    gemm1_output="input",
    activation_output="input",
    gemm2_output="input",
    weighted="input",
    combine="input",
)
POWERS = Recipe(scale_rounding="power_of_two", scaling="reciprocal")


def silent(cls: type[TorchExperts]) -> type[TorchExperts]:
    """The same, declaring nothing but its recipe."""
    return type(cls.__name__, (cls,), {"contract": replace(cls.contract, arithmetic=None, deterministic=None)})


class RowByRow(TorchExperts):
    """Each row in a product of its own, so that its bits are the same in every batch."""

    contract = replace(TorchExperts.contract, batch_invariant=True)

    def first_gemm(self, inputs: Tensor, index: int) -> Tensor:
        return torch.cat([TorchExperts.first_gemm(self, row, index) for row in torch.split(inputs, 1)])

    def second_gemm(self, intermediate: Tensor, index: int) -> Tensor:
        return torch.cat([TorchExperts.second_gemm(self, row, index) for row in torch.split(intermediate, 1)])


HONEST: dict[str, type[TorchExperts]] = {
    "plain": TorchExperts,
    "batched": BatchedTorchExperts,
    "rounded": TorchExperts.with_recipe(ROUNDED),
    "powers": BatchedTorchExperts.with_recipe(POWERS),
    "silent": silent(TorchExperts),
    "row_by_row": RowByRow,
    "split4": honest.ordered(honest.split4),
    "reverse": honest.ordered(honest.reverse),
}


def named(name: str) -> Check:
    return next(check for check in RELATIONS if check.id == PREFIX + name)


def verdict(check: Check, case: Case, cls: type[TorchExperts]) -> CheckResult:
    return check_case(case, Subject(cls.__name__, cls, cls.__name__), HERE, check.id)


@pytest.mark.parametrize("check", RELATIONS, ids=lambda check: check.id.removeprefix(PREFIX))
def test_no_honest_backend_is_accused(check: Check) -> None:
    """Some schemes, and the backends, activations and dtypes in turn, beginning elsewhere for each relation."""
    activations, dtypes = ("silu", "swigluoai", "gelu", "relu2_no_mul"), ("bf16", "fp16")
    first = 3 * RELATIONS.index(check)
    for number in range(first, first + 4):
        scheme = SCHEME_NAMES[number % len(SCHEME_NAMES)]
        name, cls = list(HONEST.items())[number % len(HONEST)]
        case = relation_case(check, scheme, activations[number % 4], number, dtype=dtypes[number // 4 % 2])
        result = verdict(check, case, cls)
        assert result.status in (Status.PASSED, Status.NOT_APPLICABLE), (name, result.case, result.reason)


@pytest.mark.parametrize("check", RELATIONS, ids=lambda check: check.id.removeprefix(PREFIX))
def test_every_relation_has_telling_cases_of_every_scheme(check: Check) -> None:
    without = {
        "chunks": {"tensor_dyn"},
        "batch_invariance": {"tensor_dyn"},
        "nan_containment": {"tensor_dyn"},
        "scale_code_exchange": {"none"},
    }
    name = check.id.removeprefix(PREFIX)
    activation = "swiglustep" if name == "clamp_witness" else "silu"
    told = {scheme for scheme in SCHEME_NAMES if check.why_not(relation_case(check, scheme, activation))}
    assert told == without.get(name, set())


def test_the_names_are_those_of_the_table() -> None:
    assert [check.id.removeprefix(PREFIX) for check in RELATIONS] == list(TELLING)


def test_a_relation_without_a_say_gives_a_reason() -> None:
    for check in RELATIONS:
        assert check.why_not(Case(tokens=0)), check.id
    assert "no limit" in named("clamp_witness").why_not(Case(activation="silu"))
    assert "on the input" in named("weights_scaled").why_not(Case(top_k=1, weight_on_input=True))
    assert "one rank's" in named("shard_sum").why_not(Case(ep="2:0"))


@pytest.mark.parametrize("case", [Case(ep="2:1", law="masked"), Case(top_k=1, weight_on_input=True), Case(tokens=1)])
def test_other_cases_accuse_nobody(case: Case) -> None:
    """Expert parallelism, weights on the input, one token, biases, rows apart, the other FP8 format."""
    for number, check in enumerate(RELATIONS):
        schemes = ("block", "tensor_static", "channel_tok", "tensor_dyn")
        changed = replace(case, scheme=schemes[number % 4], seed=number, activation="swigluoai")
        changed = replace(changed, hidden=128, inter=160, bias=number % 2 == 0)
        if number % 3 == 0:
            changed = replace(changed, fnuz=True, layout="strided")
        result = verdict(check, changed, TorchExperts)
        assert result.status in (Status.PASSED, Status.NOT_APPLICABLE), (result.case, check.id, result.reason)


def test_batch_invariance_that_is_declared_is_held_to_the_bit() -> None:
    class OtherBits(RowByRow):
        def apply(self, *args: Any, **kwargs: Any) -> Tensor:
            result = super().apply(*args, **kwargs)
            if len(result) % 2:
                result.view(torch.int16)[-1, 0] ^= 1
            return result

    check = named("batch_invariance")
    case = relation_case(check, "block", seed=1)
    assert verdict(check, case, RowByRow).status is Status.PASSED
    result = verdict(check, case, OtherBits)
    assert result.status is Status.FAILED
    assert "1 of" in result.reason
    assert "column 0" in result.reason


def test_bits_of_another_size_of_call_are_compared_only_where_they_are_declared() -> None:
    def ground(cls: type[TorchExperts]) -> bool:
        trial = Trial(Case(tokens=8), Subject(cls.__name__, cls, cls.__name__), HERE)
        trial.start()
        return token_by_token(trial, trial.tensors)

    assert ground(RowByRow)
    assert not ground(TorchExperts)
    assert not ground(silent(RowByRow))


def test_a_backend_may_refuse_an_output_whose_rows_lie_apart() -> None:
    def apply_with(error: Callable[[], Exception]) -> type[TorchExperts]:
        class Refuses(TorchExperts):
            def apply(self, *args: Any, output: Tensor | None = None, **kwargs: Any) -> Tensor:
                if output is not None and not output.is_contiguous():
                    raise error()
                return super().apply(*args, output=output, **kwargs)

        return Refuses

    check = named("output_given")
    case = relation_case(check, "block")
    refused = apply_with(lambda: InvalidMoEInput("output", "not contiguous", "contiguous"))
    assert verdict(check, case, refused).status is Status.PASSED
    for error in (RuntimeError("stride"), InvalidMoEInput("topk_ids", "odd", "even")):
        assert verdict(check, case, apply_with(lambda error=error: error)).status is Status.FAILED  # type: ignore[misc]


def test_scaled_outputs_are_compared_where_both_are_normal() -> None:
    tiny = torch.finfo(torch.float16).tiny
    base = torch.tensor([[1.0, tiny, 2 * tiny, 0.0, 65504.0]], dtype=torch.float16)
    got = torch.full_like(base, -1.0)
    assert scaled_output(base, got, 4.0).tolist() == [[4.0, -1.0, 8 * tiny, -1.0, -1.0]]
    assert scaled_output(base, got, 0.25).tolist() == [[0.25, -1.0, -1.0, -1.0, 16376.0]]


def test_an_order_leaves_nothing_in_its_place() -> None:
    trial = Trial(Case(tokens=3, seed=4), Subject("T", TorchExperts, "T"), HERE)
    for count in range(2, 9):
        order = shuffled(trial, "any", count)
        assert sorted(order.tolist()) == list(range(count))
        assert not bool((order == torch.arange(count)).any())
    assert shuffled(trial, "any", 1).tolist() == [0]


@pytest.mark.parametrize("unit", [name for name in UNITS if name != "fp32"])
def test_zeros_at_the_end_of_k_and_powers_of_two_change_no_bit_of_a_matrix_unit(unit: str) -> None:
    """What padding_hidden, scale_code_exchange and output_scale rest on where sums are replayed."""
    generator = torch.Generator().manual_seed(7)
    fp8 = (torch.float8_e4m3fn, torch.float8_e4m3fnuz)
    dtype = next(dtype for dtype in (*fp8, torch.bfloat16, torch.float16) if UNITS[unit].takes(dtype))
    a, b = (torch.randn(6, 160, generator=generator).exp2().to(dtype) for _ in range(2))
    signs = torch.randint(0, 2, (6, 160), generator=generator).float().mul(2).sub(1)
    b = (b.float() * signs).to(dtype)
    plain = chain(a, b, unit)
    zeros, any_weights = torch.zeros(6, 128).to(dtype), torch.full((6, 128), 3.0).to(dtype)
    assert torch.equal(chain(torch.cat([a, zeros], 1), torch.cat([b, any_weights], 1), unit), plain)
    assert torch.equal(chain(a, (b.float() / 4).to(dtype), unit) * 4, plain)


def test_a_conviction_tells_the_token_of_the_case() -> None:
    trial = Trial(Case(tokens=4), Subject("T", TorchExperts, "T"), HERE)
    ones = torch.ones(2, 3, dtype=torch.bfloat16)
    other = ones.clone()
    other[1, 2] = 2
    with pytest.raises(Ended, match="of token 7, column 2"):
        trial.equal(ones, other, "these", torch.tensor([5, 7]))


def test_scratch_is_filled_whatever_its_type_and_only_within() -> None:
    with FilledScratch():
        filled = [
            torch.empty(3, dtype=torch.float32),
            torch.empty_like(torch.zeros(2, 2), dtype=torch.bfloat16),
            torch.zeros(1).new_empty(2, dtype=torch.float16),
            torch.empty_strided((2, 2), (3, 1)),
            torch.empty(4, dtype=torch.float8_e4m3fn).float(),
        ]
        whole = torch.empty(2, dtype=torch.int32)
        assert torch.zeros(2).tolist() == [0.0, 0.0]
    assert all(bool(tensor.isnan().all()) for tensor in filled)
    assert whole.tolist() == [-1, -1]
    assert torch.empty(0).numel() == 0
