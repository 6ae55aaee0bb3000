"""Kernels that never change, one for each kind of work: what a run's times are compared through on another day."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from conformance.timing.graphs import Unrolled

COPY_BYTES = 256 << 20
LARGE, SHORT = (4096, 4096, 4096), (64, 4096, 4096)
MEMORY, COMPUTE, LAUNCH = "memory", "compute", "launch"
CALLS = {MEMORY: 16, COMPUTE: 16, LAUNCH: 100}
"""In a graph of each: one to three milliseconds on the GPUs of data centres. Never to be changed: stored times rest on
them."""


def yardsticks(device: str = "cuda") -> dict[str, Unrolled]:
    """A copy of 256 MiB, an FP8 GEMM of 4096 x 4096 x 4096, and one of 64 rows: bf16 where torch has no FP8 product
    for the device. Each as a graph."""
    return {
        MEMORY: Unrolled([copy_call(COPY_BYTES, device)], CALLS[MEMORY]),
        COMPUTE: Unrolled([gemm_call(*LARGE, device)], CALLS[COMPUTE]),
        LAUNCH: Unrolled([gemm_call(*SHORT, device)], CALLS[LAUNCH]),
    }


def copy_call(size: int, device: str) -> Callable[[], None]:
    """Copies so many bytes."""
    source = torch.randint(0, 256, (size,), dtype=torch.uint8, device=device)
    return partial(_discard, torch.empty_like(source).copy_, source)


def gemm_call(rows: int, columns: int, terms: int, device: str, fp8: bool = True) -> Callable[[], None]:
    """A product of (rows, terms) and (terms, columns), in FP8 if that is asked for and torch has it, else in bf16."""
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(n, terms, device=device, generator=generator) for n in (rows, columns))
    if fp8 and torch.cuda.get_device_capability() >= (8, 9) and torch.version.cuda is not None:
        a8, b8, one = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn), torch.ones((), device=device)
        product: Callable[..., object] = torch._scaled_mm
        return partial(_discard, product, a8, b8.t(), one, one, out_dtype=torch.bfloat16)
    a16, b16 = a.bfloat16(), b.bfloat16()
    return partial(_discard, torch.matmul, a16, b16.t())


def _discard(product: Callable[..., object], *given: object, **named: object) -> None:
    product(*given, **named)
