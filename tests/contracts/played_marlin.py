"""vLLM's Marlin operators, played: as torch computes what they are for, from the layout's definition."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fp8moe.layouts.marlin import EXPONENT_BITS
from tests.unit.test_layouts_marlin import read, unpermuted


def align(
    ids: Tensor, experts: int, rows: int, order: Tensor, owners: Tensor, count: Tensor, placed: Tensor | None
) -> None:
    """Each expert's pairs, filled up to whole tiles with a number that no pair has; experts elsewhere are left out."""
    flat = ids.flatten()
    order.fill_(flat.numel())
    owners.fill_(-1)
    at = 0
    for expert in range(experts):
        local = expert if placed is None else int(placed[expert])
        pairs = (flat == expert).nonzero()[:, 0]
        if local < 0 or not len(pairs):
            continue
        order[at : at + len(pairs)] = pairs.to(torch.int32)
        tiles = -(-len(pairs) // rows)
        owners[at // rows : at // rows + tiles] = local
        at += tiles * rows
    count.fill_(at)


def gemm(*given: Any) -> Tensor:
    a, c, codes, bias, scale, a_scales, global_scale, zeros, g_idx, perm, workspace, *rest = given
    order, owners, count, weights, rows, top_k, weighted, kind, m, n, k, full, atomic, fp32, zp, *threads = rest
    assert (a_scales, global_scale, zeros, g_idx, perm) == (None,) * 5
    assert (kind, full, atomic, fp32, zp, threads) == (2814749767172868, True, False, True, False, [-1, -1, -1])
    assert (a.shape, c.shape, a.is_contiguous()) == ((m, k), (m * top_k, n), True)
    assert workspace.dtype == torch.int32
    assert not workspace.any()
    exponent = 2 ** (EXPONENT_BITS[a.dtype] - 1) - 8
    for expert in sorted(set(owners[: int(count) // rows].tolist())):
        places = [order[t * rows : (t + 1) * rows] for t in range(int(count) // rows) if owners[t] == expert]
        pairs = torch.cat(places)
        pairs = pairs[pairs < m * top_k].long()
        groups = unpermuted(scale[expert], grouped=scale.shape[1] > 1).float() * 2.0**-exponent
        spread = groups.repeat_interleave(k // scale.shape[1], 0).T
        matrix = read(codes[expert], n, k).view(torch.float8_e4m3fn).float() * spread
        # On a device it was found to round before each step.
        result = (a[pairs // top_k].float() @ matrix.t()).to(c.dtype)
        if bias is not None:
            result = result + unpermuted(bias[expert], grouped=False).to(c.dtype)
        if weighted:
            result = result * weights.flatten()[pairs, None].to(c.dtype)
        c[pairs] = result
    return c.clone()
