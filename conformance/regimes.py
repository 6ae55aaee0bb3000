"""Value regimes: what hidden states, weight codes and scales look like, and the faults that they make visible.

A regime is data: how hidden states are drawn, which table weight codes come from, how scales differ from one another,
and the typical sizes, from which scales are set so that outputs are of order one (where the regime lets them be).
Arithmetic is exact or rounds once, so the numbers are the same on every device.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from conformance import codes
from conformance.draw import Draw

GROUP = 128
OUTLIER = 32.0
OUTLIER_ONE_IN = 64
LOUD = {"bf16": 1000.0, "fp16": 16.0}  # the output grows with its square, and fp16 ends at 65,504
QUIET = 1 / 1000
OVERFLOWING = 2000.0
ZERO_GROUP_ONE_IN = 4
SCALE_BINADES = (-5, 5)
SUBNORMAL_EXPONENTS = {"bf16": (8, 0, -12, -24), "fp16": (8, 4, 0, -4)}
SUBNORMAL_SHARE = 2.0**-6 / 448  # of a group's amax: what quantises to a subnormal
GRID_PEAK = 7  # 7/4 = 1.75, whose continuous scale 1.75/448 is a power of two
FAINT = 1e-4
TIE_STEPS = 16  # of a binade: FP8 has the even ones, and the odd ones lie exactly between two codes
TIE_BINADES = (4, 8)  # of a value over its scale: below the anchor, 448, and far above subnormals
TIE_GROUPS = 3  # binades that the groups' amax are in
ANCHOR_STEPS, ANCHOR_BINADE = 28, 8  # 28/16 * 2^8 = 448
WIDE_BINADES = 12
"""Between the loudest and the quietest channels of a group: those of an FP8 number from 2^-6 to 448 are 15."""
NEAR_LIMIT = (448.0, 416.0, 288.0, 256.0, 240.0, 224.0)
"""Over the scale: the limit of e4m3fn and the code below, what a limit of 256 or 240 (e4m3fnuz) cuts, those, and one
that nothing cuts."""
NEAR_LIMIT_ONE_IN = 8

BINADES_RMS = math.sqrt(sum(4.0**n for n in range(*SCALE_BINADES)) / 10 * 7 / 3)

_TIE_RMS_IN_BINADE = math.sqrt(sum((1 + n / TIE_STEPS) ** 2 for n in range(TIE_STEPS)) / TIE_STEPS)
_TIE_BINADES_RMS = math.sqrt(sum(4.0**n for n in range(*TIE_BINADES)) / (TIE_BINADES[1] - TIE_BINADES[0]))
_TIE_GROUPS_RMS = math.sqrt(sum(4.0**n for n in range(TIE_GROUPS)) / TIE_GROUPS)
TIES_RMS = _TIE_RMS_IN_BINADE * _TIE_BINADES_RMS * _TIE_GROUPS_RMS * 2.0**-ANCHOR_BINADE
WIDE_RMS = math.sqrt(sum(4.0 ** -(n + (WIDE_BINADES - n) // 2) for n in range(WIDE_BINADES + 1)) / (WIDE_BINADES + 1))
"""Of a channel and its weights together, over the loudest of either."""
_LIMIT_SQUARE = sum(value**2 for value in NEAR_LIMIT) / len(NEAR_LIMIT) * 4.0**-8
NEAR_LIMIT_RMS = math.sqrt((_LIMIT_SQUARE + (NEAR_LIMIT_ONE_IN - 1) * 4.0**-3) / NEAR_LIMIT_ONE_IN)

HiddenLaw = Callable[[Draw, int, int, str], Tensor]
"""(draw, M, H, dtype name) to (M, H) fp32."""
ScaleLaw = Callable[[Draw, str, tuple[int, ...]], Tensor]
"""(draw, stream name, shape) to positive fp32 factors of a common scale."""


def _groups(tokens: int, hidden: int) -> tuple[int, int]:
    return tokens, -(-hidden // GROUP)


def _spread(by_group: Tensor, hidden: int) -> Tensor:
    return by_group.repeat_interleave(GROUP, dim=1)[:, :hidden]


def power_of_two(exponent: Tensor) -> Tensor:
    """fp32, of whole exponents from -126 to 127, by its bits: a device's own power need not be exact."""
    return ((exponent + 127) << 23).to(torch.int32).view(torch.float32)


def plain_hidden(draw: Draw, tokens: int, hidden: int, dtype: str) -> Tensor:
    return draw.normal("hidden", (tokens, hidden))


