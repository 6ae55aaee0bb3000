"""What a Hopper GPU makes of 1 / x where a library asks for speed: `rcp.approx.ftz.f32`, as fast math has it.

Its result may be off the nearest fp32 number by one unit in the last place; whether it is depends on the mantissa of
x alone. Of the 128 mantissas that bf16 has, those of `OFF` are (measured on an H200, reports/h200/2026-11-29-policy/
flashinfer-try.txt; tests/kernels/test_reciprocal.py asks the GPU that is there).
"""

from __future__ import annotations

import torch
from torch import Tensor

OFF = {
    132: -1,
    134: 1,
    139: -1,
    141: 1,
    148: -1,
    150: -1,
    165: 1,
    166: 1,
    179: 1,
    189: 1,
    193: 1,
    194: 1,
    209: 1,
    219: 1,
    237: 1,
    243: 1,
    244: 1,
    246: 1,
    249: 1,
    255: -1,
}
"""Units in the last place by which it is off, by the 8 bits of the mantissa, the leading one included."""
_OFF = torch.tensor([OFF.get(mantissa, 0) for mantissa in range(128, 256)], dtype=torch.int32)


def approximate_reciprocal(values: Tensor) -> Tensor:
    """1 / x in fp32, as the GPU has it where x is a bf16 number; elsewhere to the nearest. Subnormal results are zero.

    Args:
        values: fp32, positive normal numbers, infinities or NaN.
    """
    nearest = 1.0 / values
    bits = values.view(torch.int32)
    off = _OFF.to(values.device)[(bits >> 16 & 127).long()]
    short = (bits & 0xFFFF) == 0
    normal = nearest >= torch.finfo(torch.float32).tiny
    found = torch.where(short & normal, nearest.view(torch.int32) + off, nearest.view(torch.int32)).view(torch.float32)
    return torch.where(normal | nearest.isnan(), found, 0.0)
