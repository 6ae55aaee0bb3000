"""The quantisation schemes of the specification, (weight key, activation key), under the names its tables use."""

from __future__ import annotations

from fp8moe.keys import (
    QuantKey,
    kFp8Dynamic128Sym,
    kFp8DynamicTensorSym,
    kFp8DynamicTokenSym,
    kFp8Static128BlockSym,
    kFp8StaticChannelSym,
    kFp8StaticTensorSym,
    kNvfp4Dynamic,
    kNvfp4Static,
)

Scheme = tuple[QuantKey | None, QuantKey | None]

UNQUANTISED: Scheme = (None, None)
BLOCK: Scheme = (kFp8Static128BlockSym, kFp8Dynamic128Sym)
TENSOR_STATIC: Scheme = (kFp8StaticTensorSym, kFp8StaticTensorSym)
TENSOR_DYNAMIC: Scheme = (kFp8StaticTensorSym, kFp8DynamicTensorSym)
TENSOR_TOKEN: Scheme = (kFp8StaticTensorSym, kFp8DynamicTokenSym)
CHANNEL_TOKEN: Scheme = (kFp8StaticChannelSym, kFp8DynamicTokenSym)
TENSOR_128: Scheme = (kFp8StaticTensorSym, kFp8Dynamic128Sym)
TENSOR_NONE: Scheme = (kFp8StaticTensorSym, None)
CHANNEL_NONE: Scheme = (kFp8StaticChannelSym, None)
BLOCK_NONE: Scheme = (kFp8Static128BlockSym, None)
NVFP4: Scheme = (kNvfp4Static, kNvfp4Dynamic)

SCHEMES: dict[str, Scheme] = {
    "block": BLOCK,
    "tensor_static": TENSOR_STATIC,
    "tensor_dyn": TENSOR_DYNAMIC,
    "tensor_tok": TENSOR_TOKEN,
    "channel_tok": CHANNEL_TOKEN,
    "tensor_128": TENSOR_128,
    "none": UNQUANTISED,
    "tensor_none": TENSOR_NONE,
    "channel_none": CHANNEL_NONE,
    "block_none": BLOCK_NONE,
    "nvfp4": NVFP4,
}
SCHEME_NAMES: dict[Scheme, str] = {scheme: name for name, scheme in SCHEMES.items()}


def scheme_name(weight_key: QuantKey | None, activation_key: QuantKey | None) -> str:
    """The scheme's name where it has one, else both keys."""
    named = SCHEME_NAMES.get((weight_key, activation_key))
    return named or f"({weight_key or 'unquantised'}, {activation_key or 'unquantised'})"
