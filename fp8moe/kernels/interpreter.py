"""Whether the kernels are interpreted (TRITON_INTERPRET=1), how well, and how many rows a program takes then."""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from triton.runtime import JITFunction

from fp8moe.kernels.widths import to_float32

INTERPRETED = not isinstance(to_float32, JITFunction)
"""Whether triton was imported with TRITON_INTERPRET=1; setting it later has no effect."""


@triton.jit
def _square_and_add(values):
    x = tl.load(values)
    tl.store(values, tl.fma(x, x, tl.load(values + 1)))


@lru_cache
def unlike_a_device() -> str:
    """What of this triton's interpreter is unlike every device, and the remedy; "" where nothing is. In triton 3.9, the
    first that was seen to, `tl.fma` rounds once."""
    step = 2.0**-23
    values = torch.tensor([1 + step, -(1 + 2 * step)])
    _square_and_add[(1,)](values)
    if float(values[0]) == step**2:
        return ""
    return f"in the interpreter of triton {triton.__version__} tl.fma rounds twice; install triton 3.9 or newer for it"


def rows_of_program(rows: int, compiled: int) -> int:
    """Rows of one program of an elementwise kernel, a power of two, for a call of `rows`: `compiled` on a device.

    No bit depends on it. The interpreter takes a millisecond for every helper that a program calls, however few its
    rows, so it gets up to 128 of them in one program.
    """
    if not INTERPRETED:
        return compiled
    most: int = triton.next_power_of_2(rows)
    return max(min(most, 128), compiled)
