"""Cell ids of the selection grid: a grammar that round-trips, and what a cell stands for."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conformance.selection.__main__ import main
from conformance.selection.axes import AXES, AXIS
from conformance.selection.cells import Cell
from conformance.selection.grid import GRID, MAIN, Product
from conformance.selection.model import expect, expect_call

GOLDEN = {
    "sel1:": {},
    "sel1:device=sm100,scheme=nvfp4": {"device": "sm100", "scheme": "nvfp4"},
    "sel1:parallel=dp2-ep-pplx,lora=yes,VLLM_USE_DEEP_GEMM=1.0": {
        "parallel": "dp2-ep-pplx",
        "lora": "yes",
        "VLLM_USE_DEEP_GEMM": "1.0",
    },
    "sel1:device=gfx942,libraries=aiter+vllm,activation=gelu,gating=non-gated,routing=TopK,logits=unset-fp32": {
        "device": "gfx942",
        "libraries": "aiter+vllm",
        "activation": "gelu",
        "gating": "non-gated",
        "routing": "TopK",
        "logits": "unset-fp32",
    },
    "sel1:allow_vllm_cutlass=yes,VLLM_USE_FLASHINFER_MOE_FP8=1,VLLM_FLASHINFER_MOE_BACKEND=masked_gemm": {
        "allow_vllm_cutlass": "yes",
        "VLLM_USE_FLASHINFER_MOE_FP8": "1",
        "VLLM_FLASHINFER_MOE_BACKEND": "masked_gemm",
    },
    "sel1:VLLM_TEST_FORCE_FP8_MARLIN=1,VLLM_ROCM_USE_AITER=0,VLLM_ROCM_USE_AITER_MOE=1,unread=e8m0-off": {
        "VLLM_TEST_FORCE_FP8_MARLIN": "1",
        "VLLM_ROCM_USE_AITER": "0",
        "VLLM_ROCM_USE_AITER_MOE": "1",
        "unread": "e8m0-off",
    },
}


@pytest.mark.parametrize("text", GOLDEN)
def test_golden_ids(text: str) -> None:
    assert str(Cell.of(**GOLDEN[text])) == text
    assert Cell.parse(text) == Cell.of(**GOLDEN[text])


@given(st.tuples(*[st.integers(0, len(axis) - 1) for axis in AXES]))
def test_ids_round_trip(indices: tuple[int, ...]) -> None:
    cell = Cell(indices)
    assert Cell.parse(str(cell)) == cell


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "starts with"),
        ("sel2:", "starts with"),
        ("sel1:sm90", "axis=value"),
        ("sel1:device=sm90,device=sm100", "once"),
        ("sel1:arch=sm90", "no axis 'arch'"),
        ("sel1:device=sm91", "no value 'sm91'"),
    ],
)
def test_a_text_that_is_no_id_says_what_is_expected(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Cell.parse(text)


def test_names_hold_no_separator() -> None:
    assert not [name for axis in AXES for name in (axis.name, *axis.names) if set(name) & set(",=: '")]


def test_arguments_are_what_the_id_says() -> None:
    config, weight_key, activation_key, allow, platform, env = Cell.parse(
        "sel1:device=gfx942,libraries=aiter,scheme=none_128,activation=relu,lora=yes,VLLM_ROCM_USE_AITER=1"
    ).arguments
    assert (config.activation, config.is_lora_enabled, weight_key, allow) == ("relu", True, None, False)
    assert activation_key is not None
    assert (platform.kind, platform.gcn_arch, platform.libraries) == ("rocm", "gfx942", {"aiter"})
    assert env == {"VLLM_ROCM_USE_AITER": "1"}


@pytest.mark.parametrize("product", MAIN, ids=lambda product: product.name)
def test_a_products_columns_facts_and_cells_are_the_same(product: Product) -> None:
    numbers = np.linspace(0, product.size - 1, 25).astype(np.int64)
    whole = expect(product.facts_at(numbers)).outcome
    for number, outcome, (platform, keys, config, allow, env) in zip(
        numbers.tolist(), whole.tolist(), product.columns(numbers), strict=True
    ):
        arguments = product.cell(number).arguments
        assert arguments == (config, *keys, allow, platform, env)
        assert int(expect_call(*arguments).outcome) == outcome


def test_a_product_of_an_unknown_axis_is_refused() -> None:
    with pytest.raises(ValueError, match="no axes"):
        Product.over("wrong", arch="*")
    assert set(AXIS) == {axis.name for axis in AXES}
    assert len({product.name for product in GRID}) == len(GRID)


def test_the_command_shows_a_cell(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sel1:device=sm100"]) == 0
    assert "FLASHINFER_TRTLLM" in capsys.readouterr().out
    assert main(["sel1:device=sm100", "--without", "FLASHINFER_TRTLLM"]) == 0
    assert "R8 DEEPGEMM" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["sel1:device=sm91"])
    assert "no value 'sm91'" in capsys.readouterr().err
