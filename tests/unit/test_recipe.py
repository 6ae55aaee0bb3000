"""What a backend may declare of its arithmetic: a field that means nothing is named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from fp8moe.recipe import FP32, Arithmetic, Contract, Recipe, Steps
from fp8moe.reference.units import UNITS


def test_every_unit_is_declared_by_its_name() -> None:
    for name, unit in UNITS.items():
        arithmetic = Arithmetic.on(name)
        assert (arithmetic.fraction_bits, arithmetic.group) == (unit.fraction_bits, unit.group)
        assert arithmetic == Arithmetic(name, unit.fraction_bits, unit.group)


@pytest.mark.parametrize(
    ("declared", "words"),
    [
        (
            {"unit": "hopper.wgma", "fraction_bits": 13, "group": 32},
            "unit='hopper.wgma': expected one of fp32",
        ),
        (
            {"unit": "hopper.wgmma", "fraction_bits": 14, "group": 32},
            "fraction_bits=14: expected 13, since unit=",
        ),
        ({"unit": "hopper.wgmma"}, r"fraction_bits=None: expected 13, .*Arithmetic.on\(\) fills it in"),
        ({"unit": "hopper.wgmma", "fraction_bits": 13, "group": 16}, "group=16: expected 32"),
        ({"unit": "fp32", "fraction_bits": 13, "group": 32}, "fraction_bits=13: expected None, since unit='fp32'"),
        ({"unit": "unknown", "group": 0}, "group=0: expected at least 1"),
        ({"k_order": "backwards"}, "k_order='backwards': expected one of 'natural', 'fours_halved'"),
        (
            {
                "unit": "hopper.mma_f16",
                "fraction_bits": 25,
                "group": 16,
                "promote_every": 48,
                "k_order": "fours_halved",
            },
            "promote_every=48: expected None or a multiple of 32",
        ),
        ({"promote_every": 0}, "promote_every=0: expected None or a multiple of group=1"),
        (
            {"unit": "hopper.wgmma", "fraction_bits": 13, "group": 32, "promote_every": 48},
            "promote_every=48: expected None or a multiple of group=32",
        ),
    ],
)
def test_an_impossible_arithmetic_names_its_field(declared: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Arithmetic(**declared)


def test_an_unknown_unit_is_a_named_error() -> None:
    with pytest.raises(ValueError, match=r"unit='hopper': expected one of fp32, ampere\.mma_f16"):
        Contract(arithmetic=Arithmetic.on("hopper"))
    with pytest.raises(ValueError, match="promote_every=16: expected None or a multiple of group=32"):
        Arithmetic.on("hopper.wgmma", promote_every=16)
    assert Arithmetic.on("fp32") == FP32


def test_steps_may_follow_from_the_size_of_a_call() -> None:
    small, large = Steps(scale_order="activation_first"), Steps(scale_order="weights_first")
    contract = Contract(steps=lambda pairs: small if pairs <= 64 else large)
    assert (contract.steps_for(64), contract.steps_for(65)) == (small, large)
    assert Contract(steps=large).steps_for(1) is large
    assert Contract().steps_for(1) is None


@pytest.mark.parametrize("name", ["scale_order", "activation", "combine"])
def test_an_unknown_step_names_its_field(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}='otherwise': expected one of "):
        Steps(**{name: "otherwise"})


@pytest.mark.parametrize(
    ("declare", "words"),
    [
        (lambda: Recipe(gemm1_output="bf16"), "gemm1_output='bf16': expected one of 'float32', 'input'"),  # type: ignore[arg-type]
        (lambda: Recipe(scaling="multiply"), "scaling='multiply': expected one of 'divide', 'reciprocal'"),  # type: ignore[arg-type]
        (lambda: Recipe(scale_division="inverse"), "scale_division='inverse': expected scaling='reciprocal' and "),
        (lambda: Recipe(requantize="yes"), "requantize='yes': expected True or False"),  # type: ignore[arg-type]
        (lambda: Recipe(requantize=False, gemm1_output="float8"), "gemm1_output='float8': expected requantize=True"),
        (lambda: Recipe(amax_floor=-1.0), "amax_floor=-1.0: expected 0 or more"),
        (lambda: Steps(scale_fma="yes"), "scale_fma='yes': expected True or False"),  # type: ignore[arg-type]
        (lambda: Steps(activation="silu"), "activation='silu': expected one of 'portable'"),  # type: ignore[arg-type]
        (lambda: Contract(arithmetic="wgmma"), "arithmetic='wgmma': expected an Arithmetic, or a function"),  # type: ignore[arg-type]
        (lambda: Contract(recipe="plain"), "recipe='plain': expected a fp8moe.recipe.Recipe"),  # type: ignore[arg-type]
        (lambda: Contract(steps="slot_fma"), "steps='slot_fma': expected a fp8moe.recipe.Steps"),  # type: ignore[arg-type]
        (lambda: Contract(max_experts=0), "max_experts=0: expected None or an integer of at least 1"),
        (lambda: Arithmetic.on("hopper.wgma"), "unit='hopper.wgma': expected one of "),
        (
            lambda: Arithmetic.on("hopper.mma_f16", promote_every=16, k_order="fours_halved"),
            "promote_every=16: expected None or a multiple of 32",
        ),
    ],
)
def test_a_declaration_that_means_nothing_names_its_field(declare: Callable[[], object], words: str) -> None:
    with pytest.raises(ValueError, match=words.replace("(", r"\(")):
        declare()
