"""DeepGEMM's grouped GEMMs by their layouts' definitions, on whatever device the tensors are."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor

from fp8moe import PLATFORMS, GroupShape, Platform
from fp8moe.backends import batched_deepgemm, deepgemm
from fp8moe.backends.deepgemm_stages import ALIGNMENT, LAYOUT, DeepGemmStages
from fp8moe.layouts.deepgemm import packed_exponents, rows_fastest
from fp8moe.reference.rounding import fma32
from fp8moe.reference.units import promoted
from fp8moe.scaling import dequantize

GROUP, BLOCK = GroupShape(1, 128), GroupShape(128, 128)
WIDE = {"tokens": 128, "hidden": 128, "inter": 640, "experts": 4, "top_k": 2}
"""The smallest layer that the specification's section 2.4 gives to DeepGEMM."""


Product = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(rows, K), (rows, groups), (N, K), (N / 128, groups) to (rows, N) fp32."""


def in_fp32(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor) -> Tensor:
    left = dequantize(a, a_scale, GROUP)
    return left @ dequantize(b, b_scale, BLOCK).t()


def as_hopper(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor) -> Tensor:
    """In the arithmetic that the adapters declare, as measured on an H200."""
    total = a_scale.new_zeros(len(a), len(b))
    for block, sums in enumerate(promoted(a, b, "hopper.wgmma", 128)):
        wide = b_scale[:, block].repeat_interleave(128)[: len(b)]
        total = fma32(sums, a_scale[:, block, None] * wide, total)
    return total


def checked(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], out: Tensor) -> None:
    """What its source asks of operands on SM90, and what spares it a copy."""
    (codes, scale), (matrix, matrix_scale) = a, b
    rows, terms = codes.shape[-2:]
    assert codes.dtype == matrix.dtype == torch.float8_e4m3fn
    assert scale.dtype == matrix_scale.dtype == torch.float32
    assert codes.is_contiguous()
    assert matrix.is_contiguous()
    assert matrix_scale.is_contiguous()
    assert scale.shape[-2:] == (rows, terms // 128)
    assert scale.stride()[-2:] == (1, (rows + 3) // 4 * 4)
    assert matrix_scale.shape == (len(matrix), -(-matrix.shape[1] // 128), terms // 128)
    assert (out.dtype, out.shape[-1], out.is_contiguous()) == (torch.bfloat16, matrix.shape[1], True)


def contiguous(
    product: Product, a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], out: Tensor, layout: Tensor
) -> None:
    checked(a, b, out)
    assert (layout.dtype, len(layout) % 128, layout.is_contiguous()) == (torch.int32, 0, True)
    out.fill_(torch.nan)
    for start in range(0, len(layout), 128):
        rows = slice(start, start + 128)
        expert = int(layout[start])
        # All of a block, whatever its rows say, by its first: so does the kernel.
        assert set(layout[rows].tolist()) <= {expert, -1}
        if expert >= 0:
            here = product(a[0][rows], a[1][rows], b[0][expert], b[1][expert])
            out[rows] = torch.where((layout[rows] >= 0)[:, None], here, torch.nan).to(out.dtype)


def masked(
    product: Product,
    a: tuple[Tensor, Tensor],
    b: tuple[Tensor, Tensor],
    out: Tensor,
    counts: Tensor,
    expected: int,
) -> None:
    checked(a, b, out)
    assert (counts.dtype, counts.is_contiguous(), expected > 0) == (torch.int32, True, True)
    out.fill_(torch.nan)
    flat, longest = out.flatten(0, 1), a[0].shape[1]
    for expert, count in reversed(list(enumerate(counts.tolist()))):  # in any order: tiles run at the same time
        here = product(a[0][expert, :count], a[1][expert, :count], b[0][expert], b[1][expert])
        # Tiles of 128 rows are stored whole, over what comes next.
        tiles = flat[expert * longest : expert * longest + -(-count // 128) * 128]
        tiles.fill_(torch.nan)
        tiles[:count] = here.to(out.dtype)


def transformed(*, sf: Tensor, mn: int, k: int, recipe: tuple[int, int, int], num_groups: int, is_sfa: bool) -> Tensor:
    """The weights' scales on SM10x: those of a block for each of its rows, four exponents to a word."""
    assert (recipe, is_sfa) == ((1, 128, 128), False)
    assert sf.shape == (num_groups, -(-mn // 128), -(-k // 128))
    return packed_exponents(sf.repeat_interleave(128, dim=1)[:, :mn])


def by_exponents(
    gemm: Callable[..., None], a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], *rest: Tensor | int
) -> None:
    """On SM10x, where the library packs the activations' scales itself: of a scale there is an exponent and no more."""
    bits = a[1].contiguous().view(torch.int32) >> 23
    words, groups = b[1], b[0].shape[2] // 128
    assert words.dtype == torch.int32
    assert words.shape == (*b[0].shape[:2], -(-groups // 4))
    assert words.stride()[-2:] == (1, b[0].shape[1])
    each = (words[..., None] >> 8 * torch.arange(4, device=words.device) & 0xFF).flatten(-2)[..., :groups]
    exponents = each.view(len(each), -1, 128, groups)
    assert torch.equal(exponents, exponents[:, :, :1].expand_as(exponents))
    powers = (exponents[:, :, 0].contiguous().int() << 23).view(torch.float32)
    gemm((a[0], rows_fastest((bits << 23).view(torch.float32))), (b[0], powers), *rest)


class PlayedLibrary(DeepGemmStages):
    product: ClassVar[Product] = staticmethod(in_fp32)
    device: ClassVar[str] = "h200"

    def platform(self) -> Platform:
        return PLATFORMS[self.device]

    def library(self) -> Any:
        gemms = {deepgemm.GEMM: partial(contiguous, self.product), batched_deepgemm.GEMM: partial(masked, self.product)}
        played: dict[str, Any] = {**gemms, ALIGNMENT: lambda: 128, LAYOUT: None}  # SM90 has no use for a layout
        if self.device == "b200":
            played |= {name: partial(by_exponents, gemm) for name, gemm in gemms.items()} | {LAYOUT: transformed}
        return SimpleNamespace(**{name: played[name] for name in self.names})
