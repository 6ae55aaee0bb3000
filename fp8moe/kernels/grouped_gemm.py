"""Grouped FP8 GEMM with block scales: each token-expert pair's row times its expert's weight, transposed."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp8moe.kernels.align import Alignment
from fp8moe.kernels.widths import to_float32

BLOCK = 128
"""Side of a weight's scale block, width of an activation's scale group, and the columns of a program's tile."""


@triton.jit(do_not_specialize=["tiles", "pairs_per_row"])
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
    HAS_BIAS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tile = tl.program_id(0) % tiles
    expert = tl.load(tile_experts + tile).to(tl.int64)
    if expert < 0:
        return
    pair = tl.load(pairs + tile * TILE_ROWS + tl.arange(0, TILE_ROWS))
    has_pair = pair >= 0
    pair = tl.where(has_pair, pair, 0)
    row = (pair // pairs_per_row).to(tl.int64)

    # W's rows come in parts (gate, up) whose blocks are counted apart, so a column tile lies within one part,
    # and within one row of scale blocks.
    column_tile = tl.program_id(0) // tiles
    blocks = tl.cdiv(part_columns, BLOCK)
    in_part = (column_tile % blocks) * BLOCK + tl.arange(0, BLOCK)
    in_range = in_part < part_columns
    column = ((column_tile // blocks) * part_columns + in_part).to(tl.int64)

    k = tl.arange(0, BLOCK)
    a_block = a + row[:, None] * stride_a_row + k.to(tl.int64)[None, :] * stride_a_k
    w_block = w + expert * stride_w_expert + column[None, :] * stride_w_n + k.to(tl.int64)[:, None] * stride_w_k
    a_scale_block = a_scale + row * stride_a_scale_row
    w_scale_block = w_scale + expert * stride_w_scale_expert + column_tile.to(tl.int64) * stride_w_scale_n
    total = tl.zeros((TILE_ROWS, BLOCK), dtype=tl.float32)
    for start in range(0, k_size, BLOCK):
        in_k = k < k_size - start
        x = tl.load(a_block, mask=has_pair[:, None] & in_k[None, :], other=0.0)
        y = tl.load(w_block, mask=in_k[:, None] & in_range[None, :], other=0.0)
        x_scale = tl.load(a_scale_block, mask=has_pair, other=0.0)
        y_scale = tl.load(w_scale_block)
        # A chain over exactly 128 of K from zero: longer ones lose bits on Hopper, whose sum holds 14.
        product = tl.dot(x, y) * x_scale[:, None]
        total = tl.fma(product, tl.full(product.shape, 1.0, tl.float32) * y_scale, total)
        a_block += BLOCK * stride_a_k
        w_block += BLOCK * stride_w_k
        a_scale_block += stride_a_scale_k
        w_scale_block += stride_w_scale_k

    if HAS_BIAS:
        added = tl.load(bias + expert * stride_bias_expert + column * stride_bias_n, mask=in_range, other=0.0)
        total += to_float32(added)[None, :]
    c_tile = c + pair.to(tl.int64)[:, None] * stride_c_row + column[None, :]
    tl.store(c_tile, total, mask=has_pair[:, None] & in_range[None, :])


def grouped_gemm(
    a: Tensor,
    a_scale: Tensor,
    w: Tensor,
    w_scale: Tensor,
    alignment: Alignment,
    *,
    pairs_per_row: int,
    parts: int = 1,
    bias: Tensor | None = None,
) -> Tensor:
    """C[pair] = A[pair // pairs_per_row] @ W[expert of the pair]^T, then plus the expert's bias.

    Recipe, for each output and each 128 of K in order: c = the matrix unit's sum from zero, t = fp32(c * a_scale),
    total = fma(t, w_scale, total). The bias is added in fp32.

    Args:
        a: (rows, K) float8_e4m3fn; any strides, fastest with K contiguous and a multiple of 16.
        a_scale: (rows, ceil(K / 128)) fp32.
        w: (E, N, K) float8_e4m3fn, as `a`.
        w_scale: (E, parts * ceil(N / parts / 128), ceil(K / 128)) fp32: each part of N is blocked apart.
        alignment: which pairs are whose; its `tile_rows` is a power of two of at least 16.
        pairs_per_row: top-k where `a` has a row for each token, 1 where it has one for each pair.
        bias: (E, N) fp32, fp16 or bf16.

    Returns:
        (P, N) fp32, row-major. Rows of pairs without a local expert are not written.
    """
    _, columns, k_size = w.shape
    part_columns = columns // parts
    c = torch.empty((alignment.local_ids.numel(), columns), dtype=torch.float32, device=a.device)
    # Tiles fastest: programs that run together share a column tile, and an expert's tiles are neighbours, so each
    # block of W is fetched while it is hot; A is small and stays in the cache.
    grid = alignment.tiles * parts * triton.cdiv(part_columns, BLOCK)
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
            part_columns,
            k_size,
            pairs_per_row,
            a.stride(0),
            a.stride(1),
            a_scale.stride(0),
            a_scale.stride(1),
            w.stride(0),
            w.stride(1),
            w.stride(2),
            w_scale.stride(0),
            w_scale.stride(1),
            w_scale.stride(2),
            0 if bias is None else bias.stride(0),
            0 if bias is None else bias.stride(1),
            c.stride(0),
            HAS_BIAS=bias is not None,
            TILE_ROWS=alignment.tile_rows,
            BLOCK=BLOCK,
            num_warps=4,
            num_stages=3,
            enable_fp_fusion=False,
        )
    return c
