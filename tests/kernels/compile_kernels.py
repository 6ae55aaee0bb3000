"""Compiles kernels for devices that are not here and prints what came out, as JSON: {target: {variant: ...}}.

`python compile_kernels.py sm90 gfx942:gemm` compiles every variant for the first and those that begin with `gemm` for
the second. A program of its own, because triton decides when it is imported whether it compiles or interprets, and the
tests around it may want it to interpret.
"""

from __future__ import annotations

import json
import re
import sys
from typing import Any

from triton.backends.compiler import GPUTarget

from fp8moe.kernels.variants import VARIANTS, compile_variant

INSTRUCTION = re.compile(r"^\s*(?:@\S+\s+)?([a-z][a-z0-9_]*(?:\.[a-z0-9_:]+)*)\b", re.MULTILINE)

WGMMA_START = re.compile(r"wgmma\.mma_async\S+ \{[^}]*\}, %rd\d+, %rd\d+, %?(0|p)")
"""Whether a wgmma starts from zero (0), or from its accumulator where a predicate says so (p)."""


def target_of(name: str) -> GPUTarget:
    return GPUTarget("cuda", int(name[2:]), 32) if name.startswith("sm") else GPUTarget("hip", name, 64)


def report(name: str, target: str) -> dict[str, Any]:
    result = compile_variant(name, target_of(target))
    text = result.asm["ptx" if target.startswith("sm") else "amdgcn"]
    return {
        "shared": result.metadata.shared,
        "instructions": sorted(set(INSTRUCTION.findall(text))),
        "starts": WGMMA_START.findall(text),
    }


def reports(argument: str) -> tuple[str, dict[str, Any]]:
    target, _, prefix = argument.partition(":")
    return target, {name: report(name, target) for name in VARIANTS if name.startswith(prefix)}


if __name__ == "__main__":
    print(json.dumps(dict(map(reports, sys.argv[1:]))))
