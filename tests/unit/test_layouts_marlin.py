"""MARLIN's layout, read back by what the tensor core's fragments are and by what the kernel does to a code."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fp8moe.experts import MoEWeights
from fp8moe.layouts import marlin


def codes(*shape: int, seed: int = 0) -> Tensor:
    """Every code but NaN."""
    drawn = torch.randint(0, 254, shape, generator=torch.Generator().manual_seed(seed))
    return torch.where(drawn < 127, drawn, drawn + 1).to(torch.uint8).view(torch.float8_e4m3fn)


def read(packed: Tensor, n: int, k: int) -> Tensor:
    """(n, k): lane by lane, as a warp loads it. In each 16 x 64 tile a lane has eight words, each of eight columns; its
    column is lane // 4, and its rows are those of fragment B of m16n8k16, of which the conversion to 16 bits takes
    the first and third byte of a word as one pair and the second and fourth as the other."""
    words = packed.view(torch.uint8).reshape(k // 16, n // 64, 32, 8, 4)
    found = torch.zeros(n, k, dtype=torch.uint8)
    for lane in range(32):
        for tile in range(8):
            for pair, bytes_ in enumerate(((0, 2), (1, 3))):
                for of_pair, byte in enumerate(bytes_):
                    row, column = 8 * pair + 2 * (lane % 4) + of_pair, 8 * tile + lane // 4
                    values = words[:, :, lane, tile, byte]
                    found.view(n // 64, 64, k // 16, 16)[:, column, :, row] = values.T
    return found


@pytest.mark.parametrize(("n", "k"), [(64, 16), (128, 48), (192, 128)])
def test_weights_read_back_as_fragments(n: int, k: int) -> None:
    given = codes(3, n, k)
    packed = marlin.weights(given)
    assert (packed.shape, packed.dtype) == ((3, k // 16, 4 * n), torch.int32)
    for expert in range(3):
        assert torch.equal(read(packed[expert], n, k), given[expert].view(torch.uint8))


@pytest.mark.parametrize(("n", "k"), [(63, 16), (64, 8)])
def test_weights_that_fit_no_tile_are_refused(n: int, k: int) -> None:
    with pytest.raises(ValueError, match=f"3, {n}, {k}.*n a multiple of 64, k of 16"):
        marlin.weights(codes(3, n, k))


def unpermuted(scale: Tensor, grouped: bool) -> Tensor:
    """Where each column's scale lies: eight columns 8 apart for a lane's group of four, where codes are scaled before
    the product; else the columns of four accumulator fragments, two next to each other in each."""
    found = torch.empty_like(scale)
    run = 64 if grouped else 32
    for place in range(run):
        column = place // 8 + 8 * (place % 8) if grouped else 2 * (place // 8) + 8 * (place % 8 // 2) + place % 2
        found[..., column::run] = scale[..., place::run]
    return found


@pytest.mark.parametrize(("dtype", "exponent"), [(torch.float16, 8), (torch.bfloat16, 120)])
@pytest.mark.parametrize("group", [-1, 128])
def test_scales_read_back(dtype: torch.dtype, exponent: int, group: int) -> None:
    rows, columns = 2 * 192, 256
    if group < 0:
        given = torch.rand(3, rows, 1) + 1e-2
        want = given.transpose(1, 2)
    else:
        given = torch.rand(3, 2 * 2, 2) + 1e-2  # each half has a block of 128 rows and one of 64
        half = [given[:, 2 * part : 2 * part + 2].repeat_interleave(128, 1)[:, :192] for part in (0, 1)]
        want = torch.cat(half, dim=1).transpose(1, 2)
    found = marlin.scales(given, rows, columns, group, dtype, parts=2)
    back = unpermuted(found, grouped=group > 0) * 2.0**-exponent
    assert torch.equal(back, want.to(dtype))


def test_one_scale_a_tensor_is_every_columns() -> None:
    found = marlin.scales(torch.tensor([0.5, 0.25]), 64, 128, -1, torch.float16)
    assert found.shape == (2, 1, 64)
    assert torch.equal(found[:, 0], torch.tensor([[128.0], [64.0]]).expand(2, 64).half())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_exponent_that_a_conversion_leaves_out_is_in_the_scale(dtype: torch.dtype) -> None:
    """The kernel moves a code's bits into the wider format: sign to sign, the rest below the exponent's top."""
    given = codes(1, 64, 16).flatten()
    bits = given.view(torch.uint8).to(torch.int32)
    mantissa = {torch.float16: 10, torch.bfloat16: 7}[dtype]
    moved = ((bits & 0x80) << 8) | ((bits & 0x7F) << (mantissa - 3))
    widened = moved.to(torch.uint16).view(dtype)
    scale = marlin.scales(torch.ones(1), 64, 128, -1, dtype)[0, 0, 0]
    normal = (bits & 0x78) != 0  # what has no leading one in e4m3 has none there either, where products flush nothing
    assert torch.equal((widened * scale)[normal].float(), given.float()[normal])


@pytest.mark.parametrize(("scale", "dtype"), [(300.0, torch.bfloat16), (1e-9, torch.float16), (300.0, torch.float16)])
def test_a_scale_that_the_format_cannot_hold_is_told(scale: float, dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=rf"scale of {scale:.3g} times 2\^\d+ is no number of {dtype}: MARLIN cannot"):
        marlin.scales(torch.tensor([scale]), 64, 128, -1, dtype)


def test_other_activations_and_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"dtype=torch.float32: MARLIN takes activations of fp16 or bf16"):
        marlin.scales(torch.ones(1), 64, 128, -1, torch.float32)
    with pytest.raises(ValueError, match="rows=65: expected a multiple of 64"):
        marlin.scales(torch.ones(1), 65, 128, -1, torch.float16)
    with pytest.raises(ValueError, match="FP8 weights, which have scales"):
        marlin.layer(MoEWeights(codes(1, 128, 128), codes(1, 128, 64)), -1, torch.float16, gated=True)


@pytest.mark.parametrize(("size", "group", "want"), [(64, -1, 64), (65, -1, 128), (128, 128, 128), (192, 128, 256)])
def test_sizes_are_filled_up_to_tiles_and_groups(size: int, group: int, want: int) -> None:
    assert marlin.padded_intermediate(size, group) == want


@pytest.mark.parametrize("block", [False, True])
def test_a_layer_is_filled_up_with_zeros_in_each_half(block: bool) -> None:
    inter, hidden, size = 100, 128, 128
    w13, w2 = codes(2, 2 * inter, hidden), codes(2, hidden, inter, seed=1)
    scale13 = torch.rand(2, 2, 1) + 0.1 if block else torch.rand(2, 2 * inter, 1) + 0.1
    scale2 = torch.rand(2, 1, 1) + 0.1 if block else torch.rand(2, hidden, 1) + 0.1
    bias = torch.randn(2, 2 * inter)
    given = MoEWeights(w13, w2, scale13, scale2, bias, torch.randn(2, hidden))
    before = replace(given, **{name: None if v is None else v.clone() for name, v in vars(given).items()})  # type: ignore[arg-type]
    found = marlin.layer(given, 128 if block else -1, torch.bfloat16, gated=True)
    for name, value in vars(given).items():
        was = getattr(before, name)
        assert was is value or torch.equal(was.view(torch.uint8), value.view(torch.uint8)), name
    back = torch.stack([read(one, 2 * size, hidden) for one in found.w13]).view(2, 2, size, hidden)
    assert torch.equal(back[:, :, :inter].reshape(w13.shape), w13.view(torch.uint8))
    assert not back[:, :, inter:].any()
    second = torch.stack([read(one, hidden, size) for one in found.w2])
    assert torch.equal(second[..., :inter], w2.view(torch.uint8))
    assert not second[..., inter:].any()
    assert found.w13_scale is not None
    assert found.w2_scale is not None
    assert found.w13_bias is not None
    # With one group of k the scales are applied to the result, blocks or not.
    spread = scale13.repeat_interleave(inter, 1) if block else scale13
    scales = unpermuted(found.w13_scale, grouped=False).view(2, 1, 2, size)[..., :inter] * 2.0**-120
    assert torch.equal(scales.reshape(2, 2 * inter), spread[..., 0].bfloat16())
    assert found.w2_scale.shape == (2, 1, hidden)
    biases = unpermuted(found.w13_bias, grouped=False).view(2, 2, size)
    assert torch.equal(biases[..., :inter].reshape(2, 2 * inter), bias)
    assert not biases[..., inter:].any()
