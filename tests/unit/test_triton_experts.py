"""TRITON and BATCHED_TRITON without running a kernel: what they refuse, what they declare, when triton loads."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from conformance.build import build, config_of, quant_of
from conformance.cases import Case
from fp8moe import PLATFORMS, FusedMoEActivationFormat, FusedMoEConfig, FusedMoEQuantConfig, MoEWeights, Platform
from fp8moe.backends import triton_stages
from fp8moe.backends.batched_triton import BatchedTritonExperts
from fp8moe.backends.triton_arithmetic import LARGE_TILE, SMALL_TILE, arithmetic_by_tile, tile_height
from fp8moe.backends.triton_experts import TritonExperts
from fp8moe.backends.triton_stages import FP8_SCHEMES, TritonStages, contract_on, triton_scheme
from fp8moe.config import GATED_ACTIVATIONS, NON_GATED_ACTIVATIONS
from fp8moe.recipe import FP32, Arithmetic, Contract, Recipe, Steps
from fp8moe.registry import BackendUnavailable, seed_backends
from fp8moe.schemes import SCHEMES, UNQUANTISED
from fp8moe.validation import InvalidMoEInput

BOTH = pytest.mark.parametrize("cls", [TritonExperts, BatchedTritonExperts])
WITH_KERNELS = ("block", "tensor_static", "tensor_dyn", "tensor_tok", "channel_tok", "none")
LAYER = Case(tokens=1, experts=2, top_k=1, hidden=128, inter=128)
NEEDS_TRITON = pytest.mark.skipif(sys.platform != "linux", reason="triton is a package for Linux")

Layer = tuple[FusedMoEConfig, FusedMoEQuantConfig, MoEWeights]


def layer(**changes: Any) -> Layer:
    tensors = build(replace(LAYER, **changes))
    return tensors.config, tensors.quant, tensors.weights


def contract(name: str, scheme: str = "block", *, batched: bool = False, experts: int = 8) -> Contract:
    case = replace(LAYER, scheme=scheme, experts=experts)
    return contract_on(PLATFORMS[name], False, config_of(case), quant_of(case), batched=batched)


# -- what is refused --


@BOTH
@pytest.mark.parametrize("scheme", sorted(set(SCHEMES) - {*WITH_KERNELS, "nvfp4"}))
def test_a_scheme_without_kernels_says_so(cls: type[TritonStages], scheme: str) -> None:
    with pytest.raises(BackendUnavailable, match=rf"{cls.__name__}: the scheme {scheme} has no kernel"):
        cls(*layer(scheme=scheme))


@BOTH
def test_other_dtypes_say_so(cls: type[TritonStages]) -> None:
    with pytest.raises(BackendUnavailable, match="float8_e4m3fnuz have no kernel yet"):
        cls(*layer(fnuz=True))
    config, quant, weights = layer()
    with pytest.raises(BackendUnavailable, match=r"hidden states of dtype torch\.float32"):
        cls(replace(config, in_dtype=torch.float32), quant, weights)


@BOTH
def test_an_activation_must_go_with_the_gate(cls: type[TritonStages]) -> None:
    config, quant, weights = layer()
    for activation in NON_GATED_ACTIVATIONS:
        with pytest.raises(BackendUnavailable, match=rf"{activation} does not go with a gate"):
            cls(replace(config, activation=activation), quant, weights)
    config, quant, weights = layer(activation="silu_no_mul")
    for activation in GATED_ACTIVATIONS:
        with pytest.raises(BackendUnavailable, match=rf"{activation} does not go without a gate"):
            cls(replace(config, activation=activation), quant, weights)


@BOTH
def test_wrong_weights_are_refused_first(cls: type[TritonStages]) -> None:
    config, quant, weights = layer(fnuz=True)
    with pytest.raises(InvalidMoEInput, match="w13_scale"):
        cls(config, quant, replace(weights, w13_scale=torch.ones(2, 1, 1)))


@pytest.mark.parametrize(
    ("name", "scheme", "words"),
    [
        ("a100", "block", r"FP8 is not supported on sm80; use a device of SM89 or newer, or of CDNA"),
        ("w7900", "tensor_tok", "FP8 is not supported on gfx1100"),
        ("a100", "none", ""),
        ("h100", "block", ""),
        ("mi300x", "none", ""),
    ],
)
def test_a_device_without_fp8(name: str, scheme: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_stages, "detected_platform", lambda: PLATFORMS[name])
    fp8 = scheme != "none"
    if not words:
        assert triton_stages._platform_of("T", torch.device("cuda"), False, fp8) is PLATFORMS[name]
        return
    with pytest.raises(BackendUnavailable, match=words):
        triton_stages._platform_of("T", torch.device("cuda"), False, fp8)


def test_a_device_where_triton_cannot_run() -> None:
    with pytest.raises(BackendUnavailable, match=r"on cpu, where Triton cannot run; set TRITON_INTERPRET=1 before"):
        triton_stages._platform_of("T", torch.device("cpu"), False, True)
    with pytest.raises(BackendUnavailable, match="on xpu:0, where Triton cannot run; put them on a device that is"):
        triton_stages._platform_of("T", torch.device("xpu", 0), False, True)
    assert triton_stages._platform_of("T", torch.device("cpu"), True, True) == Platform("cpu")


@NEEDS_TRITON
def test_an_interpreter_unlike_every_device_simulates_none(monkeypatch: pytest.MonkeyPatch) -> None:
    from fp8moe.kernels import interpreter

    told = "in the interpreter of triton 3.5.1 tl.fma rounds twice"
    monkeypatch.setattr(interpreter, "INTERPRETED", True)
    monkeypatch.setattr(interpreter, "unlike_a_device", lambda: told)
    with pytest.raises(BackendUnavailable, match=f"T: {told}"):
        triton_stages.interprets("T")


def test_by_rule_a_device_without_fp8_takes_16_bits() -> None:
    for scheme in SCHEMES.values():
        expected = scheme in FP8_SCHEMES or scheme == UNQUANTISED
        assert triton_scheme(PLATFORMS["h100"], *scheme) == expected
        assert triton_scheme(PLATFORMS["a100"], *scheme) == (scheme == UNQUANTISED)


# -- when triton is loaded --


def fresh_process(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    code = f"import sys; sys.path[:] = {[*sys.path, str(Path(__file__).parents[2])]!r}\n{code}"
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False, timeout=120
    )


def test_triton_is_not_loaded_before_it_is_needed() -> None:
    """Neither by the modules, nor by a question, nor by a configuration that is refused."""
    done = fresh_process(
        """
