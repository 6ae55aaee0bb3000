"""Kernel layouts read back by their definitions: halves, DeepGEMM's scales, FlashInfer's rows, AITER's tiles, fnuz."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fp8moe.experts import MoEWeights
from fp8moe.keys import GroupShape
from fp8moe.layouts import deepgemm, flashinfer, rocm, xpu
from fp8moe.layouts.halves import interleaved_halves, multiple_of, padded_rows, swapped_halves
from fp8moe.scaling import dequantize


def numbered(*shape: int) -> Tensor:
    return torch.arange(torch.Size(shape).numel(), dtype=torch.int32).reshape(shape)


def drawn(*shape: int) -> Tensor:
    """Every code but NaN."""
    some = torch.randint(0, 254, shape, generator=torch.Generator().manual_seed(1))
    return torch.where(some < 127, some, some + 1).to(torch.uint8).view(torch.float8_e4m3fn)


def bits(values: Tensor) -> Tensor:
    return values.contiguous().view(torch.uint8)


# -- halves --


def test_halves_change_places_and_back() -> None:
    given = numbered(2, 6, 3)
    found = swapped_halves(given)
    assert torch.equal(found[:, :3], given[:, 3:])
    assert torch.equal(swapped_halves(found), given)


def test_halves_take_turns() -> None:
    given = numbered(2, 6, 3)
    found = interleaved_halves(given)
    assert torch.equal(found[:, 0::2], given[:, :3])
    assert torch.equal(found[:, 1::2], given[:, 3:])


def test_each_half_has_its_own_padding() -> None:
    """With I = 20 and 32 in all, one run of 2I rows would put 12 rows of up into the padding of gate (quirk Q27)."""
    given = numbered(2, 40, 3) + 1
    found = padded_rows(given, 32, 2)
    assert found.shape == (2, 64, 3)
    assert torch.equal(found[:, :20], given[:, :20])
    assert torch.equal(found[:, 32:52], given[:, 20:])
    assert not found[:, 20:32].any()
    assert not found[:, 52:].any()


def test_an_odd_number_of_rows_has_no_halves() -> None:
    with pytest.raises(ValueError, match="7 rows; expected an even number"):
        swapped_halves(numbered(1, 7, 2))


# -- DeepGEMM --


def test_scales_become_powers_of_two_and_values_stay_near() -> None:
    codes, scale = drawn(2, 384, 256), torch.rand(2, 4, 2) + 0.01  # halves of 192 rows: a whole block and half a one
    found, scales = deepgemm.power_of_two_scales(codes, scale, parts=2)
    assert scales.shape == scale.shape
    mantissa, _ = torch.frexp(scales)
    assert (mantissa == 0.5).all()
    for part in range(2):
        rows = slice(192 * part, 192 * (part + 1))
        before = dequantize(codes[:, rows], scale[:, 2 * part : 2 * part + 2], GroupShape(128, 128))
        after = dequantize(found[:, rows], scales[:, 2 * part : 2 * part + 2], GroupShape(128, 128))
        assert after.abs().amax() <= before.abs().amax() * (1 + 2**-4)
        step = torch.maximum(before.abs() * 2**-4, scales.amax() * 2**-10)  # half a unit of three bits of mantissa
        assert ((after - before).abs() <= step).all()


def test_what_has_such_scales_already_keeps_its_values() -> None:
    codes = torch.where(drawn(1, 128, 128).float().abs() < 1, 0.0, drawn(1, 128, 128).float()).to(torch.float8_e4m3fn)
    codes[0, 0, 0] = 448.0
    found, scales = deepgemm.power_of_two_scales(codes, torch.full((1, 1, 1), 0.25))
    assert scales.item() == 0.25
    assert torch.equal(found.float(), codes.float())


def test_rows_lie_next_to_each_other_at_aligned_places() -> None:
    given = torch.rand(2, 5, 3)
    found = deepgemm.rows_fastest(given)
    assert torch.equal(found, given)
    assert found.stride() == (24, 1, 8)
    assert deepgemm.rows_fastest(torch.rand(8, 2)).stride() == (1, 8)


def test_exponents_are_packed_four_to_a_word() -> None:
    exponent = torch.randint(-100, 100, (6, 7), generator=torch.Generator().manual_seed(2))
    found = deepgemm.packed_exponents(2.0 ** exponent.float())
    assert (found.shape, found.dtype, found.stride()) == ((6, 2), torch.int32, (1, 8))
    for row in range(6):
        for group in range(7):
            word = int(found[row, group // 4]) & 0xFFFFFFFF
            assert (word >> 8 * (group % 4)) & 0xFF == int(exponent[row, group]) + 127
    assert int(found[0, 1]) >> 24 == 0


@pytest.mark.parametrize("scale", [3.0, -2.0, 0.0, float("inf")])
def test_what_is_no_power_of_two_has_no_exponent_for_a_value(scale: float) -> None:
    with pytest.raises(ValueError, match="expected powers of two"):
        deepgemm.packed_exponents(torch.tensor([[1.0, scale]]))


@pytest.mark.parametrize(("counts", "rows"), [([1, 1, 1], 384), ([128, 0, 129], 384), ([0, 0, 0], 0)])
def test_the_contiguous_layout_has_room_for_any_counts(counts: list[int], rows: int) -> None:
    assert sum(multiple_of(count, 128) for count in counts) == rows
    assert deepgemm.contiguous_rows(sum(counts), len(counts)) >= rows


# -- FlashInfer --


@pytest.mark.parametrize(("tile", "width"), [(64, 2), (128, 4)])
def test_rows_of_a_run_are_dealt_out(tile: int, width: int) -> None:
    given = drawn(2, 96, 8)
    found = flashinfer.shuffled_rows(given, tile)
    run = 8 * width
    for row in range(96):
        start, within = row // run * run, row % run
        place = start + within // width + 8 * (within % width)
        assert torch.equal(bits(found[:, place]), bits(given[:, row]))
    with pytest.raises(ValueError, match=f"multiple of {run} rows"):
        flashinfer.shuffled_rows(drawn(1, 8, 8), tile)


def test_blocks_of_k_come_first() -> None:
    given = drawn(2, 3, 256)
    found = flashinfer.blocks_of_k(given)
    assert found.shape == (2, 2, 3, 128)
    assert found.is_contiguous()
    for block in range(2):
        assert torch.equal(bits(found[:, block]), bits(given[..., 128 * block : 128 * (block + 1)]))
    with pytest.raises(ValueError, match="multiple of 128 columns"):
        flashinfer.blocks_of_k(drawn(1, 3, 100))


def layer(inter: int, hidden: int, block: bool) -> MoEWeights:
    one = (torch.rand(2, 2 * -(-inter // 128), -(-hidden // 128)), torch.rand(2, -(-hidden // 128), -(-inter // 128)))
    scales = one if block else (torch.rand(2) + 0.1, torch.rand(2) + 0.1)
    static = (None, None) if block else (torch.tensor(0.5), torch.tensor(0.25))
    bias = torch.randn(2, 2 * inter)
    return MoEWeights(drawn(2, 2 * inter, hidden), drawn(2, hidden, inter), *scales, bias, None, *static)


def test_cutlass_takes_up_before_gate_and_all_that_belongs_to_them() -> None:
    given = layer(256, 128, block=True)
    assert given.w13_scale is not None
    given.w13_scale[0, 0, 0] = 0.0
    found = flashinfer.cutlass_weights(given, gated=True, block=True)
    assert found.w13_scale is not None
    assert found.w13_bias is not None
    assert given.w13_bias is not None
    assert torch.equal(bits(found.w13[:, :256]), bits(given.w13[:, 256:]))
    assert torch.equal(found.w13_scale[:, :2], given.w13_scale[:, 2:])
    assert torch.equal(found.w13_bias[:, :256], given.w13_bias[:, 256:])
    assert found.w13_scale[0, 2, 0] == torch.tensor(1e-10)
    assert torch.equal(bits(found.w2), bits(given.w2))


def test_cutlass_per_tensor_is_filled_up_before_halves_change_places() -> None:
    given = layer(20, 32, block=False)
    found = flashinfer.cutlass_weights(given, gated=True, block=False)
    assert (found.w13.shape, found.w2.shape) == ((2, 64, 32), (2, 32, 32))
    assert torch.equal(bits(found.w13[:, :20]), bits(given.w13[:, 20:]))
    assert torch.equal(bits(found.w13[:, 32:52]), bits(given.w13[:, :20]))
    assert not bits(found.w13[:, 20:32]).any()
    assert not bits(found.w2[..., 20:]).any()
    assert found.w13_scale is given.w13_scale


def test_an_mlp_without_a_gate_is_only_filled_up() -> None:
    given = MoEWeights(drawn(2, 100, 32), drawn(2, 32, 100), torch.ones(2), torch.ones(2))
    found = flashinfer.cutlass_weights(given, gated=False, block=False)
    assert found.w13.shape == (2, 128, 32)
    assert torch.equal(bits(found.w13[:, :100]), bits(given.w13))


@pytest.mark.parametrize("block", [False, True])
def test_trtllm_reads_back(block: bool) -> None:
    given = layer(128, 256, block)
    found = flashinfer.trtllm_weights(given, gated=True, block=block)
    w13, width = found.w13, 2 if block else 4
    if block:
        assert (found.w13.shape, found.w2.shape) == ((2, 2, 256, 128), (2, 1, 256, 128))
        w13 = w13.transpose(1, 2).reshape(2, 256, 256)
    for row in range(256):
        up = row < 128
        place = row if block else 2 * (row % 128) + (0 if up else 1)  # [up; gate], or in turn
        within, start = place % (8 * width), place // (8 * width) * 8 * width
        want = given.w13[:, row + 128 if up else row - 128]
        assert torch.equal(bits(w13[:, start + within // width + 8 * (within % width)]), bits(want))


def test_output_scales_undo_what_codes_are_over() -> None:
    given = layer(128, 128, block=False)
    scales = flashinfer.output_scales(given, gated=True)
    assert given.w13_scale is not None
    assert given.w2_scale is not None
    assert torch.equal(scales.gate, given.w13_scale * 0.5)
    assert torch.equal(scales.first, given.w13_scale * 0.5 / 0.25)
    assert torch.equal(scales.second, given.w2_scale * 0.25)
    assert torch.equal(flashinfer.output_scales(given, gated=False).first, torch.full((2,), 4.0))
    with pytest.raises(ValueError, match=r"a13_scale, a2_scale: FLASHINFER_TRTLLM needs"):
        flashinfer.output_scales(layer(128, 128, block=True), gated=True)


# -- AMD and Intel --


def test_a_tile_lies_in_one_piece_part_by_part() -> None:
    given = drawn(2, 48, 96)
    found = bits(rocm.shuffled(given)).flatten()
    for expert, row, column in ((0, 0, 0), (1, 47, 95), (0, 17, 40), (1, 5, 31), (0, 32, 64)):
        tile = (expert * 3 + row // 16) * 3 + column // 32
        place = tile * 512 + (column % 32 // 16) * 256 + (row % 16) * 16 + column % 16
        assert found[place] == bits(given)[expert, row, column]
    assert torch.equal(found.sort().values, bits(given).flatten().sort().values)


@pytest.mark.parametrize("shape", [(1, 8, 32), (1, 16, 16)])
def test_weights_that_fit_no_tile_of_aiter_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="a multiple of 16 rows and 32 columns"):
        rocm.shuffled(drawn(*shape))


def test_fnuz_codes_with_double_scales_are_the_same_numbers() -> None:
    every = torch.tensor([code for code in range(256) if code & 0x7F != 0x7F], dtype=torch.uint8)
    given = every.view(torch.float8_e4m3fn)
    codes, scale = rocm.as_fnuz(given, torch.tensor([3.0]))
    assert codes.dtype == torch.float8_e4m3fnuz
    assert torch.equal(codes.float() * scale, given.float() * 3.0)
    assert bits(codes)[every == 0x80].item() == 0
    with pytest.raises(ValueError, match="weights with NaN"):
        rocm.as_fnuz(torch.tensor([0x7F], dtype=torch.uint8).view(torch.float8_e4m3fn), scale)
    with pytest.raises(ValueError, match=r"expected torch.float8_e4m3fn"):
        rocm.as_fnuz(codes, scale)


def test_a_layer_in_fnuz_has_double_activation_scales_too() -> None:
    given = layer(128, 128, block=False)
    found = rocm.layer_as_fnuz(given)
    assert (found.a13_scale, found.a2_scale) == (torch.tensor(1.0), torch.tensor(0.5))
    assert given.w13_scale is not None
    assert found.w13_scale is not None
    values = [one.w13.float() * one.w13_scale[:, None, None] for one in (found, given) if one.w13_scale is not None]
    assert torch.equal(*values)


def test_xpu_is_transposed_with_its_block_scales() -> None:
    given = layer(256, 128, block=True)
    found = xpu.transposed(given)
    assert (found.w13.shape, found.w2.shape) == ((2, 128, 512), (2, 256, 128))
    assert found.w13.is_contiguous()
    assert torch.equal(bits(found.w13.transpose(1, 2)), bits(given.w13))
    assert found.w13_scale is not None
    assert given.w13_scale is not None
    assert torch.equal(found.w13_scale.transpose(1, 2), given.w13_scale)
    assert xpu.transposed(layer(128, 128, block=False)).w13_scale is not None


def test_xpu_in_turn() -> None:
    given = layer(256, 128, block=False)
    given = replace(given, w13_bias=torch.randn(2, 512))
    found = xpu.in_turn(given)
    for name in ("w13", "w13_bias"):
        turns, whole = getattr(found, name), getattr(given, name)
        assert torch.equal(torch.cat([turns[:, ::2], turns[:, 1::2]], 1).float(), whole.float())
    assert found.w2 is given.w2
    with pytest.raises(ValueError, match="w13_scale of shape"):
        xpu.in_turn(layer(256, 128, block=True))
