"""The axes of the selection grid: named tables of real objects, the first value of each being the usual one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import chain, combinations
from typing import Any

import torch

from conformance.selection import facts
from conformance.selection.build import BATCHED, SINGLE, make_parallel
from fp8moe import FusedMoEParallelConfig, Platform, QuantKey, RoutingMethodType
from fp8moe.quant import (
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


@dataclass(frozen=True)
class Axis:
    """One axis: its name, its values by name, and what the model reads from a value."""

    name: str
    values: Mapping[str, Any]
    read: Callable[[Any], dict[str, int | bool]]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.values)

    def __len__(self) -> int:
        return len(self.values)


def _cuda(major: int, minor: int, build: tuple[int, int] | None = (12, 9)) -> Platform:
    return Platform("cuda", capability=(major, minor), cuda_version=build)


def _rocm(arch: str | None, major: int, minor: int) -> Platform:
    return Platform("rocm", capability=(major, minor), gcn_arch=arch)


DEVICES: dict[str, Platform] = {
    "sm90": _cuda(9, 0),
    "sm70": _cuda(7, 0),
    "sm75": _cuda(7, 5),
    "sm80": _cuda(8, 0),
    "sm86": _cuda(8, 6),
    "sm89": _cuda(8, 9),
    "sm90-cuda12.3": _cuda(9, 0, (12, 3)),
    "sm90-cuda12.2": _cuda(9, 0, (12, 2)),
    "sm90-cuda-unknown": _cuda(9, 0, None),
    "sm99": _cuda(9, 9),
    "sm100": _cuda(10, 0),
    "sm100-cuda12.8": _cuda(10, 0, (12, 8)),
    "sm100-cuda12.7": _cuda(10, 0, (12, 7)),
    "sm103": _cuda(10, 3),
    "sm109": _cuda(10, 9),
    "sm110": _cuda(11, 0, (13, 0)),
    "sm120": _cuda(12, 0),
    "sm121": _cuda(12, 1, (13, 0)),
    "sm130": _cuda(13, 0, (13, 0)),
    "cuda-unknown": Platform("cuda", cuda_version=(12, 9)),
    "gfx942": _rocm("gfx942", 9, 4),
    "gfx942-features": _rocm("gfx942:sramecc+:xnack-", 9, 4),
    "gfx950": _rocm("gfx950", 9, 5),
    "gfx90a": _rocm("gfx90a", 9, 0),  # 9.0 here is not SM90
    "gfx908": _rocm("gfx908", 9, 0),
    "gfx1030": _rocm("gfx1030", 10, 3),  # 10.3 is in the SM10x family for the rule that does not ask for CUDA
    "gfx1100": _rocm("gfx1100", 11, 0),
    "rocm-unknown": Platform("rocm"),
    "xpu": Platform("xpu"),
    "cpu": Platform("cpu"),
    "tpu": Platform("tpu"),
    "other-10.0": Platform("other", capability=(10, 0), gcn_arch="gfx942", cuda_version=(12, 9)),
} | (
    {f"sm{major}{minor}": _cuda(major, minor) for major, minor in ((7, 4), (8, 8), (9, 2), (11, 9), (12, 3), (12, 9))}
    | {
        "sm90-cuda11.8": _cuda(9, 0, (11, 8)),
        "sm100-cuda12.10": _cuda(10, 0, (12, 10)),  # newer than 12.8, though not as decimals or as texts
        "sm100-cuda13.0": _cuda(10, 0, (13, 0)),
        "gfx940": _rocm("gfx940", 9, 4),
    }
)
"""Devices and the toolkit that kernels are compiled with; their libraries are an axis of their own.

