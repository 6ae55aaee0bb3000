"""The replay oracle against the declared arithmetic restated in plain Python; what keeps a call from a replay."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from conformance.build import build
from conformance.cases import Case
from conformance.oracles import trace_of
from fp8moe.quant import FusedMoEQuantConfig
from fp8moe.recipe import FP32, Arithmetic, Contract, Recipe, Steps
from fp8moe.reference.replay import Replay, k_order, replay_moe, why_not_replayed
from fp8moe.reference.replayed_codes import rounded_to_fp8
from fp8moe.reference.rounding import E4M3FN, E4M3FNUZ, FloatFormat, round_to
from fp8moe.schemes import SCHEMES, UNQUANTISED
from tests.unit.slow_replay import SlowReplay

pytestmark = pytest.mark.usefixtures("one_thread")

FP8 = ("block", "tensor_static", "tensor_dyn", "tensor_tok", "channel_tok")
WGMMA = Arithmetic.on("hopper.wgmma", promote_every=128)
MMA = Arithmetic.on("hopper.mma_f16", promote_every=128, k_order="fours_halved")
WIDE = Arithmetic.on("hopper.wgmma_f16")
STEPS = Steps()
PLAIN = Case(tokens=4, experts=3, top_k=2, hidden=144, inter=136, law="masked", values="block_scales", bias=True)
"""Both GEMMs have two blocks of K, the last one partial; so have the halves of w13."""


def assert_replayed(case: Case, recipe: Recipe, arithmetic: Arithmetic, steps: Steps) -> None:
    """Every stage of every pair, and the output, bit for bit."""
    tensors = build(case)
    replay = replay_moe(trace_of(tensors, recipe), arithmetic, steps)
    slow = SlowReplay(tensors, recipe, arithmetic, steps)
    assert set(slow.stages) == set(replay.stages) - {"combine"}
    pairs = list(zip(replay.pairs.row.tolist(), replay.pairs.slot.tolist(), strict=True))
    assert set(pairs) == set(slow.experts)
    for stage, rows in slow.stages.items():
        got = replay.stages[stage]
        expected = torch.tensor([rows[pair] for pair in pairs], dtype=torch.float32)
        where = (got.float() != expected).nonzero()
        assert not len(where), (stage, where[0].tolist(), len(where), got.numel())
    assert replay.output.dtype == tensors.hidden_states.dtype
    assert torch.equal(replay.output.float(), torch.tensor(slow.output, dtype=torch.float32))
    assert bool(replay.output.any())


@pytest.mark.parametrize("scheme", [*FP8, "none"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_every_scheme_in_both_dtypes(scheme: str, dtype: str) -> None:
    """In bf16 as a large tile of Hopper computes it, in fp16 as a small one."""
    case = replace(PLAIN, scheme=scheme, dtype=dtype)
    if scheme == "none":
        assert_replayed(case, Recipe(activation_output="input"), WIDE, Steps())
    else:
        assert_replayed(case, Recipe(), WGMMA if dtype == "bf16" else MMA, Steps())


PRODUCT = Steps(scale_order="product")
OTHERWISE: dict[str, tuple[Case, Recipe, Arithmetic, Steps]] = {
    "no fma, block": (PLAIN, Recipe(), WGMMA, Steps(scale_fma=False)),
    "product, block": (PLAIN, Recipe(), WGMMA, PRODUCT),
    "product, no fma": (PLAIN, Recipe(), MMA, Steps(scale_order="product", scale_fma=False)),
    "product, channel": (replace(PLAIN, scheme="channel_tok"), Recipe(), WGMMA, PRODUCT),
    "weights first, block": (PLAIN, Recipe(), WGMMA, Steps(scale_order="weights_first")),
    "weights first, channel": (
        replace(PLAIN, scheme="channel_tok", tokens=6),
        Recipe(),
        WGMMA,
        Steps(scale_order="weights_first"),
    ),
    # One bit of fp32 before the output is rounded to 16: few cases show it.
    "slot_sum": (
        replace(PLAIN, scheme="tensor_static", tokens=6, top_k=3, law="uniform", dtype="fp16", seed=2),
        Recipe(),
        WGMMA,
        Steps(combine="slot_sum"),
    ),
    "powers of two": (PLAIN, Recipe(scale_rounding="power_of_two", scaling="reciprocal"), WGMMA, Steps()),
    "reciprocal": (replace(PLAIN, tokens=6, values="iid", seed=2), Recipe(scaling="reciprocal"), WGMMA, Steps()),
    "a high floor": (replace(PLAIN, scheme="tensor_tok"), Recipe(amax_floor=2.0), WGMMA, Steps()),
    "a high floor of the intermediate": (
        replace(PLAIN, scheme="tensor_tok"),
        Recipe(amax_floor=0.0, intermediate_amax_floor=2.0),
        WGMMA,
        Steps(),
    ),
    "input weights in 16 bits": (
        replace(PLAIN, tokens=6, top_k=1, weight_on_input=True, values="iid"),
        Recipe(input_weights="input"),
        WGMMA,
        Steps(),
    ),
    "gemm1 in 16 bits": (PLAIN, Recipe(gemm1_output="input"), WGMMA, Steps()),
    "the gate in 16 bits": (PLAIN, Recipe(gate_output="input"), WGMMA, Steps()),
    "the gate of gelu in fp16": (
        replace(PLAIN, activation="gelu", dtype="fp16", scheme="tensor_dyn"),
        Recipe(gemm1_output="input", gate_output="input", activation_output="input"),
        WGMMA,
        Steps(),
    ),
    "the gate of swigluoai": (
        replace(PLAIN, activation="swigluoai", values="loud_quiet"),
        Recipe(gate_output="input"),
        WGMMA,
        Steps(),
    ),
    "activation in 16 bits": (replace(PLAIN, dtype="fp16"), Recipe(activation_output="input"), WGMMA, Steps()),
    "gemm2 in 16 bits": (PLAIN, Recipe(gemm2_output="input"), WGMMA, Steps()),
    "weighted in 16 bits": (PLAIN, Recipe(weighted="input"), WGMMA, Steps()),
    "scales by reciprocal": (replace(PLAIN, tokens=6), Recipe(scale_division="reciprocal"), WGMMA, Steps()),
    "running sum in 16 bits": (PLAIN, Recipe(combine="input"), WGMMA, Steps(combine="slot_sum")),
    "scales by expert": (replace(PLAIN, scheme="tensor_dyn"), Recipe(dynamic_tensor_scope="expert"), WGMMA, Steps()),
    "another rank": (replace(PLAIN, experts=6, ep="2:1", top_k=3), Recipe(), WGMMA, Steps()),
    "another rank, scales of the batch": (
        replace(PLAIN, scheme="tensor_dyn", experts=6, ep="2:1", top_k=3),
        Recipe(),
        WGMMA,
        Steps(),
    ),
    "one expert twice": (replace(PLAIN, law="repeated"), Recipe(), MMA, Steps()),
    "weight on input": (replace(PLAIN, top_k=1, weight_on_input=True, dtype="fp16"), Recipe(), WGMMA, Steps()),
    "weight on input, static": (
        replace(PLAIN, scheme="tensor_static", top_k=1, weight_on_input=True),
        Recipe(),
        WGMMA,
        Steps(),
    ),
    "no gate": (replace(PLAIN, activation="relu2_no_mul"), Recipe(), WGMMA, Steps()),
    "never promoted": (replace(PLAIN, scheme="channel_tok"), Recipe(), Arithmetic.on("hopper.wgmma"), Steps()),
    "promoted every 64": (
        replace(PLAIN, scheme="tensor_static"),
        Recipe(),
        Arithmetic.on("hopper.wgmma", promote_every=64),
        Steps(),
    ),
    "fnuz": (replace(PLAIN, fnuz=True), Recipe(), Arithmetic.on("cdna3.mfma", promote_every=128), Steps()),
    "exact sums in fp32": (replace(PLAIN, values="exact_sums"), Recipe(), Arithmetic(promote_every=128), Steps()),
}


@pytest.mark.parametrize("name", OTHERWISE)
def test_every_step_and_rounding(name: str) -> None:
    assert_replayed(*OTHERWISE[name])


DECLARED = [name for name, (_, recipe, _, steps) in OTHERWISE.items() if (recipe, steps) != (Recipe(), Steps())]


@pytest.mark.parametrize("name", DECLARED)
def test_the_cases_show_their_options(name: str) -> None:
    """Without its option the same case comes out differently, so that the test above compares something."""
    case, recipe, arithmetic, steps = OTHERWISE[name]
    tensors = build(case)
    with_it = replay_moe(trace_of(tensors, recipe), arithmetic, steps).stages
    without = replay_moe(trace_of(tensors, Recipe()), arithmetic, Steps()).stages
    assert any(not torch.equal(with_it[stage].float(), without[stage].float()) for stage in with_it)


def test_an_activation_without_a_gate_has_none_to_round() -> None:
    tensors = build(replace(PLAIN, activation="silu_no_mul"))
    rounded, plain = (
        replay_moe(trace_of(tensors, recipe), WGMMA, STEPS).stages for recipe in (Recipe(gate_output="input"), Recipe())
    )
    assert all(torch.equal(rounded[stage], plain[stage]) for stage in plain)


@pytest.mark.parametrize("scheme", [*FP8, "none"])
def test_some_tokens_get_what_all_get(scheme: str) -> None:
    tensors = build(replace(PLAIN, scheme=scheme, tokens=9))
    arithmetic = WIDE if scheme == "none" else WGMMA
    everyone = replay_moe(trace_of(tensors, Recipe()), arithmetic, Steps())
    tokens = torch.tensor([1, 4, 5, 8])
    some = replay_moe(trace_of(tensors, Recipe(), tokens), arithmetic, Steps())
    assert torch.equal(some.tokens, tokens)
    assert torch.equal(some.output, everyone.output[tokens])


@pytest.mark.parametrize("case", [replace(PLAIN, tokens=0), replace(PLAIN, scheme="tensor_dyn", tokens=0)], ids=str)
@pytest.mark.parametrize("scope", ["batch", "expert"])
def test_no_tokens(case: Case, scope: str) -> None:
    recipe = Recipe(dynamic_tensor_scope=scope)
    replay: Replay = replay_moe(trace_of(build(case), recipe), WGMMA, Steps())
    assert replay.output.shape == (0, 144)


@pytest.mark.parametrize("scheme", [*FP8, "none"])
def test_tokens_without_an_expert_get_zeros(scheme: str) -> None:
    tensors = build(replace(PLAIN, scheme=scheme))
    nobody = replace(tensors, topk_ids=torch.full_like(tensors.topk_ids, -1))
    replay = replay_moe(trace_of(nobody, Recipe()), WIDE if scheme == "none" else WGMMA, Steps())
    assert replay.output.shape == (4, 144)
    assert not bool(replay.output.any())


def test_the_oracle_of_the_recipe_is_near() -> None:
    """The two share little code: what one has in float64, the other has to the accuracy of 14 bits."""
    for scheme in (*FP8, "none"):
        tensors = build(replace(PLAIN, scheme=scheme, values="iid"))
        trace = trace_of(tensors, Recipe())
        replay = replay_moe(trace, WIDE if scheme == "none" else WGMMA, Steps())
        assert float((replay.output.double() - trace.R).abs().max()) < 2.0**-5 * float(trace.R.abs().max()), scheme


# -- what cannot be replayed --


def why(
    arithmetic: Arithmetic | None,
    *,
    scheme: str = "block",
    recipe: Recipe | None = None,
    steps: Steps | None = STEPS,
    fnuz: bool = False,
    exact_sums: bool = False,
) -> str:
    tensors = build(Case(tokens=1, scheme=scheme, fnuz=fnuz, experts=2, hidden=128, inter=128))
    contract = Contract(recipe or Recipe(), arithmetic=arithmetic, steps=steps)
    return why_not_replayed(contract, tensors.quant, tensors.weights, 2, exact_sums=exact_sums)


def test_what_is_replayed() -> None:
    assert all(not why(arithmetic, scheme=scheme) for scheme in FP8 for arithmetic in (WGMMA, MMA))
    assert not why(WIDE, scheme="none")
    assert not why(WIDE, scheme="none", recipe=Recipe(requantize=False))
    assert not why(Arithmetic.on("hopper.wgmma"), scheme="tensor_tok")
    assert not why(Arithmetic.on("cdna3.mfma", promote_every=128), fnuz=True)
    assert not why(Arithmetic(promote_every=128), exact_sums=True)


def test_what_is_not_replayed_says_why() -> None:
    assert why(None) == "its matrix unit is not declared"
    assert why(Arithmetic("unknown", 13, 32, 128)) == "its matrix unit is not declared"
    assert why(WGMMA, steps=None) == "its steps around the matrix unit are not declared"
    assert why(FP32) == why(Arithmetic(promote_every=128)) == "its sums are fp32 in an order of their own"
    assert "in an order of their own" in why(FP32, scheme="none")
    unpromoted = Arithmetic.on("hopper.wgmma")
    assert why(unpromoted) == "it promotes every None, and its scales change every 128 of K"
    assert "promotes every 64" in why(Arithmetic.on("hopper.wgmma", promote_every=64))


def test_a_backend_is_never_convicted_for_what_no_steps_tell() -> None:
    """Weights in FP8 with activations in 16 bits, and groups of 128 without block scales: nothing says how."""
    for scheme in set(SCHEMES) - {*FP8, "none", "nvfp4"}:
        assert why(MMA, scheme=scheme) == f"no steps are known for the scheme {scheme}"
        assert why(Arithmetic(promote_every=128), scheme=scheme, exact_sums=True)
    for recipe in (Recipe(requantize=False), Recipe(quantize_input=False)):
        assert "inputs that are not quantised" in why(WGMMA, recipe=recipe)
    kept = Recipe(gemm1_output="float8")
    assert why(WGMMA, recipe=kept) == "no steps are known for a first GEMM's result that is kept in FP8"
    assert not why(WIDE, scheme="none", recipe=kept)
    # Exact over 128 of K only: neither the whole of K nor block scales without promotion.
    assert why(FP32, exact_sums=True)
    assert why(FP32, scheme="tensor_tok", exact_sums=True)


def test_a_unit_that_does_not_take_the_weights_is_a_reason_and_no_crash() -> None:
    assert why(WGMMA, scheme="none") == "its matrix unit hopper.wgmma does not take torch.bfloat16"
    assert why(WGMMA, fnuz=True) == "its matrix unit hopper.wgmma does not take torch.float8_e4m3fnuz"
    assert "does not take" in why(Arithmetic.on("cdna3.mfma", promote_every=128))


def test_the_schemes_are_those_that_the_kernels_have() -> None:
    from fp8moe.backends.triton_stages import FP8_SCHEMES
    from fp8moe.reference.replay import REPLAYED

    assert {*FP8_SCHEMES, UNQUANTISED} == REPLAYED
    assert {FusedMoEQuantConfig.from_keys(*scheme).weight_key for scheme in REPLAYED} == {w for w, _ in REPLAYED}


# -- its parts --


def every_kind_of_float32() -> Tensor:
    """All exponents, with mantissas at, just above and just below what ties in three bits; both signs."""
    exponents = torch.arange(256, dtype=torch.int64)[:, None] << 23
    tops = torch.arange(16, dtype=torch.int64)[:, None] << 19
    mantissas = (tops + torch.tensor([0, 1, -1, 1 << 18, (1 << 18) - 1])).reshape(-1) & 0x7FFFFF
    bits = (exponents + mantissas).reshape(-1)
    return torch.cat([bits, bits - (1 << 31)]).to(torch.int32).view(torch.float32)


@pytest.mark.parametrize("fmt", [E4M3FN, E4M3FNUZ], ids=["e4m3fn", "e4m3fnuz"])
def test_rounding_to_fp8(fmt: FloatFormat) -> None:
    values = every_kind_of_float32()
    assert int(values.isnan().sum()) > 100
    assert bool(values.isinf().any())
    assert bool((values == 0).any())
    expected = round_to(values.double(), fmt)
    got = rounded_to_fp8(values, fmt)
    assert got.dtype == torch.float32
    assert torch.equal(got.isnan(), values.isnan())
    assert torch.equal(got[~values.isnan()].double(), expected[~values.isnan()])


def test_the_order_of_k() -> None:
    assert k_order("natural", 40, torch.device("cpu")) is None
    order = k_order("fours_halved", 40, torch.device("cpu"))
    assert order is not None
    half = [base + k for base in range(0, 32, 4) for k in (0, 1)]
    first = [*half, *(k + 2 for k in half)]
    assert order.tolist() == [*first, *(k + 32 for k in first)]
