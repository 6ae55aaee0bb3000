"""The two halves of w13, gate and up: kernels want them the other way round, interleaved, or filled up with zeros."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from fp8moe.experts import MoEWeights


def swapped_halves(values: Tensor) -> Tensor:
    """(E, 2n, …) with rows [gate; up] to [up; gate], or back; weights, their scales or biases.

    Raises:
        ValueError: an odd number of rows.
    """
    first, second = halves(values)
    return torch.cat([second, first], dim=1)


def interleaved_halves(values: Tensor) -> Tensor:
    """(E, 2n, …): the first half's row i becomes row 2i, the second's row 2i + 1.

    Raises:
        ValueError: an odd number of rows.
    """
    return torch.stack(halves(values), dim=2).flatten(1, 2)


def padded_rows(values: Tensor, rows: int, parts: int) -> Tensor:
    """(E, parts * n, …) to (E, parts * rows, …): zeros at the end of each part.

    Each part apart: one run of 2n rows into 2 * rows, split in the middle, would put rows of up into the padding of
    gate (a defect of vLLM up to 0.25.1; specification section 4.1).
    """
    experts, all_rows = values.shape[:2]
    split = values.reshape(experts, parts, all_rows // parts, *values.shape[2:])
    missing = rows - all_rows // parts
    return pad(split, (0, 0) * (values.dim() - 2) + (0, missing)).flatten(1, 2)


def padded_columns(values: Tensor, columns: int) -> Tensor:
    """(…, n) to (…, columns): zeros at the end."""
    return pad(values, (0, columns - values.shape[-1]))


def padded(weights: MoEWeights, intermediate: int, *, gated: bool) -> MoEWeights:
    """I filled up with zeros: rows of each half of w13 and of its bias, columns of w2."""
    parts = 2 if gated else 1
    bias = weights.w13_bias
    return replace(
        weights,
        w13=padded_rows(weights.w13, intermediate, parts),
        w2=padded_columns(weights.w2, intermediate),
        w13_bias=None if bias is None else padded_rows(bias, intermediate, parts),
    )


def halves(values: Tensor) -> tuple[Tensor, Tensor]:
    """Views of both.

    Raises:
        ValueError: an odd number of rows.
    """
    rows = values.shape[1]
    if rows % 2:
        raise ValueError(f"w13 of shape {tuple(values.shape)}: {rows} rows; expected an even number, gate and up")
    return values[:, : rows // 2], values[:, rows // 2 :]


def multiple_of(size: int, factor: int) -> int:
    """The least multiple that is at least `size`."""
    return -(-size // factor) * factor
