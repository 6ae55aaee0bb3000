"""Grouped GEMM: each token-expert pair's row times its expert's weight, transposed; FP8 with scales, bf16 or fp16."""

from dataclasses import dataclass, replace
from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp8moe.kernels.align import Alignment
from fp8moe.kernels.interpreter import INTERPRETED
from fp8moe.kernels.widths import to_float32

Scales = Literal["block", "row", "none"]
BLOCK = 128
"""Side of a weight's scale block, width of an activation's scale group, and the most columns of a program's tile."""
WIDE_BLOCK = 64
"""The step along K for operands of two bytes: as many bytes of shared memory as 128 of FP8."""
NARROW = 32
"""The fewest columns of a program's tile."""
PROGRAMS_EACH = 8
"""For each multiprocessor, so that the last ones do not leave most of them idle; fewer, and tiles are made narrower."""
MOST_PROGRAMS = 2**31 - 1
"""The most programs that a grid's first dimension holds."""


def columns_of_tile(tiles: int, columns: int, device: torch.device) -> int:
    """Of a program, a power of two: fewer than a block of scales where the multiprocessors would wait for work."""
    if device.type != "cuda":
        return BLOCK
    most = PROGRAMS_EACH * torch.cuda.get_device_properties(device).multi_processor_count
    each = BLOCK
    while each > NARROW and tiles * columns < most * each:
        each //= 2
    return each


@dataclass(frozen=True)
class Program:
    """How a program has its tile. No bit depends on it.

    Args:
        columns: of the tile, a power of two.
        stages: of the loads along K.
        warps: of the program.
        together: tiles of rows that take all columns before the next ones begin.
    """

    columns: int
    stages: int
    warps: int
    together: int = MOST_PROGRAMS

    def shared(self, rows: int) -> int:
        """Bytes of shared memory that its loads of FP8 take, in a tile of so many rows."""
        return self.stages * (rows + self.columns) * BLOCK


FEW_ROWS = 16
"""Rows of a tile whose weights are all that is waited for."""
NARROWEST, USUAL, WIDEST = Program(32, 5, 4), Program(64, 4, 2), Program(128, 3, 4)
"""With such tiles and block scales: for fewer programs than multiprocessors; for most; where these many fit all at once
and the usual do not, and for short sums. Both GEMMs of four layers with 1 and 16 tokens take up to a quarter less than
with the usual alone (an H200, reports/h200/2026-11-29-policy/tune.txt and 2026-11-30-begin/tune.txt)."""
HOPPER_SHARED = 228 * 1024
"""Bytes of shared memory of a multiprocessor of an H100 or H200."""
SHORT = 512
"""Up to so many terms a sum is short."""
FEW_BY_ROW = Program(64, 5, 4)
"""With such tiles and a scale for each row, but for short sums, which take a tenth less with the usual program (an
H200, reports/h200/2026-11-30-begin/tune-row.txt)."""
TOGETHER = 8
"""Tiles of many rows that take all columns before the next ones begin, where no other expert's tile reads their rows,
or where an expert has few tiles: what they read of A, and write of C, is read and written while it is in the cache. The
second GEMM takes up to 23% less than with all together (an H200, reports/h200/2026-11-30-order/tune.txt)."""
FEW_TILES = 3
"""Of an expert, on average, up to which weights are most of what is waited for."""
OF_SHORT, DEEP, SHALLOW = Program(64, 3, 4), Program(128, 4, 4), Program(128, 3, 4)
"""With tiles of many rows of FP8: for short sums of rows of their own; where weights are waited for, or rows of their
own, and a multiprocessor holds two; else. From the same measurements."""


def program_of(
    alignment: Alignment,
    experts: int,
    parts: int,
    part_columns: int,
    k_size: int,
    scales: Scales,
    device: torch.device,
    *,
    own_rows: bool,
) -> Program:
    """Of a call's tiles.

    Args:
        experts: whose weights there are.
        own_rows: whether each pair has its row of A, which no other expert's tile reads.
    """
    tiles = alignment.likely or alignment.tiles
    few = alignment.tile_rows == FEW_ROWS
    if device.type == "cuda" and few and scales != "none":
        if scales == "row":
            return USUAL if k_size <= SHORT else FEW_BY_ROW
        processors = torch.cuda.get_device_properties(device).multi_processor_count
        return few_by_block(tiles * parts, part_columns, k_size, processors)
    columns = columns_of_tile(tiles, parts * part_columns, device)
    if device.type != "cuda" or few:
        return replace(SHALLOW, columns=columns)
    return many(
        tiles,
        alignment.tile_rows,
        experts,
        columns,
        k_size,
        own_rows=own_rows,
        fp8=scales != "none",
        # Older torch does not tell it on ROCm, where no device has enough for more stages.
        shared=getattr(torch.cuda.get_device_properties(device), "shared_memory_per_multiprocessor", 0),
    )