The last ten stand beside the limits of the predicates, where no device may be known yet.
"""
BOUNDARY_DEVICES = tuple(DEVICES)[-10:]

LIBRARIES = ("deep_gemm", "flashinfer", "aiter", "vllm")
LIBRARY_SETS = {"all": frozenset(LIBRARIES), "none": frozenset[str]()} | {
    "+".join(names): frozenset(names) for size in (1, 2, 3) for names in combinations(LIBRARIES, size)
}

SCHEMES: dict[str, tuple[QuantKey | None, QuantKey | None]] = {
    "block": (kFp8Static128BlockSym, kFp8Dynamic128Sym),
    "tensor_static": (kFp8StaticTensorSym, kFp8StaticTensorSym),
    "tensor_dyn": (kFp8StaticTensorSym, kFp8DynamicTensorSym),
    "tensor_tok": (kFp8StaticTensorSym, kFp8DynamicTokenSym),
    "channel_tok": (kFp8StaticChannelSym, kFp8DynamicTokenSym),
    "tensor_128": (kFp8StaticTensorSym, kFp8Dynamic128Sym),
    "none": (None, None),
    "tensor_none": (kFp8StaticTensorSym, None),
    "nvfp4": (kNvfp4Static, kNvfp4Dynamic),
    "block_nvfp4": (kFp8Static128BlockSym, kNvfp4Dynamic),
    "block_64": (kFp8Static128BlockSym, kFp8Dynamic64Sym),
    "channel_dyn": (kFp8StaticChannelSym, kFp8DynamicTensorSym),
    "token_tok": (kFp8StaticTokenSym, kFp8DynamicTokenSym),
    "none_128": (None, kFp8Dynamic128Sym),
    "dyn_static": (kFp8DynamicTensorSym, kFp8StaticTensorSym),
}

HIGH_THROUGHPUT, LOW_LATENCY, FLASHINFER = "deepep_high_throughput", "deepep_low_latency", "flashinfer_all2allv"
PARALLELS: dict[str, FusedMoEParallelConfig] = {
    "single": SINGLE,
    "dp2-ep-deepep_low_latency": BATCHED,
    "dp2-ep-naive": make_parallel(dp=2, ep=2, use_ep=True),
    "dp2-ep-pplx": make_parallel(dp=2, ep=2, use_ep=True, exchange="pplx"),
    "dp2-ep-deepep_high_throughput": make_parallel(dp=2, ep=2, use_ep=True, exchange=HIGH_THROUGHPUT),
    "dp2-ep-mori": make_parallel(dp=2, ep=2, use_ep=True, exchange="mori"),
    "dp2-ep-allgather_reducescatter": make_parallel(dp=2, ep=2, use_ep=True, exchange="allgather_reducescatter"),
    "dp2-ep-flashinfer_all2allv": make_parallel(dp=2, ep=2, use_ep=True, exchange=FLASHINFER),
    "tp2": make_parallel(tp=2),
    "tp4-dp2-deepep_low_latency": make_parallel(tp=4, dp=2, exchange=LOW_LATENCY),
    "tp4-dp2-flashinfer_all2allv": make_parallel(tp=4, dp=2, exchange=FLASHINFER),
    "ep2-pplx": make_parallel(ep=2, use_ep=True, exchange="pplx"),
    "pcp2-ep-deepep_low_latency": make_parallel(pcp=2, ep=2, use_ep=True, exchange=LOW_LATENCY),
    "single-eplb": make_parallel(eplb=True),
    "single-sp": make_parallel(sequence_parallel=True),
    "dp2-ep-deepep_low_latency-eplb": make_parallel(dp=2, ep=2, use_ep=True, exchange=LOW_LATENCY, eplb=True),
    "dp2-ep-flashinfer_all2allv-eplb": make_parallel(dp=2, ep=2, use_ep=True, exchange=FLASHINFER, eplb=True),
    "dp2-ep4-deepep_high_throughput-sp": make_parallel(
        dp=2, ep=4, use_ep=True, exchange=HIGH_THROUGHPUT, sequence_parallel=True
    ),
    "dp2-ep4-deepep_low_latency-sp": make_parallel(
        dp=2, ep=4, use_ep=True, exchange=LOW_LATENCY, sequence_parallel=True
    ),
    "dp2-ep4-naive-sp-eplb": make_parallel(dp=2, ep=4, use_ep=True, sequence_parallel=True, eplb=True),
}

ACTIVATIONS = {name: name for name in (*facts.ACTIVATIONS, "relu")}
GATING = {"gated": True, "non-gated": False}
ROUTING = {"DeepSeekV3": RoutingMethodType.DeepSeekV3} | {method.name: method for method in RoutingMethodType}
LOGITS: dict[str, tuple[torch.dtype | None, torch.dtype]] = {
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp32": (torch.float32, torch.bfloat16),
    "fp16": (torch.float16, torch.float16),
    "unset-bf16": (None, torch.bfloat16),
    "unset-fp32": (None, torch.float32),
}
"""(router_logits_dtype, in_dtype): an unset logits dtype is the input's."""
SWITCH = {"no": False, "yes": True}

UNSET = {"unset": None}
UNREAD: dict[str, dict[str, str]] = {
    "nothing": {},
    "e8m0-off": {"VLLM_USE_DEEP_GEMM_E8M0": "0"},
    "e8m0-on": {"VLLM_USE_DEEP_GEMM_E8M0": "1"},
    "batch-invariant-off": {"VLLM_BATCH_INVARIANT": "0"},
    "batch-invariant-on": {"VLLM_BATCH_INVARIANT": "1"},
    "malformed": {"VLLM_USE_DEEP_GEMM_E8M0": "x", "VLLM_BATCH_INVARIANT": "x"},
}
"""Variables of the family that the selector does not read."""


