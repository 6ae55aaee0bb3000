"""What FlashInfer's builder needs on a machine: programs, headers, libraries; and what to do where one is missing."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

from fp8moe.backends.flashinfer_modules import NO_JIT

EXTRA_CUDA, EXTRA_CXX = "FLASHINFER_EXTRA_CUDAFLAGS", "FLASHINFER_EXTRA_CFLAGS"
EXTRA_LINK = "FLASHINFER_EXTRA_LDFLAGS"
HEADERS = ("cublasLt.h", "curand_kernel.h", "nvrtc.h")
LIBRARIES = ("cudart", "cuda", "nvrtc")
"""Of CUDA's libraries: what a bare compiler comes without, and what the module is linked with."""


def missing_tools(env: Mapping[str, str], cuda_home: Callable[[], str]) -> list[str]:
    """What a build lacks of programs and headers, one line each, with its remedy.

    Args:
        env: the builder's environment.
        cuda_home: FlashInfer's own way to find CUDA; may raise where there is none.
    """
    lacking = []
    if env.get(NO_JIT):
        lacking.append(f"{NO_JIT}={env[NO_JIT]} forbids FlashInfer to build: unset it")
    try:
        home = cuda_home()
    except Exception as error:  # as it comes: a RuntimeError, or a program that is not there
        home = ""
        lacking.append(f"CUDA: FlashInfer finds none ({error}); install the CUDA toolkit, and set CUDA_HOME to it")
    compilers = {"nvcc": env.get("FLASHINFER_NVCC") or f"{home}/bin/nvcc", "a C++ compiler": env.get("CXX") or "c++"}
    for what, program in compilers.items():
        if (home or what != "nvcc") and not shutil.which(program, path=env["PATH"]):
            names = "FLASHINFER_NVCC, or CUDA_HOME" if what == "nvcc" else "CXX"
            lacking.append(f"{what}: no {program}; install it, or set {names}")
    if not shutil.which("ninja", path=env["PATH"]):
        lacking.append("ninja: not on PATH; pip install ninja")
    if home:
        lacking += _missing_headers(env, Path(home))
    if home and shutil.which(compilers["a C++ compiler"], path=env["PATH"]):
        lacking += _missing_libraries(env, Path(home), compilers["a C++ compiler"])
    return lacking


def _missing_headers(env: Mapping[str, str], home: Path) -> list[str]:
    flags = shlex.split(env.get(EXTRA_CUDA, ""))
    folders = [Path(after) for flag, after in pairwise(flags) if flag in ("-I", "-isystem")]
    folders += [Path(flag[2:]) for flag in flags if flag.startswith("-I")]
    folders += [Path(name) for name in env.get("CPATH", "").split(os.pathsep) if name]
    folders += [home / "include", Path("/usr/include"), Path("/usr/local/include")]
    names = [name for name in HEADERS if not any((folder / name).is_file() for folder in folders)]
    if not names:
        return []
    beside = [_beside_torch(name) for name in names]
    if None in beside:
        remedy = "install the development packages of cuBLAS, cuRAND and NVRTC"
    else:
        found = " ".join(f"-isystem {folder}" for folder in dict.fromkeys(beside))
        remedy = f"torch has them: set {EXTRA_CUDA}='{found}' and {EXTRA_CXX} as well, now and wherever it is used"
    return [f"headers: no {', '.join(names)} in {home / 'include'}; {remedy}"]


def _beside_torch(header: str) -> Path | None:
    """The folder that has it among the wheels of CUDA's libraries."""
    found = (path for entry in sys.path if entry for path in Path(entry).glob(f"nvidia/*/include/{header}"))
    return next((path.parent for path in found), None)


def _missing_libraries(env: Mapping[str, str], home: Path, compiler: str) -> list[str]:
    """Asked of the linker, since the build comes to it only at its end."""
    folders = [f"-L{home / 'lib64'}", f"-L{home / 'lib64' / 'stubs'}", *shlex.split(env.get(EXTRA_LINK, ""))]
    names = []
    with TemporaryDirectory() as place:
        for name in LIBRARIES:
            command = [compiler, "-shared", "-o", f"{place}/found.so", *folders, f"-l{name}"]
            if subprocess.run(command, env=env, capture_output=True, check=False).returncode:
                names.append(f"lib{name}.so")
    if not names:
        return []
    return [
        f"libraries: the linker finds no {', '.join(names)} with {home / 'lib64'}; install the development packages of "
        f"the CUDA toolkit, or name their folder: {EXTRA_LINK}=-L..., now and wherever it is used"
    ]
