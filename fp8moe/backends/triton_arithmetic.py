"""How our Triton GEMM accumulates, by device and tile height: the instruction that Triton chooses, and its arithmetic.

Triton compiles one source to different instructions. On Hopper and Blackwell a tile of 16 rows is widened to fp16 and
goes through `mma.sync`, and one of 64 through `wgmma` or `tcgen05.mma`; so the tile height, which follows from the
batch size, decides the bits. Figures: the units' fraction bits and group lengths as measured on Hopper and as
MMA-Sim (arXiv 2511.10909) gives them for the others.
"""

from __future__ import annotations

from fp8moe.platforms import Platform
from fp8moe.recipe import FP32, Arithmetic

SMALL_TILE = 16
LARGE_TILE = 64

_PROMOTION = 128  # the GEMM starts each 128 of K, one scale block, from zero


def _unit(name: str, fraction_bits: int, group: int) -> Arithmetic:
    return Arithmetic(name, fraction_bits, group, promote_every=_PROMOTION)


_ADA = _unit("ada.mma", 13, 16)
_RTX_BLACKWELL = _unit("rtx_blackwell.mma", 25, 32)

# Architecture, or family of ten capabilities, to the arithmetic at each tile height.
_ARITHMETIC: dict[str, dict[int, Arithmetic]] = {
    "sm89": {SMALL_TILE: _ADA, LARGE_TILE: _ADA},
    "sm90": {SMALL_TILE: _unit("hopper.mma_f16", 25, 16), LARGE_TILE: _unit("hopper.wgmma", 13, 32)},
    "sm10x": {SMALL_TILE: _unit("blackwell.mma_f16", 25, 16), LARGE_TILE: _unit("blackwell.tcgen05", 25, 32)},
    "sm12x": {SMALL_TILE: _RTX_BLACKWELL, LARGE_TILE: _RTX_BLACKWELL},
}
_INTERPRETER = {SMALL_TILE: FP32, LARGE_TILE: FP32}


def tile_height(pairs: int, experts: int) -> int:
    """Rows of a tile for a call with `pairs` token-expert pairs on `experts` local experts: SMALL_TILE or LARGE_TILE.

    A small tile while an expert has no more than SMALL_TILE pairs on average: a larger one would be mostly padding.
    """
    return SMALL_TILE if pairs <= SMALL_TILE * experts else LARGE_TILE


def arithmetic_by_tile(platform: Platform, interpreted: bool) -> dict[int, Arithmetic] | None:
    """Tile height to arithmetic, or None where the device's is not known."""
    if interpreted:
        return _INTERPRETER
    family = f"sm{platform.cap // 10}x" if platform.is_cuda and platform.cap is not None else ""
    return _ARITHMETIC.get(platform.architecture) or _ARITHMETIC.get(family)
