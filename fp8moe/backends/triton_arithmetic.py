"""How our Triton GEMM accumulates, by device and tile height: the instruction that Triton chooses, and its arithmetic.

Triton compiles one source to different instructions. On Hopper and Blackwell a tile of 16 rows goes through `mma.sync`,
FP8 widened to fp16 first, and one of 64 through `wgmma` or `tcgen05.mma`; so the tile height, which follows from the
batch size, decides the bits. What the units do is in `fp8moe.reference.units`.
"""

from __future__ import annotations

from fp8moe.platforms import Platform
from fp8moe.recipe import FP32, Arithmetic

SMALL_TILE = 16
LARGE_TILE = 64

PROMOTION = 128
"""Terms of K after which the FP8 GEMM adds the unit's sum to an fp32 total: one scale block. 16-bit GEMMs never do."""

# Architecture, or family of ten capabilities: the unit at each tile height, for FP8 and for 16-bit operands.
_FP8_UNITS: dict[str, tuple[str, str]] = {
    "sm89": ("ada.mma", "ada.mma"),
    "sm90": ("hopper.mma_f16", "hopper.wgmma"),
    "sm10x": ("blackwell.mma_f16", "blackwell.tcgen05"),
    "sm12x": ("rtx_blackwell.mma", "rtx_blackwell.mma"),
}
_16_BIT_UNITS: dict[str, tuple[str, str]] = {
    "sm8x": ("ampere.mma_f16", "ampere.mma_f16"),
    "sm89": ("ada.mma_f16", "ada.mma_f16"),
    "sm90": ("hopper.mma_f16", "hopper.wgmma_f16"),
    "sm10x": ("blackwell.mma_f16", "blackwell.tcgen05_f16"),
    "sm12x": ("rtx_blackwell.mma_f16", "rtx_blackwell.mma_f16"),
}


def tile_height(pairs: int, experts: int) -> int:
    """Rows of a tile for a call with `pairs` token-expert pairs over `experts` experts, all ranks' of both.

    A small tile while an expert has no more than SMALL_TILE pairs on average: a larger one would be mostly padding.
    How many pairs this rank has would need a look at the device, so the average over all ranks stands for it.
    """
    return SMALL_TILE if pairs <= SMALL_TILE * experts else LARGE_TILE


def arithmetic_by_tile(platform: Platform, interpreted: bool, fp8: bool = True) -> dict[int, Arithmetic] | None:
    """Tile height to arithmetic of FP8 or 16-bit GEMMs, or None where the device's is not known."""
    if interpreted:
        return dict.fromkeys((SMALL_TILE, LARGE_TILE), Arithmetic(promote_every=PROMOTION) if fp8 else FP32)
    family = f"sm{platform.cap // 10}x" if platform.is_cuda and platform.cap is not None else ""
    units = _FP8_UNITS if fp8 else _16_BIT_UNITS
    names = units.get(platform.architecture) or units.get(family)
    if names is None:
        return None
    return {height: _arithmetic(name, fp8) for height, name in zip((SMALL_TILE, LARGE_TILE), names, strict=True)}


def _arithmetic(unit: str, fp8: bool) -> Arithmetic:
    if not fp8:
        return Arithmetic.on(unit)
    widened = unit.endswith("_f16")
    return Arithmetic.on(unit, promote_every=PROMOTION, k_order="fours_halved" if widened else "natural")
