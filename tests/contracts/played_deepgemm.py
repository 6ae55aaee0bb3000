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
from fp8moe.backends.deepgemm_stages import DeepGemmStages
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


class PlayedLibrary(DeepGemmStages):
    product: ClassVar[Product] = staticmethod(in_fp32)

    def platform(self) -> Platform:
        return PLATFORMS["h200"]

    def library(self) -> Any:
        played: dict[str, Any] = {
            deepgemm.GEMM: partial(contiguous, self.product),
            batched_deepgemm.GEMM: partial(masked, self.product),
            deepgemm.ALIGNMENT: lambda: 128,
        }
        return SimpleNamespace(**{name: played[name] for name in self.names})
