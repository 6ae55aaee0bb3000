"""Faults that change only the last bits of our kernels: equality with the replay convicts them, and names the stage."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from conformance.cases import Case
from conformance.zoo import ARITHMETIC, BATCHED_TRITON, TRITON
from conformance.zoo.mutated import Edit, StaleMutation, mutated

DEVICE = "cuda" if torch.cuda.is_available() else "interpreter"
ZOOS = {"TRITON": TRITON, "BATCHED_TRITON": BATCHED_TRITON}

SMALL = Case(tokens=16, experts=2, top_k=2, hidden=512, inter=64, dtype="fp16", values="exact_sums")
"""Sums are exact, so that in the interpreter, too, equality is the verdict; and the seeds are ones with two calls, of
which one shows its stages."""
IN_THE_INTERPRETER = {
    "block": replace(SMALL, seed=4),
    "row": replace(SMALL, scheme="channel_tok", seed=8),
    "outputs": replace(SMALL, seed=8),
}
HEIGHTS = {
    "TRITON": (Case(tokens=32, experts=4, top_k=2), Case(tokens=64, experts=2, top_k=2)),
    "BATCHED_TRITON": (Case(tokens=64, experts=2, top_k=2),),
}
"""Tiles of 16 and of 64 rows, as TRITON chooses; BATCHED_TRITON's always have 64."""
SIZES = {
    "block": Case(hidden=512, inter=256, dtype="fp16", seed=1),
    "row": Case(hidden=512, inter=256, dtype="fp16", seed=1, scheme="channel_tok"),
    "outputs": Case(tokens=512, experts=4, top_k=2, hidden=2048, inter=128, dtype="fp16", seed=1),
}
"""A step of fp32 shows in many elements of the stage that it was made in, but in only one of 8,000 that are rounded to
fp16, as outputs are: so for the last stage there are many of those."""
HARDWARE = "only hardware shows it: "


@dataclass(frozen=True)
class Expected:
    """Where a fault shows.

    Args:
        stage: at which the backend and its replay part.
        schemes: in which it must show on a device. A step of an activation shows through a scale, which is of a
            group's largest value, and where that is a whole row's there are too few of them.
        simulated: the one whose case convicts it in the interpreter; or why none does.
    """

    stage: str
    schemes: tuple[str, ...]
    simulated: str


FP8 = ("block", "row")
ACTIVATION = ("block",)
EXPECTED = {
    "promoted_every_64": Expected("first_gemm", FP8, "block"),
    "never_promoted": Expected("first_gemm", ("row",), HARDWARE + "exact sums have no bits that a longer chain loses"),
    "accumulator_of_14_bits": Expected("first_gemm", FP8, "block"),
    "weight_scale_first": Expected("first_gemm", FP8, "block"),
    "product_rounded": Expected("first_gemm", ("block",), "block"),
    "exponential_of_the_device": Expected(
        "activation",
        ACTIVATION,
        HARDWARE + "the interpreter's exponential is numpy's, whose bits are each processor's own",
    ),
    "exponential_one_degree_short": Expected("activation", ACTIVATION, "block"),
    "silu_by_reciprocal": Expected("activation", ACTIVATION, "row"),
    "silu_by_approximate_division": Expected("activation", ACTIVATION, HARDWARE + "the interpreter's `/` is exact"),
    "scale_by_reciprocal": Expected("first_gemm", FP8, "block"),
    "second_scale_by_reciprocal": Expected("second_gemm", FP8, "row"),
    "subnormal_codes_flushed": Expected("requantisation", FP8, "block"),
    "weighted_product_rounded": Expected("combine", ("outputs",), "outputs"),
}
PLANTED = [(zoo, fault) for zoo, faults in ZOOS.items() for fault in vars(faults) if fault in ARITHMETIC]


def on_a_device(zoo: str, scheme: str) -> tuple[Case, ...]:
    if scheme == "outputs":
        return (SIZES[scheme],)
    return tuple(
        replace(SIZES[scheme], tokens=height.tokens, experts=height.experts, top_k=height.top_k)
        for height in HEIGHTS[zoo]
    )


def cases_of(zoo: str, fault: str) -> tuple[Case, ...]:
    """Where it must be convicted here; none where a CPU cannot show it."""
    expected = EXPECTED[fault]
    if DEVICE == "interpreter":
        return (IN_THE_INTERPRETER[expected.simulated],) if expected.simulated in IN_THE_INTERPRETER else ()
    return tuple(case for scheme in expected.schemes for case in on_a_device(zoo, scheme))


