"""The support predicate of each backend as boolean arrays: the specification's tables of checks, in their order."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from conformance.selection.facts import (
    ACTIVATIONS,
    EXCHANGES,
    FALSE,
    KEYS,
    MALFORMED,
    TRUE,
    Array,
    Facts,
)
from fp8moe import Fp8MoeBackend, QuantKey, Reason, RoutingMethodType
from fp8moe.quant import (
    kFp8Dynamic128Sym,
    kFp8DynamicTensorSym,
    kFp8DynamicTokenSym,
    kFp8Static128BlockSym,
    kFp8StaticChannelSym,
    kFp8StaticTensorSym,
    kNvfp4Dynamic,
    kNvfp4Static,
)

BACKENDS = tuple(
    Fp8MoeBackend[name]
    for name in (
        "AITER",
        "FLASHINFER_TRTLLM",
        "FLASHINFER_CUTLASS",
        "DEEPGEMM",
        "BATCHED_DEEPGEMM",
        "VLLM_CUTLASS",
        "BATCHED_VLLM_CUTLASS",
        "TRITON",
        "BATCHED_TRITON",
        "MARLIN",
        "XPU",
    )
)
"""The eleven candidates in the specification's order; a backend's index in this tuple is its code."""
INDEX = {backend.name: index for index, backend in enumerate(BACKENDS)}

REASONS = tuple(
    Reason[name]
    for name in (
        "DEVICE",
        "GATING",
        "ACTIVATION",
        "SCHEME",
        "PARALLEL",
        "ROUTING",
        "FORMAT",
        "LOGITS_DTYPE",
        "DISABLED_BY_ENV",
        "NOT_ALLOWED",
    )
)
"""Reasons; a reason's index in this tuple is its code."""
SUPPORTED = -1
"""Code where there is no reason against a backend."""
UNKNOWN = -2
"""Code where a predicate needs a variable that is malformed: not supported, for no reason of the table."""

BLOCK, STATIC_TENSOR, STATIC_CHANNEL = kFp8Static128BlockSym, kFp8StaticTensorSym, kFp8StaticChannelSym
DYNAMIC_128, DYNAMIC_TENSOR, TOKEN = kFp8Dynamic128Sym, kFp8DynamicTensorSym, kFp8DynamicTokenSym
Scheme = tuple[QuantKey | None, QuantKey | None]
UNQUANTISED: Scheme = (None, None)

ACCEPTED_ACTIVATIONS = {
    "AITER": ("silu", "gelu"),
    "FLASHINFER_TRTLLM": ("silu",),
    "FLASHINFER_CUTLASS": ("silu", "relu2_no_mul"),
    "DEEPGEMM": ("silu", "swiglustep"),
    "BATCHED_DEEPGEMM": ("silu",),
    "VLLM_CUTLASS": ("silu", "gelu", "swigluoai"),
    "BATCHED_VLLM_CUTLASS": ("silu", "gelu", "swigluoai"),
    "TRITON": ("silu", "gelu", "swigluoai", "swiglustep"),
    "BATCHED_TRITON": ("silu", "gelu", "swigluoai", "silu_no_mul", "gelu_no_mul", "relu2_no_mul"),
    "MARLIN": ("silu", "gelu", "swigluoai", "silu_no_mul", "gelu_no_mul", "relu2_no_mul"),
    "XPU": ("silu", "gelu", "swigluoai"),
}
TAKES_NON_GATED = ("FLASHINFER_CUTLASS", "MARLIN")
BATCHED = ("BATCHED_DEEPGEMM", "BATCHED_VLLM_CUTLASS", "BATCHED_TRITON")
BATCHED_EXCHANGES = ("pplx", "deepep_low_latency")

CUTLASS_SCHEMES: tuple[Scheme, ...] = (
    (STATIC_CHANNEL, TOKEN),
    (STATIC_TENSOR, DYNAMIC_TENSOR),
    (STATIC_TENSOR, STATIC_TENSOR),
)
TRITON_FP8_SCHEMES: tuple[Scheme, ...] = (
    (BLOCK, DYNAMIC_128),
    (STATIC_CHANNEL, TOKEN),
    (STATIC_TENSOR, TOKEN),
    (STATIC_TENSOR, STATIC_TENSOR),
    (STATIC_TENSOR, DYNAMIC_TENSOR),
)
TRTLLM_ROUTING = {
    "block": ("DeepSeekV3", "Renormalize", "RenormalizeNaive"),
    "tensor": ("Llama4", "Renormalize", "RenormalizeNaive"),
}