def grouped_hidden(draw: Draw, tokens: int, hidden: int, dtype: str) -> Tensor:
    factors = draw.binades("hidden_groups", _groups(tokens, hidden), *SCALE_BINADES)
    return draw.normal("hidden", (tokens, hidden)) * _spread(factors, hidden)


def outlier_hidden(draw: Draw, tokens: int, hidden: int, dtype: str) -> Tensor:
    factors = torch.ones(hidden, device=draw.device)
    factors[draw.integers("outliers", (max(1, hidden // OUTLIER_ONE_IN),), hidden)] = OUTLIER
    return draw.normal("hidden", (tokens, hidden)) * factors


def loud_quiet_hidden(draw: Draw, tokens: int, hidden: int, dtype: str) -> Tensor:
    kinds = torch.tensor([LOUD[dtype], 1.0, QUIET], device=draw.device)
    first = draw.integers("first_kind", (1,), 3)
    return draw.normal("hidden", (tokens, hidden)) * kinds[(torch.arange(tokens, device=draw.device) + first) % 3, None]


def overflowing_hidden(draw: Draw, tokens: int, hidden: int, dtype: str) -> Tensor:
    """Every third token's outputs grow with the square of this: past fp16's largest number, far within bf16's."""
    factors = torch.tensor([OVERFLOWING, 1.0, 1.0], device=draw.device)
    return draw.normal("hidden", (tokens, hidden)) * factors[torch.arange(tokens, device=draw.device) % 3, None]


def zero_hidden(draw: Draw, tokens: int, hidden: int, dtype: str) -> Tensor:
    shape = _groups(tokens, hidden)
    kept = draw.integers("zero_groups", shape, ZERO_GROUP_ONE_IN) > 0
    token = torch.arange(tokens, device=draw.device)
    kept[token, token % shape[1]] = True
    if shape[1] > 1:
        kept[token, (token + 1) % shape[1]] = False
    if tokens > 1:
        kept[tokens // 2] = False
    return draw.normal("hidden", (tokens, hidden)) * _spread(kept.float(), hidden)


def subnormal_hidden(draw: Draw, tokens: int, hidden: int, dtype: str) -> Tensor:
    """The first channel of a group has its amax; `weights.py` gives it no weight, so that the rest shows."""
    exponents = torch.tensor([2.0**n for n in SUBNORMAL_EXPONENTS[dtype]], device=draw.device)
    values = (2.0 * draw.uniform("hidden", (tokens, hidden)) - 1.0) * SUBNORMAL_SHARE
    anchors = values[:, ::GROUP]
    anchors.copy_(draw.sign("anchors", tuple(anchors.shape)))
    return values * exponents[torch.arange(tokens, device=draw.device) % 4, None]


def positive_hidden(draw: Draw, tokens: int, hidden: int, dtype: str) -> Tensor:
    return draw.normal("hidden", (tokens, hidden)).abs()


def grid_hidden(draw: Draw, tokens: int, hidden: int, dtype: str) -> Tensor:
    """Quarters from -1.75 to 1.75, half of them 0; a group's first is 1.75."""
    steps = draw.integers("hidden", (tokens, hidden), 2 * GRID_PEAK + 1) - GRID_PEAK
    values = steps * draw.integers("sparse", (tokens, hidden), 2)
    values[:, ::GROUP] = GRID_PEAK
    return values.float() * 0.25


def one_hot_hidden(draw: Draw, tokens: int, hidden: int, dtype: str) -> Tensor:
    values = torch.zeros(tokens, hidden, device=draw.device)
    channel = draw.integers("channel", (tokens, 1), hidden)
    return values.scatter_(1, channel, draw.sign("sign", (tokens, 1)) * draw.binades("value", (tokens, 1), -1, 1))


def single_block_hidden(draw: Draw, tokens: int, hidden: int, dtype: str) -> Tensor:
    """Each token has one group that is not zero, the next token the next one."""
    groups = -(-hidden // GROUP)
    first = draw.integers("first_group", (1,), groups)
    mine = (torch.arange(tokens, device=draw.device)[:, None] + first) % groups
    kept = torch.arange(groups, device=draw.device) == mine
    return draw.normal("hidden", (tokens, hidden)) * _spread(kept.float(), hidden)


def ties_hidden(draw: Draw, tokens: int, hidden: int, dtype: str) -> Tensor:
    """Sixteenths of binades: over the scale, 1.75 * 2^n / 448 = 2^(n - 8), a power of two, half of them are ties.

    Groups differ by powers of two, so that a scale that is shared by more than a group is one, too.
    """
    steps = TIE_STEPS + draw.integers("hidden", (tokens, hidden), TIE_STEPS)
    binade = TIE_BINADES[0] + draw.integers("binade", (tokens, hidden), TIE_BINADES[1] - TIE_BINADES[0])
    steps[:, ::GROUP], binade[:, ::GROUP] = ANCHOR_STEPS, ANCHOR_BINADE
    level = draw.integers("level", _groups(tokens, hidden), TIE_GROUPS) - ANCHOR_BINADE
    values = steps.float() / TIE_STEPS * power_of_two(binade + _spread(level, hidden))
    return values * draw.sign("sign", (tokens, hidden))


def wide_hidden(draw: Draw, tokens: int, hidden: int, dtype: str) -> Tensor:
    """Channels of a group over 12 binades, the same in every token; `weights.py` has louder weights for quiet ones."""
    return draw.normal("hidden", (tokens, hidden)) * power_of_two(-wide_channel(hidden, draw.device))


def wide_channel(hidden: int, device: torch.device) -> Tensor:
    """(H,) int64 binades from 0 to 12 that a channel is quieter by."""
    return torch.arange(hidden, device=device) % (WIDE_BINADES + 1)


def near_limit_hidden(draw: Draw, tokens: int, hidden: int, dtype: str) -> Tensor:
    """Over the scale, which is a power of two: a group's first is 448, one in 8 is a `NEAR_LIMIT`, others are small."""
    limits = torch.tensor(NEAR_LIMIT, device=draw.device)
    loud = limits[draw.integers("limit", (tokens, hidden), len(limits))] * draw.sign("sign", (tokens, hidden))
    near = draw.integers("near", (tokens, hidden), NEAR_LIMIT_ONE_IN) == 0
    near[:, ::GROUP] = True
    loud[:, ::GROUP] = loud[:, ::GROUP].sign() * NEAR_LIMIT[0]
    return torch.where(near, loud * 2.0**-8, draw.normal("hidden", (tokens, hidden)) * 2.0**-3)


def near_one(draw: Draw, name: str, shape: tuple[int, ...]) -> Tensor:
    """Within an eighth of 1, with full mantissas."""
    return 0.875 + 0.25 * draw.uniform(name, shape)


def binades(draw: Draw, name: str, shape: tuple[int, ...]) -> Tensor:
    """Log-uniform from 2^-5 to 2^5."""
    return draw.binades(name, shape, *SCALE_BINADES)


def bimodal(draw: Draw, name: str, shape: tuple[int, ...]) -> Tensor:
    """About 1 or about 1e-4, the same along a row."""
    faint = draw.integers(f"{name}/faint", (*shape[:-1], 1) if len(shape) > 1 else shape, 2) == 0
    factors = near_one(draw, name, shape)
    return torch.where(faint, factors * FAINT, factors)


def ones(draw: Draw, name: str, shape: tuple[int, ...]) -> Tensor:
    return torch.ones(shape, device=draw.device)


@dataclass(frozen=True)
class Regime:
    """One value regime.

    Args:
        meaning: in one line.
        hidden: draws the hidden states.
        hidden_size: typical magnitude of their elements.
        table: weight codes are drawn from it.
        code_size: typical magnitude of a code.
        scales: how a layer's scales differ, by tensor, channel or block.
        scale_size: typical size of those factors.
        reach: how a sum over K terms grows with K: "root" (signs at random), "all" (one sign), "one" (a single term),
            "group" (a single group, signs at random).
        gate_over_up: the gate's scales over the up's.
        powers_of_two: the common scale is one, too.
        zero_blocks: some 128 x 128 blocks, and one expert of several, are zero.
        anchors: the first column of each 128 of w13 is zero.
        one_in: of each row of a weight only every so many columns are not zero.
        wide: the intermediate's elements, and w2's columns against them, lie over 12 binades within a group.
    """

    meaning: str
    hidden: HiddenLaw = plain_hidden
    hidden_size: float = 1.0
    table: Callable[[], Tensor] = codes.gaussian
    code_size: float = codes.GAUSSIAN_DEVIATION
    scales: ScaleLaw = near_one
    scale_size: float = 1.0
    reach: str = "root"
    gate_over_up: float = 1.0
    powers_of_two: bool = False
    zero_blocks: bool = False
    anchors: bool = False
    one_in: int = 1
    wide: bool = False


REGIMES: dict[str, Regime] = {
    "iid": Regime("independent and alike: faults of precision, lost terms"),
    "block_scales": Regime(
        "scales of weights and activation groups log-uniform over 2^-5 to 2^5, gate 16 times up: exchanged scales",
        hidden=grouped_hidden,
        hidden_size=BINADES_RMS,
        scales=binades,
        scale_size=BINADES_RMS,
        gate_over_up=16.0,
    ),
    "outlier_channels": Regime(
        "one channel in 64 is 32 times as large in every token: small values beside large ones in a group",
        hidden=outlier_hidden,
        hidden_size=math.sqrt(1 + OUTLIER**2 / OUTLIER_ONE_IN),
    ),
    "loud_quiet": Regime(
        "tokens times 1000, 1 and 1/1000 in turn (16 in fp16): whatever one token's values do to another's",
        hidden=loud_quiet_hidden,
    ),
    "zero_blocks": Regime(
        "zero groups, a zero token, zero weight blocks with scales of 0 and 2^-76, a zero expert: 0/0",
        hidden=zero_hidden,
        zero_blocks=True,
    ),
    "subnormals": Regime(
        "activations and weights in FP8's subnormal range, large to tiny amax: flushed subnormals, the amax's floor",
        hidden=subnormal_hidden,
        hidden_size=2.0**8 * SUBNORMAL_SHARE / math.sqrt(3),
        table=codes.subnormal_grid,
        code_size=codes.GRID_STEP * math.sqrt(sum(n * n for n in range(codes.GRID_STEPS)) / codes.GRID_STEPS),
        anchors=True,
    ),
    "same_sign": Regime(
        "no negative hidden state or weight: accumulators that lose small terms",
        hidden=positive_hidden,
        hidden_size=0.8,
        table=lambda: codes.gaussian(positive=True),
        code_size=0.8 * codes.GAUSSIAN_DEVIATION,
        reach="all",
    ),
    "exact_grid": Regime(
        "small whole numbers and powers of two, half zeros: the first GEMM is exact, and any error is gross",
        hidden=grid_hidden,
        hidden_size=0.75,
        table=codes.small_integers,
        code_size=3.0,
        scales=ones,
        powers_of_two=True,
    ),
    "one_hot": Regime(
        "one non-zero channel a token: reads single weights",
        hidden=one_hot_hidden,
        reach="one",
    ),
    "bimodal_scales": Regime(
        "scales about 1e-4 of one another by rows of blocks, channel or expert, as checkpoints have them",
        scales=bimodal,
        scale_size=0.7,
    ),
    # Eight products of a block of 128 are not zero, each at most 2 * 448 and a multiple of 2^-9: 22 bits hold any sum.
    "exact_sums": Regime(
        "weights of +-1 and +-2, one column in 16: sums of FP8 products are exact in any order, so that bits can be "
        "compared where the order is not known",
        table=codes.ones_and_twos,
        code_size=math.sqrt(2.5 / 16),
        one_in=16,
    ),
    "single_block": Regime(
        "one group of 128 channels a token is not zero, scales log-uniform: blocks of K that louder ones would hide",
        hidden=single_block_hidden,
        scales=binades,
        scale_size=BINADES_RMS / 2,  # most single blocks are quieter than many together
        reach="group",
    ),
    "ties": Regime(
        "scales are powers of two and half of the activations lie exactly between two FP8 codes: rounding modes",
        hidden=ties_hidden,
        hidden_size=TIES_RMS,
    ),
    "wide_groups": Regime(
        "channels and the intermediate over 2^12 within a group, quiet ones with loud weights: limits and granularity "
        "under power-of-two scales",
        hidden=wide_hidden,
        hidden_size=2.0**WIDE_BINADES * WIDE_RMS,
        code_size=codes.GAUSSIAN_DEVIATION * 2.0**-WIDE_BINADES,
        wide=True,
    ),
    "near_limit": Regime(
        "values at the limits 448, 256 and 240 of the FP8 formats and just above them: early saturation",
        hidden=near_limit_hidden,
        hidden_size=NEAR_LIMIT_RMS,
    ),
    "overflow": Regime(
        "every third token is 2000 times as loud: its outputs pass fp16's range, where they must become infinite",
        hidden=overflowing_hidden,
    ),
}
