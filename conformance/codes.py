"""Tables of e4m3fn codes to draw weights from: 65,536 entries each, so that 16 random bits choose one.

Weights are drawn as codes, never as wide numbers that are quantised afterwards: it takes a byte an element and one
look-up. The rounding here is to the nearest value by its definition, and shares no code with what is judged.
"""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

TABLE_SIZE = 1 << 16
LARGEST_CODE = 0x7E  # 448; 0x7F is NaN
SIGN = 0x80
GAUSSIAN_DEVIATION = 112.0
"""In units of the scale: 448 is four deviations, about the largest of a block of 128 x 128 Gaussian numbers."""
GRID_STEPS = 16
GRID_STEP = 2.0**-9  # the smallest subnormal
SMALL_INTEGERS = 7


def code_value(code: int) -> float:
    """The number that an e4m3fn code from 0 to 0x7E stands for."""
    exponent, mantissa = divmod(code, 8)
    return mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10)


@lru_cache(maxsize=1)
def decoded() -> Tensor:
    """(256,) fp32: the number of every code."""
    magnitudes = torch.tensor([code_value(code) for code in range(LARGEST_CODE + 1)] + [math.nan])
    return torch.cat([magnitudes, -magnitudes])


@lru_cache(maxsize=8)
def gaussian(positive: bool = False) -> Tensor:
    """Quantiles of a Gaussian of deviation 112, rounded to the nearest code, saturating at 448."""
    half = TABLE_SIZE // 2
    values = [code_value(code) for code in range(LARGEST_CODE + 1)]
    below = [0]
    for smaller, larger in pairwise(values):
        middle = (smaller + larger) / 2
        below.append(round(half * math.erf(middle / (GAUSSIAN_DEVIATION * math.sqrt(2)))))
    below.append(half)
    counts = torch.tensor(below).diff()
    return _both_signs(torch.arange(len(values)).repeat_interleave(counts), positive)


@lru_cache(maxsize=1)
def subnormal_grid() -> Tensor:
    """Multiples of 2^-9 from -15 to 15 of them: zero, all subnormals, and the first normal binade."""
    return _both_signs(torch.arange(TABLE_SIZE // 2) % GRID_STEPS, False)


@lru_cache(maxsize=1)
def small_integers() -> Tensor:
    """Half zeros, half whole numbers from -7 to 7 other than 0: their products are whole, and so are their sums."""
    codes = {code_value(code): code for code in range(LARGEST_CODE + 1)}
    whole = torch.tensor([codes[float(number)] for number in range(1, SMALL_INTEGERS + 1)])
    places = torch.arange(TABLE_SIZE // 2)
    return _both_signs(torch.where(places % 2 == 0, 0, whole[places // 2 % SMALL_INTEGERS]), False)


@lru_cache(maxsize=1)
def ones_and_twos() -> Tensor:
    """1 and 2, either sign."""
    codes = {code_value(code): code for code in range(LARGEST_CODE + 1)}
    return _both_signs(torch.tensor([codes[1.0], codes[2.0]]).repeat(TABLE_SIZE // 4), False)


def _both_signs(magnitudes: Tensor, positive: bool) -> Tensor:
    return torch.cat([magnitudes, magnitudes if positive else magnitudes | SIGN]).to(torch.uint8)