def refusals(f: Facts) -> list[Array]:
    """For each of ``BACKENDS`` the code of its first failing check, ``SUPPORTED`` or ``UNKNOWN``."""
    devices, schemes, parallels = _devices(f), _schemes(f), _parallels(f)
    batched = wants_batched(f)
    codes = []
    for backend in BACKENDS:
        name = backend.name
        checks = [
            ("DEVICE", devices[name]),
            ("GATING", f.gated | (name in TAKES_NON_GATED)),
            ("ACTIVATION", _is_in(f.activation, ACTIVATIONS, ACCEPTED_ACTIVATIONS[name])),
            ("SCHEME", schemes[name]),
            ("PARALLEL", parallels[name]),
        ]
        if name == "FLASHINFER_TRTLLM":
            deepseek = f.routing == RoutingMethodType.DeepSeekV3
            checks += [
                ("ROUTING", _trtllm_routing(f)),
                ("FORMAT", ~batched),
                ("LOGITS_DTYPE", ~(f.fp32_logits & ~deepseek)),
            ]
        else:
            checks.append(("FORMAT", batched if name in BATCHED else ~batched))
        code = first_failing(checks)
        if name in ("DEEPGEMM", "BATCHED_DEEPGEMM"):
            code = np.where(f.use_deep_gemm == MALFORMED, np.int8(UNKNOWN), code)
        codes.append(code)
    return codes


def first_failing(checks: Sequence[tuple[str, Array]]) -> Array:
    """Code of the first check that does not pass, over the checks' broadcast shape."""
    code: Array = np.int8(SUPPORTED)
    for name, passes in reversed(checks):
        code = np.where(passes, code, np.int8(REASONS.index(Reason[name])))
    return code


def wants_batched(f: Facts) -> Array:
    """Whether the requested format is BatchedExperts."""
    return _is_in(f.exchange, EXCHANGES, BATCHED_EXCHANGES)