def every_case(zoo: str) -> tuple[Case, ...]:
    if DEVICE == "interpreter":
        return tuple(IN_THE_INTERPRETER.values())
    return tuple(case for scheme in SIZES for case in on_a_device(zoo, scheme))


Verdict = Callable[[str, str, Case], dict[str, Any]]


@pytest.fixture(scope="module")
def verdict(verdicts: Callable[[Sequence[tuple[str, str, str]]], list[dict[str, Any]]]) -> Verdict:
    """(zoo, fault or "", case) to what the suite says."""
    asked = [(zoo, "", str(case)) for zoo in ZOOS for case in every_case(zoo)]
    asked += [(zoo, fault, str(case)) for zoo, fault in PLANTED for case in cases_of(zoo, fault)]
    asked.sort(key=lambda which: which[2])  # the suite keeps what a case's oracles came to
    known = dict(zip(asked, verdicts(asked), strict=True))
    return lambda zoo, fault, case: known[zoo, fault, str(case)]


def needs_bits(honest: dict[str, Any]) -> None:
    """Skips where the arithmetic of this device is not declared to the bit: there is no equality to judge by."""
    if honest["status"] == "passed" and honest["judged_by"] != "bits":
        pytest.skip(f"not judged by equality on this device: {honest['judged_by']}")


def test_every_fault_has_its_place() -> None:
    assert EXPECTED.keys() == ARITHMETIC.keys()
    assert len(PLANTED) == 2 * len(ARITHMETIC) - 1  # the batched format is combined in torch


@pytest.mark.parametrize("zoo", ZOOS)
def test_the_honest_backend_passes_the_same_cases(verdict: Verdict, zoo: str) -> None:
    told = {str(case): verdict(zoo, "", case) for case in every_case(zoo)}
    assert all(found["status"] == "passed" for found in told.values()), told
    for found in told.values():
        needs_bits(found)


@pytest.mark.parametrize(("zoo", "fault"), PLANTED)
def test_a_fault_of_the_last_bits_is_convicted_at_its_stage(verdict: Verdict, zoo: str, fault: str) -> None:
    expected, cases = EXPECTED[fault], cases_of(zoo, fault)
    if not cases:
        pytest.skip(expected.simulated)
    for case in cases:
        needs_bits(verdict(zoo, "", case))
        found = verdict(zoo, fault, case)
        assert found["status"] == "failed", f"{zoo}.{fault} passed {case}"
        told = re.fullmatch(
            r"bits: (?:\d+ of \d+ elements differ from the replay of the declared arithmetic; the farthest at token "
            r"\d+, column \d+: expected \S+, got \S+|the output equals the replay of the declared arithmetic, and "
            r"what led to it does not); they part at (\w+): .*",
            found["reason"],
        )
        assert told, found["reason"]
        assert told[1] == expected.stage, f"{case}: {found['reason']}"
        assert found["cosine"] > 0.9999, f"{case}: the cosine sees it: {found['cosine']}"


@pytest.mark.parametrize("zoo", ZOOS)
def test_a_bound_alone_would_let_most_of_them_pass(
    verdict: Verdict, zoo: str, record_testsuite_property: Callable[[str, object], None]
) -> None:
    """The case for equality: of the faults that it convicts, the bound around the recipe convicts few."""
    for case in every_case(zoo):
        needs_bits(verdict(zoo, "", case))
    judged = [fault for which, fault in PLANTED if which == zoo and cases_of(zoo, fault)]
    hidden = [name for name in judged if all(verdict(zoo, name, case)["within_bound"] for case in cases_of(zoo, name))]
    record_testsuite_property(f"hidden_from_the_bound_{zoo}", f"{len(hidden)} of {len(judged)}: {', '.join(hidden)}")
    assert len(hidden) >= 5, f"hidden from the bound: {hidden} of {judged}"
    assert len(hidden) > len(judged) // 2


def test_a_mutation_whose_text_is_gone_says_so() -> None:
    """Source only: nothing is imported before the text is found, so triton stays out of this process."""
    with pytest.raises(StaleMutation, match=r"occurs 0 times in fp8moe\.kernels\.reduce, not 1"):
        mutated("reduce", "stale", (Edit("no such text", ""),))