from fp8moe.backends.batched_triton import BatchedTritonExperts
from fp8moe.backends.triton_experts import TritonExperts
from fp8moe import PLATFORMS
from tests.unit.test_triton_experts import layer
for cls in (TritonExperts, BatchedTritonExperts):
    config, quant, weights = layer()
    keys = quant.weight_key, quant.activation_key
    print(cls.is_supported_config(cls, config, *keys, cls.activation_format(), PLATFORMS["h100"]))
    try:
        cls(*layer(fnuz=True))
    except Exception as error:
        print(type(error).__name__)
print("triton" in sys.modules)
"""
    )
    told = done.stdout.split("\n")
    assert told[-2] == "False", done.stdout + done.stderr
    assert told.count("LayerNotSupported") == 2, done.stdout


@NEEDS_TRITON
def test_on_the_cpu_the_remedy_is_the_interpreter() -> None:
    pytest.importorskip("triton")
    code = """
from tests.unit.test_triton_experts import WITH_KERNELS, BatchedTritonExperts, TritonExperts, layer
for cls in (TritonExperts, BatchedTritonExperts):
    for scheme in WITH_KERNELS:
        try:
            contract = cls(*layer(scheme=scheme)).contract
            print(contract.arithmetic_for(1).unit, contract.batch_invariant, contract.graph_capturable)
        except Exception as error:
            print(type(error).__name__, error)
