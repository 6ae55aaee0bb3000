"""TritonExperts without running a kernel: what it refuses and how, what it declares, and that it loads triton late."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch

from fp8moe import (
    PLATFORMS,
    FusedMoEConfig,
    FusedMoEParallelConfig,
    FusedMoEQuantConfig,
    MoEWeights,
    Platform,
    RoutingMethodType,
)
from fp8moe.backends.triton_arithmetic import LARGE_TILE, SMALL_TILE, arithmetic_by_tile, tile_height
from fp8moe.backends.triton_experts import TritonExperts, contract_on
from fp8moe.quant import (
    kFp8Dynamic128Sym,
    kFp8DynamicTokenSym,
    kFp8Static128BlockSym,
    kFp8StaticChannelSym,
)
from fp8moe.recipe import FP32, Arithmetic
from fp8moe.registry import BackendUnavailable
from fp8moe.validation import InvalidMoEInput

E4M3 = torch.float8_e4m3fn
BLOCK = FusedMoEQuantConfig.from_keys(kFp8Static128BlockSym, kFp8Dynamic128Sym)

BLOCK_NONE = FusedMoEQuantConfig.from_keys(kFp8Static128BlockSym, None)
CHANNEL_TOKEN = FusedMoEQuantConfig.from_keys(kFp8StaticChannelSym, kFp8DynamicTokenSym)


def config(**changes: Any) -> FusedMoEConfig:
    layer = FusedMoEConfig(
        num_experts=2,
        experts_per_token=1,
        hidden_dim=128,
        intermediate_size_per_partition=128,
        num_local_experts=2,
        activation="silu",
        device="cpu",
        routing_method=RoutingMethodType.Default,
        moe_parallel_config=FusedMoEParallelConfig.make_no_parallel(),
        in_dtype=torch.bfloat16,
    )
    return replace(layer, **changes)


def weights(dtype: torch.dtype = E4M3, gated: bool = True, channel: bool = False) -> MoEWeights:
    rows = 256 if gated else 128
    w13, w2 = torch.zeros(2, rows, 128).to(dtype), torch.zeros(2, 128, 128).to(dtype)
    if channel:
        return MoEWeights(w13, w2, torch.ones(2, rows, 1), torch.ones(2, 128, 1))
    return MoEWeights(w13, w2, torch.ones(2, rows // 128, 1), torch.ones(2, 1, 1))


@pytest.mark.parametrize(
    ("changes", "quant", "given", "words"),
    [
        (
            {},
            FusedMoEQuantConfig.from_keys(kFp8StaticChannelSym, kFp8DynamicTokenSym),
            weights(channel=True),
            "channel_tok",
        ),
        ({}, FusedMoEQuantConfig.from_keys(kFp8Static128BlockSym, None), weights(), "block_none"),
        ({}, BLOCK, weights(torch.float8_e4m3fnuz), "e4m3fnuz"),
        ({"is_act_and_mul": False}, BLOCK, weights(gated=False), "gate"),
        ({"activation": "gelu"}, BLOCK, weights(), "gelu"),
        ({"in_dtype": torch.float32}, BLOCK, weights(), "float32"),
    ],
)
def test_what_is_not_written_says_so(
    changes: dict[str, Any], quant: FusedMoEQuantConfig, given: MoEWeights, words: str
) -> None:
    with pytest.raises(BackendUnavailable, match=words):
        TritonExperts(config(**changes), quant, given)


def test_wrong_weights_are_refused_first() -> None:
    with pytest.raises(InvalidMoEInput, match="w13_scale"):
        TritonExperts(config(activation="gelu"), BLOCK, replace(weights(), w13_scale=torch.ones(2, 1, 1)))


def fresh_process(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False, timeout=120
    )


def test_importing_the_backend_does_not_import_triton() -> None:
    code = (
        f"import sys; sys.path[:] = {sys.path!r}; import fp8moe.backends.triton_experts; print('triton' in sys.modules)"
    )
    done = fresh_process(code)
    assert done.stdout.strip() == "False", done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="triton is a package for Linux")
def test_on_the_cpu_the_remedy_is_the_interpreter() -> None:
    pytest.importorskip("triton")
    code = f"""
import sys
sys.path[:] = {[*sys.path, __file__.rsplit("/", 1)[0]]!r}
from test_triton_experts import BLOCK, TritonExperts, config, weights
try:
    print(TritonExperts(config(), BLOCK, weights()).contract.arithmetic_for(1))
except Exception as error:
    print(type(error).__name__, error)
"""
    off = fresh_process(code)
    assert off.stdout.startswith("BackendUnavailable"), off.stderr
    assert "TRITON_INTERPRET=1" in off.stdout
    on = fresh_process(code, TRITON_INTERPRET="1")
    assert "unit='fp32'" in on.stdout, on.stderr


@pytest.mark.parametrize(
    ("pairs", "experts", "height"),
    [(0, 1, SMALL_TILE), (16, 1, SMALL_TILE), (17, 1, LARGE_TILE), (512, 32, SMALL_TILE), (513, 32, LARGE_TILE)],
)
def test_tile_height(pairs: int, experts: int, height: int) -> None:
    assert tile_height(pairs, experts) == height


WGMMA = Arithmetic("hopper.wgmma", 13, 32, 128)


@pytest.mark.parametrize(
    ("name", "small", "large"),
    [
        ("h100", ("hopper.mma_f16", 25, 16), ("hopper.wgmma", 13, 32)),
        ("l40s", ("ada.mma", 13, 16), ("ada.mma", 13, 16)),
        ("b200", ("blackwell.mma_f16", 25, 16), ("blackwell.tcgen05", 25, 32)),
        ("b300", ("blackwell.mma_f16", 25, 16), ("blackwell.tcgen05", 25, 32)),
        ("rtx_pro_6000", ("rtx_blackwell.mma", 25, 32), ("rtx_blackwell.mma", 25, 32)),
    ],
)
def test_arithmetic_of_the_devices_we_know(name: str, small: tuple[str, int, int], large: tuple[str, int, int]) -> None:
    by_tile = arithmetic_by_tile(PLATFORMS[name], interpreted=False)
    assert by_tile == {SMALL_TILE: Arithmetic(*small, 128), LARGE_TILE: Arithmetic(*large, 128)}


@pytest.mark.parametrize(
    "platform", [PLATFORMS["mi300x"], PLATFORMS["mi355x"], PLATFORMS["thor"], Platform("cuda", (13, 0))]
)
def test_an_unknown_device_declares_nothing(platform: Platform) -> None:
    assert arithmetic_by_tile(platform, interpreted=False) is None


def test_the_interpreter_adds_in_fp32() -> None:
    assert arithmetic_by_tile(Platform("cpu"), interpreted=True) == {SMALL_TILE: FP32, LARGE_TILE: FP32}


@pytest.mark.parametrize(("name", "invariant"), [("h100", False), ("l40s", True), ("b200", False), ("mi300x", None)])
def test_a_batch_decides_the_bits_where_the_tiles_differ(name: str, invariant: bool | None) -> None:
    contract = contract_on(PLATFORMS[name], interpreted=False, experts=8)
    assert contract.batch_invariant is invariant
    assert contract.deterministic
    if name == "h100":
        assert contract.arithmetic_for(8 * 16 + 1) == WGMMA
        assert contract.arithmetic_for(8 * 16) != WGMMA
