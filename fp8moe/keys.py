"""Quantisation keys: group shapes, scale descriptions and the named keys (specification section 3.3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch

from fp8moe.frozen import hash_once, state_without_derived

FP8_DTYPE = torch.float8_e4m3fn
"""The dtype of every key, on every device; e4m3fnuz is a matter of conversion."""


class _GroupShape(NamedTuple):
    row: int
    col: int


class GroupShape(_GroupShape):
    """Rows and columns that share one scale; -1 stands for the whole extent."""

    __slots__ = ()

    PER_TENSOR: ClassVar[GroupShape]
    PER_TOKEN: ClassVar[GroupShape]
    PER_CHANNEL: ClassVar[GroupShape]

    def is_per_tensor(self) -> bool:
        return self.row == -1 and self.col == -1

    def is_per_token(self) -> bool:
        return self.row == 1 and self.col == -1

    def is_per_channel(self) -> bool:
        return self.row == -1 and self.col == 1

    def is_per_group(self) -> bool:
        return self.row == 1 and self.col >= 1

    def is_block(self) -> bool:
        return self.row > 1 and self.col > 1

    def __str__(self) -> str:
        named = {(-1, -1): "tensor", (1, -1): "token", (-1, 1): "channel"}
        return named.get((self.row, self.col), f"{self.row}x{self.col}")


GroupShape.PER_TENSOR = GroupShape(-1, -1)
GroupShape.PER_TOKEN = GroupShape(1, -1)
GroupShape.PER_CHANNEL = GroupShape(-1, 1)


@dataclass(frozen=True)
class ScaleDesc:
    """A scale: its dtype, whether it is known before the run (static), and the elements that share it."""

    dtype: torch.dtype
    static: bool
    group_shape: GroupShape


@dataclass(frozen=True)
class QuantKey:
    """A quantisation: element dtype and scales; equal by value, so a key built elsewhere matches."""

    dtype: torch.dtype
    scale: ScaleDesc
    scale2: ScaleDesc | None = None
    symmetric: bool = True

    __hash__ = hash_once
    __getstate__ = state_without_derived

    def __str__(self) -> str:
        name = KEY_NAMES.get(self)
        if name is not None:
            return name
        kind = "static" if self.scale.static else "dynamic"
        return f"{str(self.dtype).removeprefix('torch.')} {kind} {self.scale.group_shape}"


def _fp8(static: bool, row: int, col: int) -> QuantKey:
    return QuantKey(FP8_DTYPE, ScaleDesc(torch.float32, static, GroupShape(row, col)))


def _nvfp4(static: bool) -> QuantKey:
    tensor_scale = ScaleDesc(torch.float32, True, GroupShape.PER_TENSOR)
    return QuantKey(torch.uint8, ScaleDesc(FP8_DTYPE, static, GroupShape(1, 16)), tensor_scale)


kFp8StaticTensorSym = _fp8(True, -1, -1)
kFp8DynamicTensorSym = _fp8(False, -1, -1)
kFp8StaticTokenSym = _fp8(True, 1, -1)
kFp8StaticChannelSym = _fp8(True, -1, 1)
kFp8DynamicTokenSym = _fp8(False, 1, -1)
kFp8Dynamic128Sym = _fp8(False, 1, 128)
kFp8Static128BlockSym = _fp8(True, 128, 128)
kFp8Dynamic64Sym = _fp8(False, 1, 64)
kNvfp4Static = _nvfp4(True)
kNvfp4Dynamic = _nvfp4(False)

KEYS: dict[str, QuantKey] = {
    "kFp8StaticTensorSym": kFp8StaticTensorSym,
    "kFp8DynamicTensorSym": kFp8DynamicTensorSym,
    "kFp8StaticTokenSym": kFp8StaticTokenSym,
    "kFp8StaticChannelSym": kFp8StaticChannelSym,
    "kFp8DynamicTokenSym": kFp8DynamicTokenSym,
    "kFp8Dynamic128Sym": kFp8Dynamic128Sym,
    "kFp8Static128BlockSym": kFp8Static128BlockSym,
    "kFp8Dynamic64Sym": kFp8Dynamic64Sym,
    "kNvfp4Static": kNvfp4Static,
    "kNvfp4Dynamic": kNvfp4Dynamic,
}
KEY_NAMES: dict[QuantKey, str] = {key: name for name, key in KEYS.items()}
