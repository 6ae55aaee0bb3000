"""Compiles every kernel for the devices named on the command line and prints what came out, as JSON.

`python compile_kernels.py sm90 gfx942` needs no GPU. A program of its own, because triton decides when it is imported
whether it compiles or interprets, and the tests around it may want it to interpret.
"""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fp8moe.kernels.activation import silu_mul_quantize_kernel
from fp8moe.kernels.grouped_gemm import grouped_gemm_kernel
from fp8moe.kernels.quantize import quantize_kernel
from fp8moe.kernels.reduce import weighted_sum_kernel

GROUPS = {"AMAX_FLOOR": 1e-10, "GROUP": 128, "ROWS": 16}
GEMM = {"HAS_BIAS": True, "BLOCK": 128}
GEMM_POINTERS = {
    "a": "*fp8e4nv",
    "a_scale": "*fp32",
    "w": "*fp8e4nv",
    "w_scale": "*fp32",
    "bias": "*bf16",
    "c": "*fp32",
    "pairs": "*i32",
    "tile_experts": "*i32",
}
SILU_POINTERS = {"gate_up": "*fp32", "local_ids": "*i32", "codes": "*u8", "scales": "*fp32"}
REDUCE_POINTERS = {"y": "*fp32", "weights": "*fp32", "local_ids": "*i32", "output": "*bf16"}

# Kernel, constants, and the types of its pointers; every other argument is an i32.
KERNELS: dict[str, tuple[Any, dict[str, Any], dict[str, str]]] = {
    "quantize": (quantize_kernel, GROUPS, {"x": "*bf16", "codes": "*u8", "scales": "*fp32"}),
    "gemm16": (grouped_gemm_kernel, {**GEMM, "TILE_ROWS": 16}, GEMM_POINTERS),
    "gemm64": (grouped_gemm_kernel, {**GEMM, "TILE_ROWS": 64}, GEMM_POINTERS),
    "silu": (silu_mul_quantize_kernel, GROUPS, SILU_POINTERS),
    "reduce": (weighted_sum_kernel, {"WEIGHTED": True, "BLOCK": 1024}, REDUCE_POINTERS),
}
ONES = ("stride_a_k", "stride_w_k", "stride_column", "stride_output_column", "stride_weights_slot")
COUNTS = ("rows", "pairs_per_row", "tiles", "top_k", "stride_a_scale_row", "stride_a_scale_k", "stride_w_scale_k")
"""Any numbers; the arguments that are in neither list are multiples of 16, as pointers and sizes usually are."""

INSTRUCTION = re.compile(r"^\s*(?:@\S+\s+)?([a-z][a-z0-9_]*(?:\.[a-z0-9_:]+)*)\b", re.MULTILINE)


def compiled(name: str, target: GPUTarget) -> Any:
    """As a launch with contiguous tensors compiles it."""
    kernel, constants, pointers = KERNELS[name]
    constants = {**constants, **{name: 1 for name in ONES if name in kernel.arg_names}}
    signature = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in kernel.arg_names}
    constexprs = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    aligned = {
        (position,): [["tt.divisibility", 16]]
        for position, name in enumerate(kernel.arg_names)
        if name not in constants and name not in COUNTS
    }
    options = {"num_warps": 4, "num_stages": 3, "enable_fp_fusion": False}
    return triton.compile(ASTSource(kernel, signature, constexprs, aligned), target=target, options=options)


def target_of(name: str) -> GPUTarget:
    return GPUTarget("cuda", int(name[2:]), 32) if name.startswith("sm") else GPUTarget("hip", name, 64)


def report(name: str, target: str) -> dict[str, Any]:
    result = compiled(name, target_of(target))
    text = result.asm["ptx" if target.startswith("sm") else "amdgcn"]
    return {"shared": result.metadata.shared, "instructions": sorted(set(INSTRUCTION.findall(text)))}


if __name__ == "__main__":
    print(json.dumps({target: {name: report(name, target) for name in KERNELS} for target in sys.argv[1:]}))