"""
    off = fresh_process(code).stdout.splitlines()
    assert len(off) == 12
    assert all(line.startswith("BackendUnavailable") and "TRITON_INTERPRET=1" in line for line in off), off
    on = fresh_process(code, TRITON_INTERPRET="1")
    assert on.stdout.splitlines() == ["fp32 None False"] * 12, on.stdout + on.stderr


@BOTH
def test_without_triton_the_remedy_is_to_install_it(cls: type[TritonStages], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setitem(sys.modules, "triton.runtime", None)
    monkeypatch.delitem(sys.modules, "fp8moe.kernels.interpreter", raising=False)  # another test may have imported it
    with pytest.raises(BackendUnavailable, match=f"{cls.__name__}: .*triton.*; install triton"):
        cls(*layer())


# -- what they declare --


@pytest.mark.parametrize(
    ("pairs", "experts", "height"),
    [(0, 1, SMALL_TILE), (16, 1, SMALL_TILE), (17, 1, LARGE_TILE), (512, 32, SMALL_TILE), (513, 32, LARGE_TILE)],
)
def test_tile_height(pairs: int, experts: int, height: int) -> None:
    assert tile_height(pairs, experts) == height


def test_the_height_of_a_rank_follows_from_the_experts_of_all() -> None:
    """Every rank sees the ids of all tokens, few of which are its own."""
    case = replace(LAYER, experts=8, ep="4:1")
    config = config_of(case)
    assert (config.num_experts, config.num_local_experts) == (8, 2)
    declared = contract_on(PLATFORMS["h100"], False, config, quant_of(case), batched=False)
    assert declared.arithmetic_for(8 * 16) != declared.arithmetic_for(8 * 16 + 1)


ORDERED = "fours_halved"
FP8_BY_TILE = {
    "h100": (("hopper.mma_f16", ORDERED), ("hopper.wgmma", "natural")),
    "l40s": (("ada.mma", "natural"), ("ada.mma", "natural")),
    "b200": (("blackwell.mma_f16", ORDERED), ("blackwell.tcgen05", "natural")),
    "b300": (("blackwell.mma_f16", ORDERED), ("blackwell.tcgen05", "natural")),
    "rtx_pro_6000": (("rtx_blackwell.mma", "natural"), ("rtx_blackwell.mma", "natural")),
}


@pytest.mark.parametrize("name", FP8_BY_TILE)
def test_arithmetic_of_fp8(name: str) -> None:
    """A chain over each 128 of K; where FP8 is widened to fp16 first, in the order in which Triton feeds it."""
    small, large = (Arithmetic.on(unit, promote_every=128, k_order=order) for unit, order in FP8_BY_TILE[name])
    assert arithmetic_by_tile(PLATFORMS[name], interpreted=False) == {SMALL_TILE: small, LARGE_TILE: large}


@pytest.mark.parametrize(
    ("name", "small", "large"),
    [
        ("a100", "ampere.mma_f16", "ampere.mma_f16"),
        ("a10", "ampere.mma_f16", "ampere.mma_f16"),
        ("l40s", "ada.mma_f16", "ada.mma_f16"),
        ("h100", "hopper.mma_f16", "hopper.wgmma_f16"),
        ("b200", "blackwell.mma_f16", "blackwell.tcgen05_f16"),
        ("b300", "blackwell.mma_f16", "blackwell.tcgen05_f16"),
        ("rtx5090", "rtx_blackwell.mma_f16", "rtx_blackwell.mma_f16"),
    ],
)
def test_arithmetic_of_16_bits(name: str, small: str, large: str) -> None:
    """One chain over all of K, never promoted."""
    by_tile = arithmetic_by_tile(PLATFORMS[name], interpreted=False, fp8=False)
    assert by_tile == {SMALL_TILE: Arithmetic.on(small), LARGE_TILE: Arithmetic.on(large)}


@pytest.mark.parametrize("fp8", [True, False])
@pytest.mark.parametrize(
    "platform", [PLATFORMS["mi300x"], PLATFORMS["mi355x"], PLATFORMS["thor"], Platform("cuda", (13, 0))]
)
def test_an_unknown_device_declares_nothing(platform: Platform, fp8: bool) -> None:
    assert arithmetic_by_tile(platform, interpreted=False, fp8=fp8) is None


def test_the_interpreter_adds_in_fp32() -> None:
    """FP8 over each 128 of K, as the kernel's loop does; the order within is the interpreter's own."""
    here = Platform("cpu")
    promoted = Arithmetic(promote_every=128)
    assert arithmetic_by_tile(here, interpreted=True) == {SMALL_TILE: promoted, LARGE_TILE: promoted}
    assert arithmetic_by_tile(here, interpreted=True, fp8=False) == {SMALL_TILE: FP32, LARGE_TILE: FP32}


@pytest.mark.parametrize("scheme", WITH_KERNELS)
@pytest.mark.parametrize("name", ["h100", "mi300x"])
def test_recipe_and_steps(name: str, scheme: str) -> None:
    """Batches have no other tokens, so that a dynamic scale per tensor is one expert's; torch adds their slots."""
    recipe = Recipe(activation_output="input" if scheme == "none" else "float32")
    standard, batched = contract(name, scheme), contract(name, scheme, batched=True)
    assert (standard.recipe, standard.steps) == (recipe, Steps(combine="slot_fma"))
    assert batched.recipe == replace(recipe, dynamic_tensor_scope="expert")
    assert batched.steps == Steps(combine="slot_sum")
    assert standard.deterministic
    assert batched.deterministic
    assert standard.graph_capturable
    assert batched.graph_capturable


