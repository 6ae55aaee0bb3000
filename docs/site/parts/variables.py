"""Environment variables: how the selector's are read, found by giving texts to their parsers, and the others."""

from __future__ import annotations

from conformance.sanitizer.tool import ROOTS
from fp8moe.backends.flashinfer_cutlass import BLOCK_NVCC
from fp8moe.backends.flashinfer_modules import NO_JIT
from fp8moe.envs import (
    AITER,
    AITER_MOE,
    DEEP_GEMM,
    FLASHINFER_BACKEND,
    FLASHINFER_CHOICES,
    FLASHINFER_FP8,
    FORCE_MARLIN,
    MOE_DEEP_GEMM,
    SELECTOR_VARIABLES,
    Env,
    MalformedVariable,
)
from fp8moe.libraries import VLLM_OPS
from fp8moe.plug_ins import STRICT
from parts.markdown import code, prose, table

TEXTS = ("", "0", "1", "2", "true", "TRUE", " 1 ", "yes", "off", *FLASHINFER_CHOICES)
READ_BY = {
    FLASHINFER_FP8: "flashinfer",
    FLASHINFER_BACKEND: "flashinfer_backend",
    DEEP_GEMM: "deep_gemm",
    MOE_DEEP_GEMM: "deep_gemm",
    FORCE_MARLIN: "force_marlin",
    AITER: "aiter",
    AITER_MOE: "aiter",
}
"""The property of `Env` that answers for a rule."""
TOGETHER = {AITER_MOE: {AITER: "1"}}
"""What has to be set beside a variable for it to make a difference."""
OTHERS = {
    "VLLM_MOE_DP_CHUNK_SIZE": "a positive integer: the default of `FusedMoEConfig.max_num_tokens`; unset: 256",
    VLLM_OPS: "a folder with vLLM's compiled operators, for a machine without vLLM: of `fp8moe platform` and the "
    "backends VLLM_CUTLASS, BATCHED_VLLM_CUTLASS and MARLIN",
    STRICT: "neither empty nor 0: where an installed package's backend does not load, selection raises, in place of "
    "a warning and a choice without it",
    "TRITON_INTERPRET": "1: our Triton kernels run in Triton's interpreter; the suite sets it itself on a machine "
    "without a GPU",
    NO_JIT: "FlashInfer's own: where it is set FLASHINFER_CUTLASS takes only modules that were built ahead of time",
    BLOCK_NVCC: "FlashInfer's own: the compiler that its block-scaled kernels are built with when they are used",
    " or ".join(ROOTS): "the CUDA toolkit, where `fp8moe sanitize` looks for compute-sanitizer that is not on `PATH`",
    "COLUMNS": "the width of printed tables, where standard output is no terminal",
}
"""What else is read; the selector reads none of it."""


def selector_variables() -> str:
    """
    Raises:
        LookupError: a variable that is not in `READ_BY`.
    """
    rows = []
    for name in SELECTOR_VARIABLES:
        said: dict[str, list[str]] = {}
        for given in TEXTS:
            said.setdefault(_read(name, given), []).append(code(f'"{given}"'))
        rows.append((code(name), *(", ".join(said.get(word, ())) or "-" for word in ("on", "off", "an error"))))
    return table(("variable", "read as on", "read as off", "an error"), rows)


def _read(name: str, given: str) -> str:
    try:
        value = getattr(Env.of({**TOGETHER.get(name, {}), name: given}), READ_BY[name])
    except MalformedVariable:
        return "an error"
    return "on" if value else "off"


def other_variables() -> str:
    return table(("variable", "what it is for"), ((code(name), prose(says)) for name, says in OTHERS.items()))
