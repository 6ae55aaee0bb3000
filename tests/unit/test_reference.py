"""Both oracles against a tiny MoE in plain Python numbers, and against each other."""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import fp8moe.reference.ideal
from fp8moe.config import FusedMoEConfig, FusedMoEParallelConfig, RoutingMethodType
from fp8moe.experts import MoEWeights
from fp8moe.keys import GroupShape
from fp8moe.quant import FusedMoEQuantConfig, FusedMoEQuantDesc
from fp8moe.recipe import Recipe
from fp8moe.reference.ideal import ideal_moe
from fp8moe.reference.recipe import RecipeTrace, recipe_moe
from tests.unit import brute_force_moe

pytestmark = pytest.mark.usefixtures("one_thread")

EXPERTS, HIDDEN, INTER, TOKENS, TOP_K = 3, 144, 136, 3, 2  # neither a multiple of 128, so every last block is partial
GROUPS = {None: None, "tensor": GroupShape.PER_TENSOR, "token": GroupShape.PER_TOKEN}


def tiny_case(
    weight: str = "block",
    group: Any = 128,
    *,
    static: bool = False,
    activation: str = "silu",
    dtype: torch.dtype = torch.float8_e4m3fn,
    bias: bool = False,
    ids: list[list[int]] | None = None,
    expert_map: list[int] | None = None,
    on_input: bool = False,
    seed: int = 0,
) -> SimpleNamespace:
    """Random codes, scales over four binades, hidden states with a loud channel."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator)

    def codes(*shape: int) -> torch.Tensor:
        drawn = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        return torch.where((drawn & 0x7F == 0x7F) | (drawn == 0x80), 0x31, drawn).to(torch.uint8).view(dtype)

    gated = not activation.endswith("_no_mul")
    halves = 2 if gated else 1
    rows = halves * INTER
    shapes = {
        "tensor": ((EXPERTS,), (EXPERTS,)),
        "channel": ((EXPERTS, rows, 1), (EXPERTS, HIDDEN, 1)),
        "block": ((EXPERTS, halves * 2, 2), (EXPERTS, 2, 2)),
    }[weight]
    scales = [2.0 ** (4 * uniform(*shape) - 12) for shape in shapes]
    biases = [(uniform(EXPERTS, n) - 0.5).bfloat16() if bias else None for n in (rows, HIDDEN)]
    statics = [torch.tensor([0.01]), torch.tensor([0.02])] if static else [None, None]
    weights = MoEWeights(codes(EXPERTS, rows, HIDDEN), codes(EXPERTS, HIDDEN, INTER), *scales, *biases, *statics)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator)
    hidden[:, 5] *= 32
    ids = ids or [[0, 2], [2, 1], [1, 1]]
    config = FusedMoEConfig(
        len(expert_map) if expert_map else EXPERTS,
        len(ids[0]),
        HIDDEN,
        INTER,
        EXPERTS,
        activation,
        "cpu",
        RoutingMethodType.Renormalize,
        FusedMoEParallelConfig.make(),
        torch.bfloat16,
        is_act_and_mul=gated,
    )
    shape = {"tensor": GroupShape.PER_TENSOR, "channel": GroupShape.PER_CHANNEL, "block": GroupShape(128, 128)}[weight]
    desc = FusedMoEQuantDesc(torch.float8_e4m3fn, shape, True)
    grouped = GROUPS[group] if group in GROUPS else GroupShape(1, group)
    act = FusedMoEQuantDesc() if grouped is None else FusedMoEQuantDesc(torch.float8_e4m3fn, grouped, static)
    return SimpleNamespace(
        config=config,
        quant=FusedMoEQuantConfig(act, act, desc, desc),
        weights=weights,
        hidden=hidden.bfloat16(),
        router=uniform(TOKENS, len(ids[0])) + 0.1,
        ids=torch.tensor(ids),
        map=expert_map,
        on_input=on_input,
        group=group,
        a13=0.009999999776482582 if static else None,
        a2=0.019999999552965164 if static else None,
        activation=activation,
        halves=halves,
        cache={},
    )


def arguments(case: SimpleNamespace) -> tuple[tuple[Any, ...], dict[str, Any]]:
    expert_map = None if case.map is None else torch.tensor(case.map, dtype=torch.int32)
    return (
        (case.weights, case.hidden, case.router, case.ids),
        {"expert_map": expert_map, "apply_router_weight_on_input": case.on_input},
    )


def traced(case: SimpleNamespace, recipe: Recipe, **kwargs: Any) -> RecipeTrace:
    positional, keywords = arguments(case)
    return recipe_moe(case.config, case.quant, recipe, *positional, **keywords, **kwargs)


def ideal(case: SimpleNamespace, **kwargs: Any) -> torch.Tensor:
    positional, keywords = arguments(case)
    return ideal_moe(case.config, case.quant, *positional, **keywords, **kwargs)


CASES = {
    "block": {},
    "groups of 64": {"group": 64},
    "block, weights only": {"group": None},
    "channel, token": {"weight": "channel", "group": "token"},
    "tensor, static": {"weight": "tensor", "group": "tensor", "static": True},
    "tensor, dynamic": {"weight": "tensor", "group": "tensor"},
    "tensor, groups": {"weight": "tensor"},
    "fnuz": {"dtype": torch.float8_e4m3fnuz},
    "bias": {"bias": True},
    "absent and repeated": {"ids": [[-1, 2], [-1, -1], [1, 1]]},
    "expert map": {"ids": [[0, 4], [3, 1], [2, 2]], "expert_map": [2, -1, 0, 1, -1]},
    "weight on input": {"ids": [[2], [0], [-1]], "on_input": True},
    "gelu": {"activation": "gelu"},
    "swigluoai": {"activation": "swigluoai"},
    "swiglustep": {"activation": "swiglustep"},
    "silu_no_mul": {"activation": "silu_no_mul"},
    "gelu_no_mul": {"activation": "gelu_no_mul"},
    "relu2_no_mul": {"activation": "relu2_no_mul"},
}
RECIPES = {
    "default": Recipe(),
    "bf16 gate": Recipe(gate_output="input"),
    "bf16 in an activation kernel": Recipe(gemm1_output="input", gate_output="input", activation_output="input"),
    "bf16 between": Recipe(gemm1_output="input", activation_output="input"),
    "FP8 before the activation": Recipe(gemm1_output="float8", intermediate_amax_floor=64.0),
    "powers of two, and FP8 before": Recipe(scale_rounding="power_of_two", gemm1_output="float8"),
    "bf16 slots and sum": Recipe(gemm2_output="input", combine="input"),
    "powers of two": Recipe(scale_rounding="power_of_two"),
    "reciprocal": Recipe(scaling="reciprocal"),
    "scales by reciprocal": Recipe(scale_division="reciprocal"),
    "by a factor": Recipe(scale_division="inverse", scaling="reciprocal"),
    "by Hopper's factor": Recipe(scale_division="approximate_inverse", scaling="reciprocal", activation_output="input"),
    "bf16 weighted": Recipe(weighted="input"),
    "by expert": Recipe(dynamic_tensor_scope="expert"),
    "another floor of the intermediate": Recipe(intermediate_amax_floor=64.0),
    "no floor, then one": Recipe(amax_floor=0.0, intermediate_amax_floor=64.0, scaling="reciprocal"),
    "not requantised": Recipe(requantize=False),
}


def assert_equal_up_to_float64(mine: torch.Tensor, exact: list[list[float]]) -> None:
    wanted = torch.tensor(exact, dtype=torch.float64)
    # K = 144 float64 additions of terms up to 100 times the sum, twice.
    assert float((mine - wanted).abs().max()) <= 144 * 100 * 2.0**-52 * float(wanted.abs().max())


@pytest.mark.parametrize("name", CASES)
def test_recipe_oracle_is_the_plain_computation(name: str) -> None:
    for recipe in RECIPES.values() if name in ("block", "tensor, dynamic") else (RECIPES["default"],):
        case = tiny_case(**CASES[name])
        trace = traced(case, recipe)
        total, middle = brute_force_moe.moe(case, SimpleNamespace(**vars(recipe)))
        order = torch.argsort(trace.pairs.row * TOP_K + trace.pairs.slot)
        assert_equal_up_to_float64(trace.intermediate[order], middle)
        assert_equal_up_to_float64(trace.R, total)


@pytest.mark.parametrize("name", ["gelu", "swigluoai", "swiglustep", "silu_no_mul", "weight on input"])
def test_a_gate_that_is_rounded_is_the_plain_computation(name: str) -> None:
    case, recipe = tiny_case(**CASES[name]), RECIPES["bf16 gate"]
    trace = traced(case, recipe)
    total, middle = brute_force_moe.moe(case, SimpleNamespace(**vars(recipe)))
    order = torch.argsort(trace.pairs.row * TOP_K + trace.pairs.slot)
    assert_equal_up_to_float64(trace.intermediate[order], middle)
    assert_equal_up_to_float64(trace.R, total)
    assert torch.equal(trace.R, traced(case, Recipe()).R) == (name == "silu_no_mul")


def test_input_weights_that_are_rounded_are_the_plain_computation() -> None:
    case, recipe = tiny_case(**CASES["weight on input"]), Recipe(input_weights="input")
    trace = traced(case, recipe)
    total, middle = brute_force_moe.moe(case, SimpleNamespace(**vars(recipe)))
    order = torch.argsort(trace.pairs.row * TOP_K + trace.pairs.slot)
    assert_equal_up_to_float64(trace.intermediate[order], middle)
    assert_equal_up_to_float64(trace.R, total)
    assert not torch.equal(trace.R, traced(case, Recipe()).R)


def test_a_floor_of_the_intermediate_alone() -> None:
    case = tiny_case(**CASES["block"])
    plain = traced(case, Recipe())
    other = traced(case, Recipe(intermediate_amax_floor=64.0))
    assert torch.equal(plain.first, other.first)
    assert not torch.equal(plain.intermediate, other.intermediate)


@pytest.mark.parametrize("name", CASES)
def test_ideal_oracle_is_the_plain_computation(name: str) -> None:
    case = tiny_case(**CASES[name])
    assert_equal_up_to_float64(ideal(case), brute_force_moe.moe(case, None)[0])


@pytest.mark.parametrize("recipe", [Recipe(), Recipe(dynamic_tensor_scope="expert")], ids=["batch", "expert"])
@pytest.mark.parametrize("name", ["block", "tensor, dynamic", "tensor, static", "absent and repeated"])
def test_some_tokens_come_to_the_same_as_all_of_them(name: str, recipe: Recipe) -> None:
    case, tokens = tiny_case(**CASES[name]), torch.tensor([2, 0])
    whole, part = traced(case, recipe), traced(case, recipe, tokens=tokens)
    assert_equal_up_to_float64(part.R, whole.R[tokens].tolist())
    assert_equal_up_to_float64(ideal(case, tokens=tokens), ideal(case)[tokens].tolist())


def test_a_shared_amax_keeps_the_pair_that_sets_it_as_a_witness() -> None:
    case = tiny_case(weight="tensor", group="tensor")
    loud = traced(case, Recipe()).intermediate.abs().amax(1).argmax()
    row = int(traced(case, Recipe()).pairs.row[loud])
    others = torch.tensor([token for token in range(TOKENS) if token != row])
    pairs = traced(case, Recipe(), tokens=others).pairs
    assert row in pairs.row[pairs.token == -1].tolist()


def test_dynamic_scales_of_the_batch_depend_on_the_other_tokens_and_those_of_an_expert_do_not() -> None:
    case = tiny_case(weight="tensor", group="tensor", ids=[[0], [1], [2]])
    louder = SimpleNamespace(**vars(case))
    louder.hidden = case.hidden.clone()
    louder.hidden[1:] *= 5
    for scope, equal in (("batch", False), ("expert", True)):
        recipe = Recipe(dynamic_tensor_scope=scope)  # type: ignore[arg-type]
        assert torch.equal(traced(case, recipe).R[0], traced(louder, recipe).R[0]) == equal


def test_zeros_and_no_tokens() -> None:
    case = tiny_case()
    case.hidden = torch.zeros_like(case.hidden)
    assert not traced(case, Recipe()).R.any()
    case.hidden, case.router, case.ids = case.hidden[:0], case.router[:0], case.ids[:0]
    assert traced(case, Recipe()).R.shape == ideal(case).shape == (0, HIDDEN)


def test_unquantised_weights() -> None:
    case = tiny_case(group=None)
    generator = torch.Generator().manual_seed(5)
    w13, w2 = (torch.randn(t.shape, generator=generator).bfloat16() for t in (case.weights.w13, case.weights.w2))
    case.weights, case.quant = MoEWeights(w13, w2), FusedMoEQuantConfig()
    assert_equal_up_to_float64(ideal(case), brute_force_moe.moe(case, None)[0])
    total, _ = brute_force_moe.moe(case, SimpleNamespace(**vars(Recipe())))
    assert_equal_up_to_float64(traced(case, Recipe()).R, total)


def test_granularities_that_no_scheme_has_are_refused() -> None:
    case = tiny_case(weight="channel", group="token")
    case.quant = replace(case.quant, a1=replace(case.quant.a1, static=True), a2=replace(case.quant.a2, static=True))
    with pytest.raises(ValueError, match="static"):
        traced(case, Recipe())
    case = tiny_case()
    case.config = replace(case.config, activation="tanh")
    for oracle in (lambda: traced(case, Recipe()), lambda: ideal(case)):
        with pytest.raises(ValueError, match="tanh"):
            oracle()


def test_the_ideal_oracle_shares_no_code() -> None:
    tree = ast.parse(Path(fp8moe.reference.ideal.__file__).read_text())
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name for name in modules if name and name.startswith("fp8moe")} == {
        "fp8moe.config",
        "fp8moe.experts",
        "fp8moe.quant",
        "fp8moe.reference.closed",  # which only says whether it may be asked
    }
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert not names & {"quantize", "dequantize", "activate"}
