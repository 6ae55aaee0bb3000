"""Faults of scales and of arithmetic: none is a no-op, and each is as subtle as it says. Right backends pass."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch

from conformance.build import build
from conformance.cases import Case
from conformance.checks import check_case
from conformance.oracles import tensors_of
from conformance.plan import Subject, Target
from conformance.results import Status
from conformance.trial import run
from conformance.zoo.arithmetic import NUMERICS
from conformance.zoo.around import AROUND
from conformance.zoo.honest import HONEST, drawn_cases
from conformance.zoo.inside import INSIDE
from conformance.zoo.plant import ORDINARY, Fault, plant
from conformance.zoo.scales import SCALES
from fp8moe.backends.torch_experts import BatchedTorchExperts, TorchExperts
from fp8moe.experts import FusedMoEPermuteExpertsUnpermute, contract_violations
from fp8moe.platforms import PLATFORMS
from fp8moe.recipe import Contract, Recipe

HERE = Target("cpu", PLATFORMS["cpu"], "cpu")
FAULTS = {fault.name: fault for fault in (*SCALES, *NUMERICS)}
BASES: dict[str, type[TorchExperts]] = {"Standard": TorchExperts, "Batched": BatchedTorchExperts}
ORDINARY_ONES = [
    Case(
        tokens=3,
        scheme=scheme,
        activation=activation,
        bias=True,
        dtype=dtype,
        hidden=hidden,
        inter=inter,
        values=values,
    )
    for scheme, activation, dtype, hidden, inter, values in (
        ("block", "swigluoai", "bf16", 144, 72, "iid"),
        ("channel_tok", "relu2_no_mul", "fp16", 128, 128, "iid"),
        ("tensor_static", "swiglustep", "bf16", 200, 136, "block_scales"),
        ("tensor_dyn", "gelu", "bf16", 128, 144, "exact_grid"),
        ("none", "silu", "bf16", 128, 128, "iid"),
        ("block_none", "gelu_no_mul", "bf16", 272, 200, "iid"),
    )
]
"""Whatever a mutant gets wrong here, it must not raise: an exception is no conviction by numbers."""


def output_of(cls: type[FusedMoEPermuteExpertsUnpermute], case: Case) -> torch.Tensor:
    tensors = tensors_of(case, "cpu")
    return run(cls(tensors.config, tensors.quant, tensors.weights), tensors).double()


def right_output(fault: Fault, mutant: type[FusedMoEPermuteExpertsUnpermute], case: Case) -> torch.Tensor:
    """Of the honest backend that declares what the mutant does."""
    assert isinstance(mutant.contract, Contract)
    return honest_output(fault.format, mutant.contract.recipe, case)


@cache
def honest_output(format: str, recipe: Recipe, case: Case) -> torch.Tensor:
    return output_of(BASES[format].with_recipe(recipe), case)


@pytest.mark.parametrize("name", FAULTS)
def test_a_mutant_differs_on_its_witness(name: str) -> None:
    fault = FAULTS[name]
    mutant = plant(fault, BASES[fault.format])
    right = right_output(fault, mutant, fault.witness)
    if fault.shows == "raises":
        with pytest.raises(ValueError, match="expected at least 0"):
            output_of(mutant, fault.witness)
        return
    assert fault.shows == "output"
    wrong = output_of(mutant, fault.witness)
    assert not torch.equal(right.nan_to_num(nan=torch.pi), wrong.nan_to_num(nan=torch.pi))


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_subtle_where_it_says_so(name: str) -> None:
    fault = FAULTS[name]
    mutant = plant(fault, BASES[fault.format])
    right, wrong = right_output(fault, mutant, ORDINARY), output_of(mutant, ORDINARY)
    cosine = float(torch.nn.functional.cosine_similarity(right.flatten(), wrong.flatten(), dim=0))
    assert (cosine > 0.99) == fault.subtle, f"cosine {cosine}"


@pytest.mark.parametrize("case", ORDINARY_ONES, ids=str)
def test_no_mutant_raises_on_ordinary_cases(case: Case) -> None:
    for fault in FAULTS.values():
        mutant = plant(fault, BASES[fault.format])
        assert contract_violations(mutant) == []
        assert output_of(mutant, case).shape == (case.tokens, case.hidden), fault.name


def test_names_and_catalogue_ids_are_distinct() -> None:
    faults = (*AROUND, *INSIDE, *SCALES, *NUMERICS)
    names = [fault.name for fault in faults]
    ids = [fault.catalogue for fault in faults if fault.catalogue]
    assert len(set(names)) == len(names)
    assert sorted({one for one in ids if ids.count(one) > 1}) == []


def test_there_are_enough() -> None:
    assert len(FAULTS) >= 45
    assert sum(fault.subtle for fault in FAULTS.values()) >= 30
    assert {fault.format for fault in FAULTS.values()} == set(BASES)


JUDGED = [
    Case(tokens=5, experts=4, hidden=144, inter=200, bias=True, seed=21),
    Case(tokens=5, experts=3, top_k=3, scheme="channel_tok", dtype="fp16", values="same_sign", seed=22),
    Case(tokens=5, experts=4, scheme="tensor_static", activation="swiglustep", values="loud_quiet", seed=23),
]


@pytest.mark.parametrize("name", HONEST)
def test_an_honest_backend_passes(name: str) -> None:
    for case in JUDGED:
        result = check_case(case, Subject(name, HONEST[name], name), HERE)
        assert result.status is Status.PASSED, f"{case}: {result.reason}"
        assert result.error_over_bound is not None


@pytest.mark.parametrize("name", HONEST)
def test_an_honest_backend_is_another_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its sums over experts differ from `TorchExperts`' in fp32, and the judge has something to judge."""
    case = replace(JUDGED[0], inter=264, values="loud_quiet")
    cls, sums = HONEST[name], []
    batched = issubclass(cls, BatchedTorchExperts)
    tensors = build(case)
    for one in (BASES["Batched" if batched else "Standard"], cls):
        backend = one(tensors.config, tensors.quant, tensors.weights)
        stage, kept = backend.experts, []
        monkeypatch.setattr(
            backend, "experts", lambda *given, stage=stage, kept=kept: kept.append(stage(*given)) or kept[-1]
        )
        output = run(backend, tensors)
        sums.append((kept[0], output))
    assert not (torch.equal(sums[0][0], sums[1][0]) and torch.equal(sums[0][1], sums[1][1]))


def test_there_are_ten_honest_backends_and_one_that_declares_nothing() -> None:
    assert len(HONEST) >= 10
    assert len(set(HONEST.values())) == len(HONEST)
    assert sum(cls.contract == Contract() for cls in HONEST.values()) == 1
    assert [name for name, cls in HONEST.items() if cls.contract.deterministic is False] == ["no_order"]


def test_drawn_cases_are_the_same_again_and_of_every_scheme() -> None:
    drawn = list(drawn_cases(200, 5))
    assert drawn == list(drawn_cases(200, 5))
    assert len({case.scheme for case in drawn}) == 10
    assert any(case.fnuz for case in drawn)
