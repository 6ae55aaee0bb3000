"""Whether the kernels are interpreted (TRITON_INTERPRET=1), and how many rows a program takes then."""

import triton
from triton.runtime import JITFunction

from fp8moe.kernels.widths import to_float32

INTERPRETED = not isinstance(to_float32, JITFunction)
"""Whether triton was imported with TRITON_INTERPRET=1; setting it later has no effect."""


def rows_of_program(rows: int, compiled: int) -> int:
    """Rows of one program of an elementwise kernel, a power of two, for a call of `rows`: `compiled` on a device.

    No bit depends on it. The interpreter takes a millisecond for every helper that a program calls, however few its
    rows, so it gets up to 128 of them in one program.
    """
    if not INTERPRETED:
        return compiled
    most: int = triton.next_power_of_2(rows)
    return max(min(most, 128), compiled)
