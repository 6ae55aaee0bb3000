"""Compiles one kernel for one target. Imports triton, in a process in which it compiles and does not interpret."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import time
from functools import lru_cache
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget

from conformance.compiled.claims import claims_for, class_refusal
from conformance.compiled.outcome import Facts, Outcome, judge, spilled_amd, spilled_nvidia
from conformance.compiled.targets import CompileTarget
from conformance.results import Status
from fp8moe.kernels.variants import VARIANTS, compile_variant

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def outcome_of(target: CompileTarget, kernel: str) -> Outcome:
    """Compiles what is claimed, tries what must be refused, and judges."""
    missing = missing_toolchain(target.backend)
    if missing:
        return Outcome(target.name, kernel, Status.NOT_RUN, missing)
    variant = VARIANTS[kernel]
    if variant.shared > target.shared_bytes:
        needs = f"launched only where a multiprocessor has {variant.shared} bytes of shared memory"
        return Outcome(target.name, kernel, Status.NOT_APPLICABLE, f"{needs}: a program has {target.shared_bytes} here")
    claims = claims_for(target)
    started, facts, refusal = time.perf_counter(), None, None
    claimed = claims.covers(variant.fp8)
    if claimed or (target.without_e4m3 and variant.fp8):
        facts = compile_facts(target, kernel)
    if not claimed:
        refusal = class_refusal(target)
    status, reason = judge(target, fp8=variant.fp8, claims=claims, facts=facts, refusal=refusal)
    told = facts or Facts()
    return Outcome(
        target.name,
        kernel,
        status,
        reason,
        told.shared_bytes,
        told.tensor_columns,
        told.spilled_bytes,
        round(time.perf_counter() - started, 2),
    )


def compile_facts(target: CompileTarget, kernel: str) -> Facts:
    """What the compiler gives for it; whatever it raises is its answer."""
    try:
        compiled = compile_variant(kernel, GPUTarget(target.backend, target.arch, target.warp_size))
    except Exception as error:
        return Facts(error=f"{type(error).__name__}: {error}")
    metadata = compiled.metadata
    return Facts(metadata.shared, getattr(metadata, "tmem_size", None) or 0, _spilled(compiled, target))


def _spilled(compiled: Any, target: CompileTarget) -> int:
    if target.backend == "hip":
        return spilled_amd(compiled.asm["amdgcn"])
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(_tool("cuobjdump")), "--dump-resource-usage", file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return spilled_nvidia(done.stdout)


@lru_cache
def _tool(name: str) -> Path | None:
    """A program of CUDA's: the one beside Triton, else one on the path."""
    beside = TOOLS / name
    found = str(beside) if beside.is_file() else shutil.which(name)
    return None if found is None else Path(found)


@lru_cache
def missing_toolchain(backend: str) -> str:
    """What this Triton lacks to compile for a vendor's devices; "" where nothing."""
    from triton.backends import backends

    name = {"cuda": "nvidia", "hip": "amd"}[backend]
    if name not in backends:
        return f"this Triton ({triton.__version__}) was built without its {name} backend"
    if name == "amd":
        from triton.backends.amd.compiler import HIPBackend

        find_linker = getattr(HIPBackend, "path_to_rocm_lld", None)  # until 3.4; then it has one of its own
        try:
            if find_linker is not None:
                find_linker()
        except Exception as error:
            return f"triton {triton.__version__} links with ROCm's: {error}"
    if name == "nvidia":
        lacking = [tool for tool in ("ptxas", "cuobjdump") if _tool(tool) is None]
        if lacking:
            return f"no {' and no '.join(lacking)} beside Triton or on the path"
    return ""
