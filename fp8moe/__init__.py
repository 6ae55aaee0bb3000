"""fp8moe: which FP8 MoE backend is selected, whether it computes what it claims, and how fast.

Everything below is loaded when it is first asked for, so that `import fp8moe` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from fp8moe.config import (
        FusedMoEActivationFormat,
        FusedMoEConfig,
        FusedMoEParallelConfig,
        RoutingMethodType,
    )
    from fp8moe.envs import MalformedVariable
    from fp8moe.experts import Contract, FusedMoEPermuteExpertsUnpermute, MoEWeights
    from fp8moe.kernel_format import (
        convert_to_fp8_moe_kernel_format,
        make_fp8_moe_kernel,
        make_fp8_moe_quant_config,
    )
    from fp8moe.keys import (
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
    from fp8moe.measured import (
        InvalidMeasuredTable,
        MeasuredTable,
        explain_measured,
        policy_regret,
        select_measured,
    )
    from fp8moe.platforms import PLATFORMS, Platform
    from fp8moe.plug_ins import BrokenPlugInWarning
    from fp8moe.quant import FusedMoEQuantConfig
    from fp8moe.recipe import Arithmetic, Recipe
    from fp8moe.refusals import BackendNotSupported, NoBackendFits
    from fp8moe.registry import (
        BackendContractError,
        BackendSpec,
        BackendUnavailable,
        Fp8MoeBackend,
        LayerNotSupported,
        Position,
        Reason,
        register_backend,
        unregister_backend,
    )
    from fp8moe.scaling import dequantize, quantize
    from fp8moe.selector import (
        Selection,
        Verdict,
        explain_fp8_moe_backend,
        select_fp8_moe_backend,
    )
    from fp8moe.support import Support
    from fp8moe.validation import InvalidMoEInput

_MODULE_OF = {
    "Arithmetic": "recipe",
    "BackendContractError": "registry",
    "BackendNotSupported": "refusals",
    "BackendSpec": "registry",
    "BackendUnavailable": "registry",
    "BrokenPlugInWarning": "plug_ins",
    "Contract": "recipe",
    "Fp8MoeBackend": "registry",
    "FusedMoEActivationFormat": "config",
    "FusedMoEConfig": "config",
    "FusedMoEParallelConfig": "config",
    "FusedMoEPermuteExpertsUnpermute": "experts",
    "FusedMoEQuantConfig": "quant",
    "GroupShape": "keys",
    "InvalidMeasuredTable": "measured",
    "InvalidMoEInput": "validation",
    "LayerNotSupported": "registry",
    "MalformedVariable": "envs",
    "MeasuredTable": "measured",
    "MoEWeights": "experts",
    "NoBackendFits": "refusals",
    "PLATFORMS": "platforms",
    "Platform": "platforms",
    "Position": "registry",
    "QuantKey": "keys",
    "Reason": "registry",
    "Recipe": "recipe",
    "RoutingMethodType": "config",
    "ScaleDesc": "keys",
    "Selection": "selector",
    "Support": "support",
    "Verdict": "selector",
    "convert_to_fp8_moe_kernel_format": "kernel_format",
    "dequantize": "scaling",
    "explain_fp8_moe_backend": "selector",
    "explain_measured": "measured",
    "make_fp8_moe_kernel": "kernel_format",
    "make_fp8_moe_quant_config": "kernel_format",
    "policy_regret": "measured",
    "quantize": "scaling",
    "register_backend": "registry",
    "select_fp8_moe_backend": "selector",
    "select_measured": "measured",
    "unregister_backend": "registry",
    **dict.fromkeys(
        (
            "kFp8StaticTensorSym",
            "kFp8DynamicTensorSym",
            "kFp8StaticTokenSym",
            "kFp8StaticChannelSym",
            "kFp8DynamicTokenSym",
            "kFp8Dynamic128Sym",
            "kFp8Static128BlockSym",
            "kFp8Dynamic64Sym",
            "kNvfp4Static",
            "kNvfp4Dynamic",
        ),
        "keys",
    ),
}

__all__ = [
    "PLATFORMS",
    "Arithmetic",
    "BackendContractError",
    "BackendNotSupported",
    "BackendSpec",
    "BackendUnavailable",
    "BrokenPlugInWarning",
    "Contract",
    "Fp8MoeBackend",
    "FusedMoEActivationFormat",
    "FusedMoEConfig",
    "FusedMoEParallelConfig",
    "FusedMoEPermuteExpertsUnpermute",
    "FusedMoEQuantConfig",
    "GroupShape",
    "InvalidMeasuredTable",
    "InvalidMoEInput",
    "LayerNotSupported",
    "MalformedVariable",
    "MeasuredTable",
    "MoEWeights",
    "NoBackendFits",
    "Platform",
    "Position",
    "QuantKey",
    "Reason",
    "Recipe",
    "RoutingMethodType",
    "ScaleDesc",
    "Selection",
    "Support",
    "Verdict",
    "__version__",
    "convert_to_fp8_moe_kernel_format",
    "dequantize",
    "explain_fp8_moe_backend",
    "explain_measured",
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
    "make_fp8_moe_kernel",
    "make_fp8_moe_quant_config",
    "policy_regret",
    "quantize",
    "register_backend",
    "select_fp8_moe_backend",
    "select_measured",
    "unregister_backend",
]


def __getattr__(name: str) -> Any:
    module = _MODULE_OF.get(name)
    if module is None:
        raise AttributeError(f"module 'fp8moe' has no attribute {name!r}")
    value = getattr(import_module(f"fp8moe.{module}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_MODULE_OF))