def is_family(f: Facts, family: int) -> Array:
    """Whether the capability is known and of a family: 100 for 10.0 to 10.9. No test of the device's kind."""
    return (f.capability // 10 == family // 10) & (f.capability >= 0)


def cutlass_grouped_gemm(f: Facts) -> Array:
    """Whether vLLM's compiled grouped GEMM says yes: architecture, toolkit, and the compiled ops being there."""
    new_enough = np.where(f.capability >= 100, f.cuda_build >= 1208, f.cuda_build >= 1203)
    return f.cuda & (f.capability >= 90) & (f.capability < 110) & new_enough & f.vllm


def has_fp8_units(f: Facts) -> Array:
    """The specification's FP8HW: gfx90a counts although it has no FP8 matrix units."""
    return (f.rocm & f.gfx9) | (f.cuda & (f.capability >= 89))


def _devices(f: Facts) -> dict[str, Array]:
    sm90 = f.capability == 90
    sm10x, sm11x, sm12x = (is_family(f, family) for family in (100, 110, 120))
    # The variables' values: deep GEMM and AITER_MOE are on by default, AITER is off by default.
    deep_gemm = (f.use_deep_gemm != FALSE) & f.deep_gemm & f.cuda & (sm90 | sm10x)
    aiter_enabled = (f.use_aiter == TRUE) & (f.use_aiter_moe != FALSE)
    cutlass = cutlass_grouped_gemm(f)
    gpu = f.cuda | f.rocm
    return {
        "AITER": f.rocm & f.aiter & f.gfx9 & aiter_enabled,
        "FLASHINFER_TRTLLM": f.cuda & sm10x,
        "FLASHINFER_CUTLASS": f.cuda & (sm90 | sm10x | sm11x | sm12x) & f.flashinfer,
        "DEEPGEMM": deep_gemm & gpu,
        "BATCHED_DEEPGEMM": deep_gemm,
        "VLLM_CUTLASS": cutlass & gpu,
        "BATCHED_VLLM_CUTLASS": cutlass,
        "TRITON": gpu,
        "BATCHED_TRITON": gpu,
        "MARLIN": f.cuda & (f.capability >= 75) & f.vllm,
        "XPU": f.xpu,
    }


def _schemes(f: Facts) -> dict[str, Array]:
    block = _scheme_in(f, [(BLOCK, DYNAMIC_128)])
    cutlass = _scheme_in(f, CUTLASS_SCHEMES)
    triton = _scheme_in(f, [UNQUANTISED]) | (has_fp8_units(f) & _scheme_in(f, TRITON_FP8_SCHEMES))
    return {
        "AITER": _scheme_in(
            f,
            [
                UNQUANTISED,
                (BLOCK, DYNAMIC_128),
                (STATIC_TENSOR, STATIC_TENSOR),
                (STATIC_TENSOR, DYNAMIC_TENSOR),
                (STATIC_CHANNEL, TOKEN),
            ],
        ),
        "FLASHINFER_TRTLLM": block | _scheme_in(f, [(STATIC_TENSOR, STATIC_TENSOR)]),
        "FLASHINFER_CUTLASS": (
            (_scheme_in(f, [UNQUANTISED, (STATIC_TENSOR, STATIC_TENSOR)]) & (f.capability >= 90))
            | (block & (f.capability == 90))
            | (_scheme_in(f, [(kNvfp4Static, kNvfp4Dynamic)]) & (f.capability >= 100))
        ),
        "DEEPGEMM": block & triton,
        "BATCHED_DEEPGEMM": block,
        "VLLM_CUTLASS": cutlass & triton,
        "BATCHED_VLLM_CUTLASS": cutlass,
        "TRITON": triton,
        "BATCHED_TRITON": triton,
        "MARLIN": np.logical_or.reduce(
            [f.weight_key == KEYS.index(key) for key in (BLOCK, STATIC_CHANNEL, STATIC_TENSOR, kNvfp4Static)]
        ),
        "XPU": _scheme_in(f, [UNQUANTISED, (STATIC_TENSOR, None), (STATIC_TENSOR, DYNAMIC_TENSOR)]),
    }


def _parallels(f: Facts) -> dict[str, Array]:
    always = np.asarray(True)
    no_flashinfer = ~_is_in(f.exchange, EXCHANGES, ("flashinfer_all2allv",))
    no_high_throughput = ~_is_in(f.exchange, EXCHANGES, ("deepep_high_throughput",))
    return {
        "AITER": no_flashinfer,
        "FLASHINFER_TRTLLM": ~f.eplb,
        "FLASHINFER_CUTLASS": ~f.sequence_parallel,
        "DEEPGEMM": no_flashinfer,
        "BATCHED_DEEPGEMM": always,
        "VLLM_CUTLASS": no_flashinfer & no_high_throughput,
        "BATCHED_VLLM_CUTLASS": always,
        "TRITON": no_flashinfer,
        "BATCHED_TRITON": always,
        "MARLIN": no_flashinfer,
        "XPU": always,
    }


def _trtllm_routing(f: Facts) -> Array:
    def one_of(names: Sequence[str]) -> Array:
        return np.logical_or.reduce([f.routing == RoutingMethodType[name] for name in names])

    # The scheme's check has passed: it is the block scheme or static per tensor.
    block = f.weight_key == KEYS.index(BLOCK)
    return np.where(block, one_of(TRTLLM_ROUTING["block"]), one_of(TRTLLM_ROUTING["tensor"]))


def _scheme_in(f: Facts, accepted: Sequence[Scheme]) -> Array:
    return np.logical_or.reduce(
        [(f.weight_key == KEYS.index(w)) & (f.activation_key == KEYS.index(a)) for w, a in accepted]
    )


def _is_in(codes: Array, names: Sequence[str], accepted: Sequence[str]) -> Array:
    return np.logical_or.reduce([codes == names.index(name) for name in accepted])
