"""The grouped GEMM: exact on a grid of small numbers, and on Hopper bit by bit."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from fp8moe.backends.triton_arithmetic import arithmetic_by_tile
from fp8moe.kernels.align import Alignment, align_batches, align_pairs
from fp8moe.kernels.grouped_gemm import (
    DEEP,
    FEW_BY_ROW,
    HOPPER_SHARED,
    NARROWEST,
    OF_SHORT,
    SHALLOW,
    TOGETHER,
    USUAL,
    WIDEST,
    Program,
    Scales,
    columns_of_tile,
    few_by_block,
    grouped_gemm,
    many,
    program_of,
)
from fp8moe.platforms import PLATFORMS
from fp8moe.reference.replay import k_order, ordered
from fp8moe.reference.rounding import fma32
from fp8moe.reference.units import promoted

E4M3 = torch.float8_e4m3fn
BLOCK = 128


DTYPES = {"block": E4M3, "row": E4M3, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Operands:
    """A call of `grouped_gemm`; with block scales, `parts` of `w`'s rows are blocked apart."""

    a: Tensor
    w: Tensor
    topk_ids: Tensor
    scales: Scales
    parts: int
    a_scale: Tensor | None = None
    w_scale: Tensor | None = None
    bias: Tensor | None = None

    def to(self, device: torch.device) -> Operands:
        moved = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **moved)

    def run(self, tile_rows: int) -> Tensor:
        """The kernel's result on the CPU, rows of absent pairs zero."""
        alignment = align_pairs(self.topk_ids, self.w.shape[0], tile_rows)
        c = grouped_gemm(
            self.a,
            self.a_scale,
            self.w,
            self.w_scale,
            alignment,
            pairs_per_row=self.topk_ids.shape[1],
            parts=self.parts,
            scales=self.scales,
            bias=self.bias,
        )
        return torch.where((alignment.local_ids >= 0)[:, None], c, 0.0).cpu()

    def row_scale(self) -> Tensor:
        """(rows, K blocks), or (rows, 1): the scale of each row of the activations."""
        return torch.ones(self.a.shape[0], 1) if self.a_scale is None else self.a_scale

    def expert_scale(self, expert: int) -> Tensor:
        """(N, K blocks), or (N, 1): the scale of each row of an expert's weight."""
        if self.w_scale is None:
            return torch.ones(self.w.shape[1], 1)
        if self.scales == "row":
            return self.w_scale[expert][:, None]
        part = self.w.shape[1] // self.parts
        halves = self.w_scale[expert].reshape(self.parts, -(-part // BLOCK), -1)
        return halves.repeat_interleave(BLOCK, dim=1)[:, :part].reshape(self.w.shape[1], -1)

    def expected(self) -> Tensor:
        """In float64, pair by pair."""
        k = torch.arange(self.a.shape[1]) // BLOCK if self.scales == "block" else torch.zeros(1, dtype=torch.int64)
        a = self.a.double() * self.row_scale().double()[:, k]
        result = torch.zeros(self.topk_ids.numel(), self.w.shape[1], dtype=torch.float64)
        for pair, expert in enumerate(self.topk_ids.flatten().tolist()):
            if expert >= 0:
                w = self.w[expert].double() * self.expert_scale(expert).double()[:, k]
                result[pair] = w @ a[pair // self.topk_ids.shape[1]]
                if self.bias is not None:
                    result[pair] += self.bias[expert].double()
        return result


def draw(
    rows: int, n: int, k: int, experts: int, kind: str = "block", top_k: int = 2, parts: int = 1, law: str = "grid"
) -> Operands:
    """`grid`: integers up to 4 and powers of two, so that every order of summation is exact in fp32.

    `any`: every finite code (for bf16 and fp16, twenty binades), and scales of every size.
    """
    generator = torch.Generator().manual_seed(rows * 7919 + n * 31 + k + experts)

    def values(*shape: int) -> Tensor:
        if law == "grid":
            return torch.randint(-4, 5, shape, generator=generator).float().to(DTYPES[kind])
        if DTYPES[kind] != E4M3:
            size = 2.0 ** torch.randint(-10, 2, shape, generator=generator)
            return (torch.randn(shape, generator=generator) * size).to(DTYPES[kind])
        code = torch.randint(0, 254, shape, generator=generator)
        return torch.where(code < 127, code, code + 1).to(torch.uint8).view(E4M3)

    def scales(*shape: int) -> Tensor:
        if law == "grid":
            return 2.0 ** torch.randint(-3, 3, shape, generator=generator).float()
        return torch.rand(shape, generator=generator) * 2.0 ** torch.randint(-9, 3, shape, generator=generator)

    k_blocks = -(-k // BLOCK)
    a_scale = {"block": (rows, k_blocks), "row": (rows, 1)}
    w_scale = {"block": (experts, parts * -(-(n // parts) // BLOCK), k_blocks), "row": (experts, n)}
    return Operands(
        a=values(rows, k),
        a_scale=scales(*a_scale[kind]) if kind in a_scale else None,
        w=values(experts, n, k),
        w_scale=scales(*w_scale[kind]) if kind in w_scale else None,
        topk_ids=torch.randint(-1, experts, (rows, top_k), generator=generator),
        scales="block" if kind == "block" else "row" if kind == "row" else "none",
        parts=parts,
        bias=torch.randint(-8, 9, (experts, n), generator=generator).float(),
    )


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("tile_rows", [16, 64])
@pytest.mark.parametrize(
    ("rows", "n", "k", "experts", "parts"),
    [
        (1, 128, 128, 1, 1),
        (16, 144, 200, 3, 1),
        (17, 288, 256, 1, 2),  # two halves of 144: the second starts within a block of W
        (33, 400, 144, 8, 2),
        (2, 16, 40, 2, 2),
    ],
)
def test_exact_on_a_grid(
    rows: int, n: int, k: int, experts: int, parts: int, tile_rows: int, kind: str, device: torch.device
) -> None:
    operands = draw(rows, n, k, experts, kind, parts=parts)
    assert torch.equal(operands.to(device).run(tile_rows).double(), operands.expected())


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("tile_rows", [16, 64])
@pytest.mark.parametrize("columns", [32, 64])
@pytest.mark.parametrize(("rows", "n", "k", "experts", "parts"), [(17, 288, 256, 1, 2), (33, 400, 144, 8, 2)])
def test_narrower_tiles(
    rows: int,
    n: int,
    k: int,
    experts: int,
    parts: int,
    columns: int,
    tile_rows: int,
    kind: str,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("fp8moe.kernels.grouped_gemm.columns_of_tile", lambda *_: columns)
    operands = draw(rows, n, k, experts, kind, parts=parts)
    assert torch.equal(operands.to(device).run(tile_rows).double(), operands.expected())


def test_tiles_are_narrow_where_few_programs_would_run(gpu: torch.device) -> None:
    assert columns_of_tile(1, 256, gpu) == 32
    assert columns_of_tile(100, 14336, gpu) == 128


@pytest.mark.parametrize("program", [NARROWEST, USUAL, WIDEST])
@pytest.mark.parametrize(("rows", "n", "k", "experts", "parts"), [(17, 288, 256, 1, 2), (33, 400, 144, 8, 1)])
def test_every_program_of_few_rows(
    rows: int,
    n: int,
    k: int,
    experts: int,
    parts: int,
    program: Program,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("fp8moe.kernels.grouped_gemm.program_of", lambda *_, **__: program)
    operands = draw(rows, n, k, experts, "block", parts=parts)
    assert torch.equal(operands.to(device).run(16).double(), operands.expected())


@pytest.mark.parametrize("program", [OF_SHORT, DEEP, SHALLOW])
@pytest.mark.parametrize("together", [1, 2, 3, 100])
@pytest.mark.parametrize(("kind", "n", "k", "parts"), [("block", 288, 256, 2), ("row", 400, 144, 1)])
def test_every_order_of_the_tiles(
    kind: str,
    n: int,
    k: int,
    parts: int,
    together: int,
    program: Program,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of up to seven tiles, which most of these numbers do not divide."""
    chosen = replace(program, together=together)
    monkeypatch.setattr("fp8moe.kernels.grouped_gemm.program_of", lambda *_, **__: chosen)
    operands = draw(50, n, k, 7, kind, parts=parts)
    assert torch.equal(operands.to(device).run(64).double(), operands.expected())


def test_programs_of_few_rows_follow_from_how_many_run_at_once(device: torch.device) -> None:
    """With 132 multiprocessors: of two layers with one token and with sixteen, and a short sum."""
    for tiles, columns, k_size, expected in (
        (8 * 2, 384, 4096, NARROWEST),
        (82 * 2, 384, 4096, WIDEST),
        (8 * 2, 2048, 7168, USUAL),
        (38 * 2, 2048, 7168, USUAL),
        (8, 7168, 2048, WIDEST),
        (82, 4096, 384, WIDEST),
        (82, 4096, 768, USUAL),
    ):
        assert few_by_block(tiles, columns, k_size, 132) == expected, (tiles, columns, k_size)
    alignment = align_pairs(torch.arange(16, device=device).view(8, 2), 16, 16)
    for k_size, expected in ((384, USUAL), (768, FEW_BY_ROW)):
        found = program_of(alignment, 16, 1, 4096, k_size, "row", torch.device("cuda"), own_rows=True)
        assert found == expected


def test_programs_of_many_rows_follow_from_what_is_waited_for() -> None:
    """Of published layers with 1,024 and 4,096 tokens, by their tiles, experts and terms."""
    a100 = 164 * 1024
    for tiles, experts, k_size, own_rows, shared, expected in (
        (764, 256, 7168, False, HOPPER_SHARED, replace(DEEP, together=TOGETHER)),
        (764, 256, 256, True, HOPPER_SHARED, replace(OF_SHORT, together=TOGETHER)),
        (638, 128, 2048, False, HOPPER_SHARED, SHALLOW),
        (638, 128, 768, True, HOPPER_SHARED, replace(DEEP, together=TOGETHER)),
        (638, 128, 768, True, a100, replace(SHALLOW, together=TOGETHER)),
    ):
        found = many(tiles, 64, experts, BLOCK, k_size, own_rows=own_rows, fp8=True, shared=shared)
        assert found == expected, (tiles, experts, k_size)
    given = {"own_rows": True, "shared": HOPPER_SHARED}
    assert many(764, 64, 256, 32, 256, fp8=True, **given) == replace(SHALLOW, columns=32, together=TOGETHER)
    assert many(764, 64, 256, BLOCK, 256, fp8=False, **given) == replace(SHALLOW, together=TOGETHER)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bias_of_each_dtype_and_none(dtype: torch.dtype, device: torch.device) -> None:
    operands = draw(5, 144, 128, 2)
    assert operands.bias is not None
    with_bias = replace(operands, bias=operands.bias.to(dtype))
    without = replace(operands, bias=None)
    assert torch.equal(with_bias.to(device).run(16).double(), operands.expected())
    assert torch.equal(without.to(device).run(16).double(), without.expected())


def transposed(x: Tensor) -> Tensor:
    """The same values, with the dimensions' strides the other way round."""
    code = x.view(torch.uint8) if x.dtype == E4M3 else x
    order = tuple(reversed(range(x.ndim)))
    return code.permute(order).contiguous().permute(order).view(x.dtype)


@pytest.mark.parametrize("kind", DTYPES)
def test_any_strides(kind: str, device: torch.device) -> None:
    operands = draw(9, 288, 200, 3, kind, parts=2)
    here = operands.to(device)
    tensors = {name: transposed(value) for name, value in vars(here).items() if isinstance(value, Tensor)}
    assert not tensors["w"].is_contiguous()
    assert torch.equal(replace(here, **tensors).run(16).double(), operands.expected())


def test_one_scale_for_a_whole_tensor_is_a_view(device: torch.device) -> None:
    operands = draw(9, 144, 200, 3, "row")
    a_scale, w_scale = torch.tensor([[0.5]]), torch.tensor([[2.0], [4.0], [0.25]])
    operands = replace(operands, a_scale=a_scale.expand(9, 1), w_scale=w_scale.expand(3, 144))
    views = replace(
        operands.to(device), a_scale=a_scale.to(device).expand(9, 1), w_scale=w_scale.to(device).expand(3, 144)
    )
    assert torch.equal(views.run(16).double(), operands.expected())


@pytest.mark.parametrize("tile_rows", [16, 64])
@pytest.mark.parametrize("kind", DTYPES)
def test_a_nan_stays_in_its_row(kind: str, tile_rows: int, device: torch.device) -> None:
    operands = draw(9, 144, 200, 2, kind, top_k=1)
    operands = replace(operands, topk_ids=operands.topk_ids.clamp(min=0))
    clean = operands.to(device).run(tile_rows)
    a = operands.a.float()
    a[4, 150] = float("nan")
    got = replace(operands, a=a.to(operands.a.dtype)).to(device).run(tile_rows)
    others = torch.arange(9) != 4
    assert bool(got[4].isnan().all())
    assert torch.equal(got[others], clean[others])


@pytest.mark.parametrize("tile_rows", [16, 64])
def test_subnormal_operands(tile_rows: int, device: torch.device) -> None:
    """Multiples of the smallest bf16, which Triton's interpreter would misread."""
    operands = draw(9, 144, 200, 2, "bf16")
    a = operands.a.double() * 2.0**-133
    small = replace(operands, a=a.to(torch.bfloat16), w=operands.w * 2.0**100, bias=None)
    assert torch.equal(small.a.double(), a)
    assert torch.equal(small.to(device).run(tile_rows).double(), small.expected())


def test_row_scales_round_twice(device: torch.device) -> None:
    """(c * a_scale) * w_scale, then the bias: no product of the scales, and no fma."""
    operands = draw(17, 144, 128, 2, "row", top_k=1)
    generator = torch.Generator().manual_seed(8)
    a_scale, w_scale = torch.rand(17, 1, generator=generator), torch.rand(2, 144, generator=generator)
    bias = torch.randn(2, 144, generator=generator)
    operands = replace(operands, a_scale=a_scale, w_scale=w_scale, bias=bias)
    ids = operands.topk_ids[:, 0].clamp(min=0)
    c = (operands.a.float()[:, None] * operands.w.float()[ids]).sum(-1)  # exact
    expected = torch.where(operands.topk_ids >= 0, (c * a_scale) * w_scale[ids] + bias[ids], 0.0)
    assert torch.equal(operands.to(device).run(16), expected)


def test_too_many_programs_are_refused() -> None:
    tiles = 2**30
    tile = torch.zeros(1, 16, dtype=torch.int32)
    alignment = Alignment(tile[0, :1], tile.expand(tiles, 16), tile[0, :1].expand(tiles))
    a, w = torch.zeros(1, 128, dtype=torch.bfloat16), torch.zeros(1, 256, 128, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="1073741824 tiles of 16 rows times N=256 in tiles of 128"):
        grouped_gemm(a, None, w, None, alignment, pairs_per_row=1, scales="none")


def test_batched_layout(device: torch.device) -> None:
    operands = draw(3 * 20, 144, 200, 3, "row", top_k=1).to(device)
    counts = torch.tensor([0, 17, 99], device=device)
    alignment = align_batches(counts, 20, 16)
    c = grouped_gemm(
        operands.a, operands.a_scale, operands.w, operands.w_scale, alignment, pairs_per_row=1, scales="row"
    )
    topk_ids = alignment.local_ids[:, None].cpu()
    expected = replace(operands.to(torch.device("cpu")), topk_ids=topk_ids, bias=None).expected()
    kept = topk_ids[:, 0] >= 0
    assert int(kept.sum()) == 37
    assert torch.equal(c.cpu()[kept].double(), expected[kept])


def test_weights_past_two_to_the_31_elements(gpu: torch.device) -> None:
    operands = draw(64, 4096, 2048, 2).to(gpu)
    experts = 2**31 // (4096 * 2048) + 2
    w = torch.zeros(experts, 4096, 2048, dtype=torch.uint8, device=gpu)
    w[-2:] = operands.w.view(torch.uint8)
    assert operands.w_scale is not None
    w_scale = operands.w_scale.repeat(experts // 2 + 1, 1, 1)[:experts]
    w_scale[-2:] = operands.w_scale
    far_ids = torch.where(operands.topk_ids >= 0, operands.topk_ids + experts - 2, -1)
    far = replace(operands, w=w.view(E4M3), w_scale=w_scale, topk_ids=far_ids, bias=None)
    assert torch.equal(far.run(64), replace(operands, bias=None).run(64))


def hopper_result(operands: Operands, expert: int, tile_rows: int) -> Tensor:
    """(rows, N) fp32 of one expert, as the recipe says, in the units that the backends declare."""
    by_tile = arithmetic_by_tile(PLATFORMS["h100"], interpreted=False, fp8=operands.scales != "none")
    assert by_tile is not None
    arithmetic = by_tile[tile_rows]
    order = k_order(arithmetic.k_order, operands.a.shape[1], operands.a.device)
    a, w = ordered(operands.a, order), ordered(operands.w[expert], order)
    chains = promoted(a, w, arithmetic.unit, arithmetic.promote_every)
    if operands.scales == "none":
        return chains[0]
    assert operands.a_scale is not None
    scale = operands.expert_scale(expert)
    total = torch.zeros_like(chains[0])
    for block, chain in enumerate(chains):
        if operands.scales == "row":
            total = total + chain
        else:
            total = fma32(chain * operands.a_scale[:, block, None], scale[None, :, block], total)
    return total if operands.scales == "block" else (total * operands.a_scale) * scale[None, :, 0]


@pytest.mark.parametrize("tile_rows", [16, 64])
@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize(("rows", "n", "k"), [(64, 256, 1024), (33, 144, 200), (7, 512, 7168)])
def test_bits_on_hopper(rows: int, n: int, k: int, kind: str, tile_rows: int, hopper: torch.device) -> None:
    operands = replace(draw(rows, n, k, 2, kind, top_k=1, law="any"), bias=None)
    here = operands.to(hopper)
    expected = torch.zeros(rows, n, dtype=torch.float32, device=hopper)
    for expert in range(2):
        expected = torch.where(here.topk_ids == expert, hopper_result(here, expert, tile_rows), expected)
    got = here.run(tile_rows)
    different = got != expected.cpu()
    assert not bool(different.any()), (float(different.float().mean()), different.nonzero()[:5].tolist())
