"""The quantisation of one layer's four tensors; with the keys and the functions that turn them into numbers.

Scale *values* are never here: they live in `MoEWeights`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fp8moe.keys import (
    FP8_DTYPE,
    KEY_NAMES,
    KEYS,
    GroupShape,
    QuantKey,
    ScaleDesc,
    kFp8Dynamic64Sym,
    kFp8Dynamic128Sym,
    kFp8DynamicTensorSym,
    kFp8DynamicTokenSym,
    kFp8Static128BlockSym,
    kFp8StaticChannelSym,
    kFp8StaticTensorSym,
    kFp8StaticTokenSym,
    kNvfp4Dynamic,
    kNvfp4Static,
)
from fp8moe.scaling import dequantize, quantize


@dataclass(frozen=True)
class FusedMoEQuantDesc:
    """One of a layer's four tensors: dtype None means unquantised; shape None means the library's default.

    `static` says whether the scale comes with the weights or is measured on the data.
    """

    dtype: torch.dtype | None = None
    shape: GroupShape | None = None
    static: bool = True


@dataclass(frozen=True)
class FusedMoEQuantConfig:
    """The quantisation of one layer: inputs of both GEMMs (a1, a2) and both weights (w1, w2).

    Raises:
        ValueError: per-token activations together with block weights, or the two weights of different kinds.
    """

    a1: FusedMoEQuantDesc = FusedMoEQuantDesc()
    a2: FusedMoEQuantDesc = FusedMoEQuantDesc()
    w1: FusedMoEQuantDesc = FusedMoEQuantDesc()
    w2: FusedMoEQuantDesc = FusedMoEQuantDesc()

    def __post_init__(self) -> None:
        if self.w1 != self.w2:
            raise ValueError(f"FusedMoEQuantConfig: w1={self.w1} and w2={self.w2}: expected the same quantisation")
        if self.a1.dtype != self.a2.dtype or self.a1.shape != self.a2.shape:
            raise ValueError(f"FusedMoEQuantConfig: a1={self.a1} and a2={self.a2}: expected the same dtype and groups")
        block = self.w1.shape is not None and self.w1.shape.is_block()
        if block and self.a1.dtype is not None and self.a1.shape is not None and self.a1.shape.is_per_token():
            raise ValueError("FusedMoEQuantConfig: per-token activations exclude block weights; use groups of columns")

    @classmethod
    def from_keys(cls, weight_key: QuantKey | None, activation_key: QuantKey | None) -> FusedMoEQuantConfig:
        """The quantisation that a pair of keys names."""

        def describe(key: QuantKey | None) -> FusedMoEQuantDesc:
            if key is None:
                return FusedMoEQuantDesc()
            return FusedMoEQuantDesc(key.dtype, key.scale.group_shape, key.scale.static)

        weight, activation = describe(weight_key), describe(activation_key)
        return cls(activation, activation, weight, weight)

    @classmethod
    def make(
        cls,
        quant_dtype: torch.dtype | None = None,
        *,
        per_act_token_quant: bool = False,
        per_out_ch_quant: bool = False,
        block_shape: tuple[int, int] | None = None,
        static_activations: bool = False,
    ) -> FusedMoEQuantConfig:
        """From upstream's flags (specification section 3.6).

        `block_shape` is the weights' (rows, columns); activations then have groups of (1, columns).

        Raises:
            ValueError: `block_shape` together with a per-token or per-channel flag.
        """
        if quant_dtype is None:
            return cls()
        if block_shape is not None and (per_act_token_quant or per_out_ch_quant):
            raise ValueError(
                f"FusedMoEQuantConfig.make: block_shape={block_shape} excludes "
                f"per_act_token_quant={per_act_token_quant} and per_out_ch_quant={per_out_ch_quant}"
            )
        if block_shape is not None:
            weight, activation = GroupShape(*block_shape), GroupShape(1, block_shape[1])
        else:
            weight = GroupShape.PER_CHANNEL if per_out_ch_quant else GroupShape.PER_TENSOR
            activation = GroupShape.PER_TOKEN if per_act_token_quant else GroupShape.PER_TENSOR
        a = FusedMoEQuantDesc(quant_dtype, activation, static_activations)
        w = FusedMoEQuantDesc(quant_dtype, weight, True)
        return cls(a, a, w, w)

    @property
    def weight_key(self) -> QuantKey | None:
        return _key(self.w1)

    @property
    def activation_key(self) -> QuantKey | None:
        return _key(self.a1)

    @property
    def quant_dtype(self) -> torch.dtype | None:
        return self.a1.dtype

    @property
    def block_shape(self) -> tuple[int, int] | None:
        """(rows, columns) of the weights' blocks, or None."""
        shape = self.w1.shape
        return (shape.row, shape.col) if shape is not None and shape.is_block() else None

    @property
    def per_act_token_quant(self) -> bool:
        return self.a1.shape is not None and self.a1.shape.is_per_token()

    @property
    def per_out_ch_quant(self) -> bool:
        return self.w1.shape is not None and self.w1.shape.is_per_channel()

    @property
    def use_fp8_w8a8(self) -> bool:
        return self.a1.dtype == FP8_DTYPE

    @property
    def use_fp8_w8a16(self) -> bool:
        return self.a1.dtype is None and self.w1.dtype == FP8_DTYPE


def _key(desc: FusedMoEQuantDesc) -> QuantKey | None:
    if desc.dtype is None:
        return None
    return QuantKey(desc.dtype, ScaleDesc(torch.float32, desc.static, desc.shape or GroupShape.PER_TENSOR))


__all__ = [
    "FP8_DTYPE",
    "KEYS",
    "KEY_NAMES",
    "FusedMoEQuantConfig",
    "FusedMoEQuantDesc",
    "GroupShape",
    "QuantKey",
    "ScaleDesc",
    "dequantize",
    "kFp8Dynamic64Sym",
    "kFp8Dynamic128Sym",
    "kFp8DynamicTensorSym",
    "kFp8DynamicTokenSym",
    "kFp8Static128BlockSym",
    "kFp8StaticChannelSym",
    "kFp8StaticTensorSym",
    "kFp8StaticTokenSym",
    "kNvfp4Dynamic",
    "kNvfp4Static",
    "quantize",
]
