"""Alignment, the grouped GEMM and the weighted sum: exact on a grid of small numbers, and on Hopper bit by bit."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from fp8moe.kernels.align import Alignment, align_batches, align_pairs, most_tiles
from fp8moe.kernels.grouped_gemm import Scales, grouped_gemm
from fp8moe.kernels.reduce import weighted_sum

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
    with pytest.raises(ValueError, match="1073741824 tiles of 16 rows times N=256 in tiles of 128 columns"):
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


def power_of_two(exponent: Tensor) -> Tensor:
    """In float64, from its bits: exact, which a device's pow need not be."""
    return ((exponent.to(torch.int64) + 1023) << 52).view(torch.float64)


def truncate(x: Tensor, exponent: Tensor) -> Tensor:
    """Toward zero, to a multiple of 2^exponent."""
    step = power_of_two(exponent)
    return torch.trunc(x / step) * step


def exponent_of(x: Tensor, smallest: int) -> Tensor:
    return (torch.frexp(x).exponent - 1).clamp(min=smallest)


@dataclass(frozen=True)
class Unit:
    """A matrix unit of Hopper's: groups of K, of which terms are cut toward zero to `fraction` bits below the largest
    exponent, and the sum to `kept` bits; the smallest exponent of a factor; and whether Triton's layout takes the
    positions with k mod 4 below 2 of each 32 first.
    """

    group: int
    fraction: int
    kept: int
    smallest: int
    halved: bool = False


# An e4m3 operand of a small tile is widened to fp16, where each of its values is a normal number.
UNITS = {
    ("e4m3", 64): Unit(32, 13, 14, -6),
    ("e4m3", 16): Unit(16, 25, 24, -14, halved=True),
    ("fp16", 64): Unit(16, 25, 24, -14),
    ("fp16", 16): Unit(16, 25, 24, -14),
    ("bf16", 64): Unit(16, 25, 24, -126),
    ("bf16", 16): Unit(16, 25, 24, -126),
}


