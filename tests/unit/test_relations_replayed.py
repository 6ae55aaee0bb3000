"""Relations on backends that are the replay of what they declare: bits are compared, on units that truncate."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from conformance.checks import check_case
from conformance.matrix import BY_BITS
from conformance.named_check import Check
from conformance.plan import Subject, Target
from conformance.relations import RELATIONS, relation_case
from conformance.relations.telling import PREFIX
from conformance.results import CheckResult, Status
from fp8moe.backends.torch_experts import TorchExperts
from fp8moe.platforms import PLATFORMS
from fp8moe.recipe import Arithmetic, Contract, Steps
from fp8moe.reference import closed
from fp8moe.reference.recipe import recipe_moe
from fp8moe.reference.replay import replay_moe

HERE = Target("cpu", PLATFORMS["cpu"], "cpu")
SMALL = Arithmetic.on("hopper.mma_f16", promote_every=128, k_order="fours_halved")
LARGE = Arithmetic.on("hopper.wgmma", promote_every=128)
SCHEMES = ("block", "channel_tok", "tensor_static", "tensor_dyn")


def by_size(pairs: int) -> Arithmetic:
    """As a tile's height follows from the size of a call."""
    return SMALL if pairs <= 12 else LARGE


class Replaying(TorchExperts):
    """What the oracle of the declared arithmetic gives."""

    contract = Contract(arithmetic=by_size, steps=Steps(), deterministic=True)

    def apply(self, *args: Any, output: Tensor | None = None, **kwargs: Any) -> Tensor:
        self.check_call(*args, output=output, **kwargs)
        pairs = args[2].numel()
        arithmetic, steps = self.contract.arithmetic_for(pairs), self.contract.steps_for(pairs)
        assert arithmetic is not None
        assert steps is not None
        hidden = args[0].contiguous()
        with mock.patch.object(closed, "_calls", []):  # what a backend may not do: ask the oracles
            trace = recipe_moe(self.config, self.quant, self.contract.recipe, self.weights, hidden, *args[1:], **kwargs)
            result = replay_moe(trace, arithmetic, steps).output
        return result if output is None else output.copy_(result)


def verdict(check: Check, cls: type[TorchExperts], scheme: str, seed: int, tokens: int | None = None) -> CheckResult:
    activation = "swigluoai" if "clamp" in check.id else "silu"
    case = relation_case(check, scheme, activation, seed)
    case = case if tokens is None else replace(case, tokens=tokens)
    return check_case(case, Subject(cls.__name__, cls, cls.__name__), HERE, check.id)


@pytest.mark.parametrize("check", RELATIONS, ids=lambda check: check.id.removeprefix(PREFIX))
def test_a_replayed_backend_is_not_accused(check: Check) -> None:
    number = RELATIONS.index(check)
    result = verdict(check, Replaying, SCHEMES[number % len(SCHEMES)], number)
    assert result.status in (Status.PASSED, Status.NOT_APPLICABLE), (result.case, result.reason)
    assert result.status is not Status.PASSED or result.judged_by == BY_BITS


class OneUnit(Replaying):
    contract = replace(Replaying.contract, arithmetic=LARGE)


class ByPlace(OneUnit):
    """The last bit of an element is another in the first row of a call."""

    def apply(self, *args: Any, **kwargs: Any) -> Tensor:
        result = super().apply(*args, **kwargs)
        result.view(torch.int16)[0, 0] ^= 1
        return result


class ByExpert(OneUnit):
    """The last bit of an element is another where a token goes to expert 0."""

    def apply(self, *args: Any, **kwargs: Any) -> Tensor:
        result = super().apply(*args, **kwargs)
        result.view(torch.int16)[(args[2] == 0).any(dim=1), 0] ^= 1
        return result


@pytest.mark.parametrize(
    ("name", "cls"),
    [
        ("token_permutation", ByPlace),
        ("duplicate_tokens", ByPlace),
        ("chunks", ByPlace),
        ("batch_invariance", ByPlace),
        ("expert_relabelling", ByExpert),
    ],
)
def test_one_bit_is_enough(name: str, cls: type[TorchExperts]) -> None:
    check = next(check for check in RELATIONS if check.id == PREFIX + name)
    assert verdict(check, OneUnit, "channel_tok", 1).status is Status.PASSED
    result = verdict(check, cls, "channel_tok", 1)
    assert result.status is Status.FAILED
    assert " elements differ, the farthest of token " in result.reason


def test_bits_are_not_asked_for_where_the_instruction_changes_with_the_size() -> None:
    """The same backend, small calls on the small unit: a part of the batch has other bits, and nobody objects; one
    that declares a single unit and still does it is convicted."""
    check = next(check for check in RELATIONS if check.id == PREFIX + "chunks")

    class OneUnitDeclared(OneUnit):
        def apply(self, *args: Any, **kwargs: Any) -> Tensor:
            small = len(args[0]) <= 6
            self.contract = replace(self.contract, arithmetic=SMALL if small else LARGE)
            return super().apply(*args, **kwargs)

    assert verdict(check, Replaying, "channel_tok", 1, tokens=12).status is Status.PASSED
    result = verdict(check, OneUnitDeclared, "channel_tok", 1, tokens=12)
    assert result.status is Status.FAILED
    assert "the first 4 of 12 tokens" in result.reason
