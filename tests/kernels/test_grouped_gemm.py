"""Alignment, the grouped GEMM and the weighted sum: exact on a grid of small numbers, and on Hopper bit by bit."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from fp8moe.kernels.align import Alignment, align_pairs, most_tiles
from fp8moe.kernels.grouped_gemm import grouped_gemm
from fp8moe.kernels.reduce import weighted_sum

E4M3 = torch.float8_e4m3fn
BLOCK = 128


@dataclass(frozen=True)
class Operands:
    """A call of `grouped_gemm`; `parts` halves of `w`'s rows are blocked apart."""

    a: Tensor
    a_scale: Tensor
    w: Tensor
    w_scale: Tensor
    topk_ids: Tensor
    parts: int
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
            bias=self.bias,
        )
        return torch.where((alignment.local_ids >= 0)[:, None], c, 0.0).cpu()

    def expert_scale(self, expert: int) -> Tensor:
        """(N, K blocks): the scale of each row of an expert's weight."""
        part = self.w.shape[1] // self.parts
        halves = self.w_scale[expert].reshape(self.parts, -(-part // BLOCK), -1)
        return halves.repeat_interleave(BLOCK, dim=1)[:, :part].reshape(self.w.shape[1], -1)

    def expected(self) -> Tensor:
        """In float64, pair by pair."""
        k = torch.arange(self.a.shape[1]) // BLOCK
        a = self.a.double() * self.a_scale.double()[:, k]
        result = torch.zeros(self.topk_ids.numel(), self.w.shape[1], dtype=torch.float64)
        for pair, expert in enumerate(self.topk_ids.flatten().tolist()):
            if expert >= 0:
                w = self.w[expert].double() * self.expert_scale(expert).double()[:, k]
                result[pair] = w @ a[pair // self.topk_ids.shape[1]]
                if self.bias is not None:
                    result[pair] += self.bias[expert].double()
        return result


def draw(rows: int, n: int, k: int, experts: int, top_k: int = 2, parts: int = 1, law: str = "grid") -> Operands:
    """`grid`: integers up to 4 and powers of two, so that every order of summation is exact in fp32.

    `any`: every finite code, and scales of every size.
    """
    generator = torch.Generator().manual_seed(rows * 7919 + n * 31 + k + experts)

    def codes(*shape: int) -> Tensor:
        if law == "grid":
            return torch.randint(-4, 5, shape, generator=generator).float().to(E4M3)
        code = torch.randint(0, 254, shape, generator=generator)
        return torch.where(code < 127, code, code + 1).to(torch.uint8).view(E4M3)

    def scales(*shape: int) -> Tensor:
        if law == "grid":
            return 2.0 ** torch.randint(-3, 3, shape, generator=generator).float()
        return torch.rand(shape, generator=generator) * 2.0 ** torch.randint(-9, 3, shape, generator=generator)

    k_blocks = -(-k // BLOCK)
    return Operands(
        a=codes(rows, k),
        a_scale=scales(rows, k_blocks),
        w=codes(experts, n, k),
        w_scale=scales(experts, parts * -(-(n // parts) // BLOCK), k_blocks),
        topk_ids=torch.randint(-1, experts, (rows, top_k), generator=generator),
        parts=parts,
        bias=torch.randint(-8, 9, (experts, n), generator=generator).float(),
    )


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
    rows: int, n: int, k: int, experts: int, parts: int, tile_rows: int, device: torch.device
) -> None:
    operands = draw(rows, n, k, experts, parts=parts)
    assert torch.equal(operands.to(device).run(tile_rows).double(), operands.expected())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bias_of_each_dtype_and_none(dtype: torch.dtype, device: torch.device) -> None:
    operands = draw(5, 144, 128, 2)
    assert operands.bias is not None
    with_bias = replace(operands, bias=operands.bias.to(dtype))
    without = replace(operands, bias=None)
    assert torch.equal(with_bias.to(device).run(16).double(), operands.expected())
    assert torch.equal(without.to(device).run(16).double(), without.expected())


def test_any_strides(device: torch.device) -> None:
    operands = draw(9, 288, 200, 3, parts=2)
    here = operands.to(device)
    spread = replace(
        here,
        a=here.a.view(torch.uint8).t().contiguous().t().view(E4M3),
        a_scale=here.a_scale.t().contiguous().t(),
        w=here.w.view(torch.uint8).permute(2, 0, 1).contiguous().permute(1, 2, 0).view(E4M3),
        w_scale=here.w_scale.permute(2, 1, 0).contiguous().permute(2, 1, 0),
        topk_ids=here.topk_ids.t().contiguous().t(),
        bias=None if here.bias is None else here.bias.t().contiguous().t(),
    )
    assert not spread.w.is_contiguous()
    assert torch.equal(spread.run(16).double(), operands.expected())


def test_weights_past_two_to_the_31_elements(gpu: torch.device) -> None:
    operands = draw(64, 4096, 2048, 2).to(gpu)
    experts = 2**31 // (4096 * 2048) + 2
    w = torch.zeros(experts, 4096, 2048, dtype=torch.uint8, device=gpu)
    w[-2:] = operands.w.view(torch.uint8)
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


def hopper_chain(a: Tensor, w: Tensor, small_tile: bool) -> Tensor:
    """One accumulation over all of K as Hopper does it, for e4m3 `a` (M, K) and `w` (N, K).

    Terms are cut toward zero to `fraction` bits below the largest exponent of their group, and the sum to `kept`
    bits. wgmma takes groups of 32. mma.sync of fp16 takes groups of 16, of which Triton's layout makes the first
    from the positions with k mod 4 below 2; every e4m3 value is a normal fp16, so exponents have no floor.
    """
    group, fraction, kept, smallest = (16, 25, 24, -100) if small_tile else (32, 13, 14, -6)
    a, w = a.double(), w.double()
    if small_tile:
        k = torch.arange(a.shape[1], device=a.device)
        order = torch.argsort((k // 32) * 2 + (k % 4 >= 2), stable=True)
        a, w = a[:, order], w[:, order]
    c = torch.zeros(a.shape[0], w.shape[0], dtype=torch.float64, device=a.device)
    for start in range(0, a.shape[1], group):
        x, y = a[:, None, start : start + group], w[None, :, start : start + group]
        terms = torch.cat([x * y, c[..., None]], -1)
        exponents = torch.cat(
            [exponent_of(x, smallest) + exponent_of(y, smallest), exponent_of(c, -100)[..., None]], -1
        )
        largest = torch.where(terms == 0, -200, exponents).amax(-1)
        c = truncate(terms, (largest - fraction)[..., None]).sum(-1)
        c = truncate(c, exponent_of(c, -200) + 1 - kept)
    return c


@pytest.mark.parametrize("tile_rows", [16, 64])
@pytest.mark.parametrize(("rows", "n", "k"), [(64, 256, 1024), (33, 144, 200), (7, 512, 7168)])
def test_bits_on_hopper(rows: int, n: int, k: int, tile_rows: int, hopper: torch.device) -> None:
    operands = replace(draw(rows, n, k, 2, top_k=1, law="any"), bias=None)
    expected = torch.zeros(rows, n, dtype=torch.float32, device=hopper)
    here = operands.to(hopper)
    for expert in range(2):
        total = torch.zeros_like(expected)
        scale = here.expert_scale(expert)
        for block, start in enumerate(range(0, k, BLOCK)):
            at = slice(start, start + BLOCK)
            pad = (0, -here.a[:, at].shape[1] % BLOCK)
            a, w = (torch.nn.functional.pad(x[..., at].float(), pad) for x in (here.a, here.w[expert]))
            scaled = hopper_chain(a, w, tile_rows == 16).float() * here.a_scale[:, block, None]
            # fp32 times fp32 is exact in float64, so this is an fma but for a rare double rounding.
            total = (scaled.double() * scale[None, :, block].double() + total.double()).float()
        expected = torch.where(here.topk_ids == expert, total, expected)
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
