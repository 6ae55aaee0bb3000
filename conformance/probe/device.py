"""The device's own FP8 matrix product, `torch._scaled_mm`, with fast accumulation and without, as a product to ask."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from conformance.probe.fingerprint import Dot
from fp8moe.platforms import Platform

ROWS = 128
"""The left operand is padded to a whole tile of the library's kernels, the right one to a multiple of it."""


def scaled_mm_dot(device: torch.device | str, *, use_fast_accum: bool) -> Dot:
    """(M, K) and (N, K) FP8 to (M, N) bf16 through `torch._scaled_mm` on a device, scales 1."""

    def dot(a: Tensor, b: Tensor) -> Tensor:
        left, right = (_padded(operand).to(device) for operand in (a, b))
        one = torch.ones((), device=device)
        product = torch._scaled_mm(
            left, right.T, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=use_fast_accum
        )
        return product[: len(a), : len(b)].cpu()

    return dot


def _padded(operand: Tensor) -> Tensor:
    rows = torch.nn.functional.pad(operand.view(torch.uint8), (0, 0, 0, -len(operand) % ROWS))
    return rows.contiguous().view(operand.dtype)


def device_dots(platform: Platform, device: str) -> Mapping[str, Dot]:
    """The products that torch offers on a device, by name; none where it has no FP8 hardware."""
    if not (platform.is_cuda or platform.is_rocm) or not platform.has_fp8_hardware:
        return {}
    return {
        f"torch._scaled_mm, fast accumulation {'on' if fast else 'off'}": scaled_mm_dot(device, use_fast_accum=fast)
        for fast in (False, True)
    }