def few_by_block(tiles: int, columns: int, k_size: int, processors: int) -> Program:
    """Of tiles of few rows, each as wide as `columns`, with block scales."""
    usual, widest = (tiles * triton.cdiv(columns, each.columns) for each in (USUAL, WIDEST))
    most_usual, most_widest = (processors * (HOPPER_SHARED // each.shared(FEW_ROWS)) for each in (USUAL, WIDEST))
    if usual < processors:
        return NARROWEST
    if usual > most_usual and (widest <= most_widest or k_size <= SHORT):
        return WIDEST
    return USUAL


def many(
    tiles: int, rows: int, experts: int, columns: int, k_size: int, *, own_rows: bool, fp8: bool, shared: int
) -> Program:
    """Of tiles of many rows, on a device whose multiprocessors have `shared` bytes of shared memory; where `columns` is
    less than a block, of no more columns."""
    chosen = SHALLOW
    together = own_rows or tiles <= FEW_TILES * experts
    if fp8 and columns == BLOCK:
        if own_rows and k_size <= SHORT:
            chosen = OF_SHORT
        elif together and 2 * DEEP.shared(rows) <= shared:
            chosen = DEEP
    return replace(chosen, columns=min(chosen.columns, columns), together=TOGETHER if together else MOST_PROGRAMS)


@triton.jit(do_not_specialize=["tiles", "tiles_together", "pairs_per_row"])
def grouped_gemm_kernel(
    a,
    a_scale,
    w,
    w_scale,
    bias,
    c,
    pairs,
    tile_experts,
    tiles,
    tiles_together,
    part_columns,
    k_size,
    pairs_per_row,
    stride_a_row,
    stride_a_k,
    stride_a_scale_row,
    stride_a_scale_k,
    stride_w_expert,
    stride_w_n,
    stride_w_k,
    stride_w_scale_expert,
    stride_w_scale_n,
    stride_w_scale_k,
    stride_bias_expert,
    stride_bias_n,
    stride_c_row,
    SCALES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # A few tiles take all columns before the next ones begin. Of those, tiles are fastest: programs that run together
    # share a column tile, and an expert's tiles are neighbours, so each block of W is fetched while it is hot.
    programs = tiles_together * (tl.num_programs(0) // tiles)
    first_tile, number = tl.program_id(0) // programs * tiles_together, tl.program_id(0) % programs
    together = tl.minimum(tiles - first_tile, tiles_together)
    tile = (first_tile + number % together).to(tl.int64)
    expert = tl.load(tile_experts + tile).to(tl.int64)
    if expert < 0:
        return
    pair = tl.load(pairs + tile * TILE_ROWS + tl.arange(0, TILE_ROWS))
    has_pair = pair >= 0
    pair = tl.where(has_pair, pair, 0)
    row = (pair // pairs_per_row).to(tl.int64)

    # W's rows come in parts (gate, up) whose blocks are counted apart, so a column tile lies within one part,
    # and within one row of scale blocks.
    column_tile = number // together
    tiles_of_part = (part_columns + COLUMNS - 1) // COLUMNS
    part, first = column_tile // tiles_of_part, (column_tile % tiles_of_part) * COLUMNS
    in_part = first + tl.arange(0, COLUMNS)
    in_range = in_part < part_columns
    column = (part * part_columns + in_part).to(tl.int64)

    k = tl.arange(0, BLOCK_K)
    a_block = a + row[:, None] * stride_a_row + k.to(tl.int64)[None, :] * stride_a_k
    w_block = w + expert * stride_w_expert + column[None, :] * stride_w_n + k.to(tl.int64)[:, None] * stride_w_k
    a_step = tl.full((), BLOCK_K, tl.int64) * stride_a_k
    w_step = tl.full((), BLOCK_K, tl.int64) * stride_w_k
    if SCALES == "block":
        a_scale_block = a_scale + row * stride_a_scale_row
        block = (part * ((part_columns + BLOCK - 1) // BLOCK) + first // BLOCK).to(tl.int64)
        w_scale_block = w_scale + expert * stride_w_scale_expert + block * stride_w_scale_n
    total = tl.full((TILE_ROWS, COLUMNS), 0.0, tl.float32)
    ones = tl.full((TILE_ROWS, COLUMNS), 1.0, tl.float32)
    for start in range(0, k_size, BLOCK_K):
        in_k = k < k_size - start
        x = tl.load(a_block, mask=has_pair[:, None] & in_k[None, :], other=0.0)
        y = tl.load(w_block, mask=in_k[:, None] & in_range[None, :], other=0.0)
        if SCALES == "none":
            total = tl.dot(x, y, total)
        elif SCALES == "row":
            # A chain over exactly 128 of K from zero: longer ones lose bits on Hopper, whose sum holds 14. Triton
            # would make an addition of `total` the dot's accumulator, but not an fma, which gives the same bits.
            total = tl.fma(tl.dot(x, y), ones, total)
        else:
            x_scale = tl.load(a_scale_block, mask=has_pair, other=0.0)
            y_scale = tl.load(w_scale_block)
            product = tl.dot(x, y) * x_scale[:, None]  # as above, a chain over 128
            total = tl.fma(product, ones * y_scale, total)
            a_scale_block += stride_a_scale_k
            w_scale_block += stride_w_scale_k
        a_block += a_step
        w_block += w_step

    if SCALES == "row":
        x_scale = tl.load(a_scale + row * stride_a_scale_row, mask=has_pair, other=0.0)
        at = w_scale + expert * stride_w_scale_expert + column * stride_w_scale_n
        total = (total * x_scale[:, None]) * tl.load(at, mask=in_range, other=0.0)[None, :]
    if HAS_BIAS:
        added = tl.load(bias + expert * stride_bias_expert + column * stride_bias_n, mask=in_range, other=0.0)
        total += to_float32(added)[None, :]
    c_tile = c + pair.to(tl.int64)[:, None] * stride_c_row + column[None, :]
    tl.store(c_tile, total, mask=has_pair[:, None] & in_range[None, :])


def grouped_gemm(
    a: Tensor,
    a_scale: Tensor | None,
    w: Tensor,
    w_scale: Tensor | None,
    alignment: Alignment,
    *,
    pairs_per_row: int,
    parts: int = 1,
    scales: Scales,
    bias: Tensor | None = None,
) -> Tensor:
    """C[pair] = A[pair // pairs_per_row] @ W[expert of the pair]^T, then plus the expert's bias.

    Recipe, for each output, all in fp32:
        "block": total = 0; for each 128 of K in order: c = the matrix unit's sum from zero, t = c * a_scale,
            total = fma(t, w_scale, total).
        "row": total = 0; for each 128 of K in order: c = the matrix unit's sum from zero, total = total + c. Then
            t = total * a_scale, total = t * w_scale.
        "none": one sum over all of K in the matrix unit, from zero; never promoted.
    Then total + bias. The interpreter widens the operands to fp32, exactly, and sums in an order of its own.

    Args:
        a: (rows, K) float8_e4m3fn, or for "none" bf16 or fp16; any strides, fastest with K contiguous and rows that
            start at multiples of 16 bytes.
        a_scale: (rows, ceil(K / 128)) fp32 for "block", (rows, 1) for "row"; any strides, 0 included.
        w: (E, N, K) of the dtype of `a`, as `a`.
        w_scale: (E, parts * ceil(N / parts / 128), ceil(K / 128)) fp32 for "block", each part of N blocked apart;
            (E, N) for "row"; any strides, 0 included.
        alignment: which pairs are whose; its `tile_rows` is a power of two of at least 16.
        pairs_per_row: top-k where `a` has a row for each token, 1 where it has one for each pair.
        parts: into how many equal parts N falls; the result does not depend on it but for the blocks of "block".
        scales: the layout of the scales; "none": there are none, and `a_scale` and `w_scale` are None.
        bias: (E, N) fp32, fp16 or bf16; any strides.

    Returns:
        (P, N) fp32, row-major. Rows of pairs without a local expert are not written.

    Raises:
        ValueError: 2^31 programs or more.
    """
    experts, columns, k_size = w.shape
    part_columns = columns // parts
    program = program_of(alignment, experts, parts, part_columns, k_size, scales, a.device, own_rows=pairs_per_row == 1)
    grid = alignment.tiles * parts * triton.cdiv(part_columns, program.columns)
    if grid > MOST_PROGRAMS:
        raise ValueError(
            f"{alignment.tiles} tiles of {alignment.tile_rows} rows times N={columns} in tiles of {program.columns}: "
            f"expected no more than {MOST_PROGRAMS} programs in one launch, not {grid}"
        )
    if INTERPRETED:
        # It would take the bits of bf16 for integers, and NaN in FP8 for 480. Exact, and a dot of fp32 is one there.
        a, w = a.float(), w.float()
    c = torch.empty((alignment.local_ids.numel(), columns), dtype=torch.float32, device=a.device)
    if grid:
        grouped_gemm_kernel[(grid,)](
            a,
            a_scale,
            w,
            w_scale,
            bias,
            c,
            alignment.pairs,
            alignment.tile_experts,
            alignment.tiles,
            min(program.together, alignment.tiles),
            part_columns,
            k_size,
            pairs_per_row,
            *a.stride(),
            *_strides(a_scale, 2),
            *w.stride(),
            *_strides(w_scale, 3),
            *_strides(bias, 2),
            c.stride(0),
            SCALES=scales,
            HAS_BIAS=bias is not None,
            TILE_ROWS=alignment.tile_rows,
            COLUMNS=program.columns,
            BLOCK=BLOCK,
            BLOCK_K=WIDE_BLOCK if scales == "none" else BLOCK,
            num_warps=program.warps,
            num_stages=program.stages,
            enable_fp_fusion=False,
        )
    return c


def _strides(x: Tensor | None, dimensions: int) -> tuple[int, ...]:
    """As many strides as there are dimensions, zero where `x` has none."""
    return (0,) * dimensions if x is None else (*x.stride(), *(0,) * (dimensions - x.ndim))
