"""DEEPGEMM's scales: powers of two where its kernels use exponents alone, and rows that its loads can take."""

from __future__ import annotations

import torch
from torch import Tensor

from fp8moe.keys import GroupShape
from fp8moe.layouts.halves import multiple_of
from fp8moe.recipe import REQUANTISED_FLOOR
from fp8moe.scaling import dequantize, quantize

BLOCK = GroupShape(128, 128)
ALIGNED_BYTES = 16
"""Of a column of scales, for the tensor memory accelerator."""


def power_of_two_scales(codes: Tensor, scale: Tensor, parts: int = 1) -> tuple[Tensor, Tensor]:
    """Requantises block weights so that scales are powers of two, rounded up: other codes, other values. Expert by
    expert, so that a whole layer is never held in fp32.

    Args:
        codes: (E, rows, columns) e4m3.
        scale: fp32 for blocks of 128 x 128, those of each part of the rows apart.
        parts: 2 for w13 of a gated MLP.
    """
    found, scales = torch.empty_like(codes), torch.empty_like(scale)
    for expert, (matrix, own) in enumerate(zip(codes, scale, strict=True)):
        split = matrix.reshape(parts, -1, codes.shape[-1])
        values = dequantize(split, own.reshape(parts, -1, scale.shape[-1]), BLOCK)
        requantised = quantize(values, BLOCK, scale_rounding="power_of_two", amax_floor=REQUANTISED_FLOOR)
        found[expert], scales[expert] = (part.flatten(0, 1) for part in requantised)
    return found, scales


def rows_fastest(scale: Tensor) -> Tensor:
    """Activation scales (…, rows, groups) fp32 with the same values and the rows next to each other in memory, each
    group's at a multiple of 16 bytes: a layout that the kernel takes without a copy."""
    found = empty_rows_fastest(scale)
    found.copy_(scale)
    return found


def empty_rows_fastest(scale: Tensor, *shape: int) -> Tensor:
    """Such scales, of the shape, dtype and device of `scale`, or of another shape; their values are undefined."""
    *batches, rows, groups = shape or scale.shape
    stride = multiple_of(rows, ALIGNED_BYTES // scale.element_size())
    return scale.new_empty(*batches, groups, stride)[..., :rows].transpose(-1, -2)


def packed_exponents(scale: Tensor) -> Tensor:
    """(…, rows, groups) fp32 powers of two to (…, rows, ceil(groups / 4)) int32, four exponents a word, the first group
    in the lowest byte: the scales of SM100. Rows next to each other in memory, as `rows_fastest`.

    Raises:
        ValueError: a scale that is no power of two, of whose mantissa the exponent tells nothing.
    """
    bits = scale.contiguous().view(torch.int32)
    exponent = bits >> 23
    if bool(((bits & 0x007FFFFF != 0) | (exponent < 1) | (exponent > 254)).any()):
        raise ValueError("scale: expected powers of two, finite and positive, which alone have an exponent for a value")
    exponents = exponent.to(torch.uint8)
    groups = multiple_of(scale.shape[-1], 4)
    padded = torch.nn.functional.pad(exponents, (0, groups - scale.shape[-1]))
    return rows_fastest(padded.view(torch.int32))


def contiguous_rows(most_pairs: int, experts: int, alignment: int = 128) -> int:
    """Rows of the contiguous layout at the most: each expert's segment begins at a multiple of the alignment."""
    return multiple_of(most_pairs + min(most_pairs, experts) * (alignment - 1), alignment)