def _texts(*texts: str, **spellings: str) -> dict[str, str | None]:
    return UNSET | {text: text for text in texts} | spellings


INTEGERS = {
    **{text: text for text in ("2", "-1", "+1", "01", "1_0", "-0", "00", "yes", "True", "01.0")},
    **{"empty": "", "blank": " ", "blank-1-blank": " 1 ", "blank-0": " 0"},
}
WORDS = {
    **{text: text for text in ("true", "True", "TRUE", "false", "yes", "on", "2", "-1", "01")},
    **{"empty": "", "blank-1": " 1", "1-newline": "1\n", "blank-TRUE-blank": " TRUE "},
}
CHOICES = {"THROUGHPUT": "THROUGHPUT", "bogus": "bogus", "empty": "", "latency-blank": "latency ", "1": "1"}
"""Further spellings of an integer, of a word, of a choice: by name, since an id holds neither blanks nor nothing."""


def _read_logits(value: tuple[torch.dtype | None, torch.dtype]) -> dict[str, int | bool]:
    logits_dtype, in_dtype = value
    return {"fp32_logits": (logits_dtype or in_dtype) == torch.float32}


def _fact(name: str, read: Callable[[Any], int | bool]) -> Callable[[Any], dict[str, int | bool]]:
    return lambda value: {name: read(value)}


def _activation_code(name: str) -> int:
    return facts.ACTIVATIONS.index(name) if name in facts.ACTIVATIONS else facts.OTHER


AXES: tuple[Axis, ...] = (
    Axis("device", DEVICES, facts.device_facts),
    Axis("libraries", LIBRARY_SETS, facts.library_facts),
    Axis("scheme", SCHEMES, lambda pair: facts.scheme_facts(*pair)),
    Axis("parallel", PARALLELS, facts.parallel_facts),
    Axis("activation", ACTIVATIONS, _fact("activation", _activation_code)),
    Axis("gating", GATING, _fact("gated", bool)),
    Axis("routing", ROUTING, _fact("routing", int)),
    Axis("logits", LOGITS, _read_logits),
    Axis("lora", SWITCH, _fact("lora", bool)),
    Axis("allow_vllm_cutlass", SWITCH, _fact("allow_cutlass", bool)),
    Axis(facts.FLASHINFER, _texts("0", "1", "true", **INTEGERS), _fact("use_flashinfer", facts.integer_state)),
    Axis(
        facts.FLASHINFER_BACKEND,
        _texts("throughput", "latency", "masked_gemm", "Latency", **CHOICES),
        _fact("flashinfer_choice", facts.choice_state),
    ),
    Axis(facts.DEEP_GEMM, _texts("0", "1", "1.0", **INTEGERS), _fact("use_deep_gemm", facts.integer_state)),
    Axis(facts.MOE_DEEP_GEMM, _texts("0", "1", "0x1", **INTEGERS), _fact("moe_use_deep_gemm", facts.integer_state)),
    Axis(facts.MARLIN, _texts("0", "1", **WORDS), _fact("force_marlin", facts.stripped_state)),
    Axis(facts.AITER, _texts("0", "1", **WORDS), _fact("use_aiter", facts.unstripped_state)),
    Axis(facts.AITER_MOE, _texts("0", "1", **WORDS), _fact("use_aiter_moe", facts.unstripped_state)),
    Axis("unread", UNREAD, lambda _: {}),
)
"""In the order in which a cell's id names them."""
AXIS = {axis.name: index for index, axis in enumerate(AXES)}
VARIABLES = tuple(name for name in AXIS if name.startswith("VLLM_"))
MALFORMED = {facts.FLASHINFER: "true", facts.FLASHINFER_BACKEND: "Latency", facts.DEEP_GEMM: "1.0"} | {
    facts.MOE_DEEP_GEMM: "0x1"
}
"""A text that its variable's parser refuses, of each variable with a parser."""
WELL_FORMED = {
    name: ("unset", "throughput", "latency", "masked_gemm") if name == facts.FLASHINFER_BACKEND else ("unset", "0", "1")
    for name in VARIABLES
}
"""The plain values of each variable."""

_read = set(chain.from_iterable(axis.read(next(iter(axis.values.values()))) for axis in AXES))
if _read != set(facts.FACTS):
    raise AssertionError(f"the axes read {sorted(_read ^ set(facts.FACTS))} too much or too little")