def hopper_chain(a: Tensor, w: Tensor, unit: Unit) -> Tensor:
    """One accumulation over all of K as Hopper does it, for `a` (M, K) and `w` (N, K), in float64."""
    a, w = a.double(), w.double()
    if unit.halved:
        k = torch.arange(a.shape[1], device=a.device)
        order = torch.argsort((k // 32) * 2 + (k % 4 >= 2), stable=True)
        a, w = a[:, order], w[:, order]
    c = torch.zeros(a.shape[0], w.shape[0], dtype=torch.float64, device=a.device)
    for start in range(0, a.shape[1], unit.group):
        x, y = a[:, None, start : start + unit.group], w[None, :, start : start + unit.group]
        terms = torch.cat([x * y, c[..., None]], -1)
        factors = exponent_of(x, unit.smallest) + exponent_of(y, unit.smallest)
        exponents = torch.cat([factors, exponent_of(c, -126)[..., None]], -1)
        largest = torch.where(terms == 0, -300, exponents).amax(-1)
        c = truncate(terms, (largest - unit.fraction)[..., None]).sum(-1)
        c = truncate(c, exponent_of(c, -300) + 1 - unit.kept)
    return c


def padded(x: Tensor, multiple: int) -> Tensor:
    return torch.nn.functional.pad(x.double(), (0, -x.shape[-1] % multiple))


def hopper_result(operands: Operands, expert: int, tile_rows: int) -> Tensor:
    """(rows, N) fp32 of one expert, as the recipe and the unit say."""
    a, w = padded(operands.a, BLOCK), padded(operands.w[expert], BLOCK)
    dtype = {E4M3: "e4m3", torch.float16: "fp16", torch.bfloat16: "bf16"}[operands.a.dtype]
    unit = UNITS[dtype, tile_rows]
    if operands.scales == "none":
        return hopper_chain(a, w, unit).float()
    assert operands.a_scale is not None
    scale = operands.expert_scale(expert)
    total = torch.zeros(a.shape[0], w.shape[0], dtype=torch.float32, device=a.device)
    for block, start in enumerate(range(0, a.shape[1], BLOCK)):
        chain = hopper_chain(a[:, start : start + BLOCK], w[:, start : start + BLOCK], unit).float()
        if operands.scales == "row":
            total = total + chain
        else:
            scaled = chain * operands.a_scale[:, block, None]
            # fp32 times fp32 is exact in float64, so this is an fma but for a rare double rounding.
            total = (scaled.double() * scale[None, :, block].double() + total.double()).float()
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


def check_alignment(alignment: Alignment, local: list[int], experts: int, tile_rows: int) -> None:
    """Every present pair once, under its own expert, in order; no expert has a tile more than it needs."""
    assert alignment.local_ids.tolist() == local
    pairs, owners = alignment.pairs.tolist(), alignment.tile_experts.tolist()
    for expert in range(experts):
        rows = [pair for tile, owner in zip(pairs, owners, strict=True) if owner == expert for pair in tile]
        mine = [pair for pair, owner in enumerate(local) if owner == expert]
        tiles = -(-len(mine) // tile_rows)
        assert rows == mine + [-1] * (tiles * tile_rows - len(mine))
    unused = [tile for tile, owner in zip(pairs, owners, strict=True) if owner == -1]
    assert all(pair == -1 for tile in unused for pair in tile)
    assert owners == sorted(owners, key=lambda owner: owner if owner >= 0 else experts)


@pytest.mark.parametrize("tile_rows", [16, 64])
@pytest.mark.parametrize(
    ("tokens", "top_k", "experts"), [(0, 2, 4), (1, 1, 1), (5, 3, 8), (40, 2, 3), (200, 8, 16), (3, 1, 200)]
)
def test_alignment(tokens: int, top_k: int, experts: int, tile_rows: int, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(tokens)
    # Two more than there are experts on either side: ids that nobody checked count as absent.
    ids = torch.randint(-2, experts + 2, (tokens, top_k), generator=generator)
    local = [i if 0 <= i < experts else -1 for i in ids.flatten().tolist()]
    alignment = align_pairs(ids.to(device), experts, tile_rows)
    assert alignment.tiles == most_tiles(tokens * top_k, experts, tile_rows)
    check_alignment(alignment, local, experts, tile_rows)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_alignment_with_a_map(dtype: torch.dtype, device: torch.device) -> None:
    expert_map = torch.tensor([-1, 2, -1, 0, 1, -1], dtype=dtype)
    ids = torch.tensor([[0, 1], [3, 3], [4, -1], [5, 2], [1, 4]], dtype=dtype)
    local = [int(expert_map[i]) if i >= 0 else -1 for i in ids.flatten().tolist()]
    check_alignment(align_pairs(ids.to(device), 3, 16, expert_map.to(device)), local, 3, 16)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("tile_rows", [16, 64])
@pytest.mark.parametrize("rows", [1, 16, 20, 64, 100])
def test_alignment_of_batches(rows: int, tile_rows: int, dtype: torch.dtype, device: torch.device) -> None:
    counts = torch.tensor([0, 1, rows, rows + 7, rows // 2, -3], dtype=dtype)
    held = counts.clamp(0, rows).tolist()
    local = [expert if row < held[expert] else -1 for expert in range(6) for row in range(rows)]
    alignment = align_batches(counts.to(device), rows, tile_rows)
    assert alignment.local_ids.dtype == alignment.pairs.dtype == alignment.tile_experts.dtype == torch.int32
    assert alignment.local_ids.tolist() == local
    assert alignment.tiles == 6 * -(-rows // tile_rows)
    for expert, owned in enumerate(held):
        at = slice(expert * -(-rows // tile_rows), (expert + 1) * -(-rows // tile_rows))
        pairs = [pair for tile in alignment.pairs[at].tolist() for pair in tile]
        assert pairs == [expert * rows + row for row in range(owned)] + [-1] * (len(pairs) - owned)
        used = -(-owned // tile_rows)
        owners = alignment.tile_experts[at].tolist()
        assert owners == [expert] * used + [-1] * (len(owners) - used)


def test_alignment_of_no_batches(device: torch.device) -> None:
    for counts, rows in ((torch.empty(0, dtype=torch.int32), 5), (torch.zeros(3, dtype=torch.int32), 0)):
        alignment = align_batches(counts.to(device), rows, 16)
        assert (alignment.tiles, alignment.local_ids.numel(), alignment.tile_experts.numel()) == (0, 0, 0)
    with pytest.raises(ValueError, match="2 batches, rows=1073741824: expected fewer than 2\\^31 rows"):
        align_batches(torch.zeros(2, dtype=torch.int32), 2**30, 16)


def test_worst_case_of_tiles_is_reached() -> None:
    """One full tile more than an even split: every expert one row over."""
    experts, tile_rows = 4, 16
    ids = torch.arange(experts).repeat_interleave(tile_rows + 1)[:, None]
    alignment = align_pairs(ids, experts, tile_rows)
    assert alignment.tiles == most_tiles(ids.numel(), experts, tile_rows) == 2 * experts
    assert (alignment.tile_experts >= 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("weighted", [True, False])
def test_weighted_sum(weighted: bool, dtype: torch.dtype, device: torch.device) -> None:
    tokens, top_k, columns = 5, 3, 1100
    generator = torch.Generator().manual_seed(3)
    y = torch.randn(tokens * top_k, columns, generator=generator)
    weights = torch.rand(tokens, top_k, generator=generator)
    local_ids = torch.randint(0, 3, (tokens, top_k), generator=generator).to(torch.int32)
    local_ids[1] = -1
    local_ids[2, 0] = -1
    expected = torch.zeros(tokens, columns)
    for slot in range(top_k):
        weight = weights[:, slot, None] if weighted else torch.ones(tokens, 1)
        product = weight.double() * y.view(tokens, top_k, columns)[:, slot].double()
        expected = torch.where(local_ids[:, slot, None] >= 0, (expected.double() + product).float(), expected)
    absent = local_ids.flatten() < 0
    y[absent] = float("nan")
    weights = torch.where(local_ids < 0, float("nan"), weights)
    output = torch.full((tokens, 2 * columns), 7.0, dtype=dtype, device=device)
    weighted_sum(y.to(device), local_ids.flatten().to(device), output[:, ::2], weights.to(device) if weighted else None)
    assert torch.equal(output[:, ::2].cpu(), expected.to(dtype))
    assert bool((output[:, 1::2] == 7.0).all())