INVARIANT = {  # TRITON, then BATCHED_TRITON
    "h100": (False, True),
    "b200": (False, True),
    "l40s": (True, True),
    "rtx5090": (True, True),
    "mi300x": (None, None),
}


@pytest.mark.parametrize("scheme", WITH_KERNELS)
@pytest.mark.parametrize("name", INVARIANT)
def test_a_batch_decides_the_bits_where_the_tiles_differ(name: str, scheme: str) -> None:
    """And where a dynamic scale is shared; the tiles of batches have one height."""
    standard, batched = INVARIANT[name]
    if scheme == "tensor_dyn" and standard is not None:
        standard = batched = False
    assert contract(name, scheme).batch_invariant is standard
    assert contract(name, scheme, batched=True).batch_invariant is batched


@pytest.mark.parametrize("scheme", WITH_KERNELS)
def test_arithmetic_by_the_size_of_a_call(scheme: str) -> None:
    by_tile = arithmetic_by_tile(PLATFORMS["h100"], interpreted=False, fp8=scheme != "none")
    assert by_tile is not None
    standard, batched = contract("h100", scheme), contract("h100", scheme, batched=True)
    assert standard.arithmetic_for(8 * 16) == by_tile[SMALL_TILE]
    assert standard.arithmetic_for(8 * 16 + 1) == by_tile[LARGE_TILE]
    assert batched.arithmetic_for(1) == batched.arithmetic_for(10000) == by_tile[LARGE_TILE]


def test_names_and_formats() -> None:
    by_name = {spec.name: spec.experts_cls for spec in seed_backends()}
    assert by_name["TRITON"] is TritonExperts
    assert by_name["BATCHED_TRITON"] is BatchedTritonExperts
    assert TritonExperts.activation_format() is FusedMoEActivationFormat.Standard
    assert BatchedTritonExperts.activation_format() is FusedMoEActivationFormat.BatchedExperts
