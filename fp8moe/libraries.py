"""Kernel libraries: which can be used here, by the rules of the specification's section 2.3, and what is missing."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

from fp8moe.platforms import LIBRARIES

FLASHINFER_CUBIN = "VLLM_HAS_FLASHINFER_CUBIN"

# Device kinds on which a library's kernels run; elsewhere its probe says so and looks no further.
KINDS = {
    "deep_gemm": ("cuda",),
    "flashinfer": ("cuda",),
    "aiter": ("rocm",),
    "vllm": ("cuda", "rocm"),
    "vllm_xpu_kernels": ("xpu",),
}
# Names of the distributions that bring a library; the first that is installed tells the version.
DISTRIBUTIONS = {
    "deep_gemm": ("deep_gemm", "sgl-deep-gemm"),
    "flashinfer": ("flashinfer-python",),
    "aiter": ("amd-aiter",),
    "vllm": ("vllm",),
    "vllm_xpu_kernels": ("vllm-xpu-kernels",),
}
INSTALL = {
    "deep_gemm": "pip install sgl-deep-gemm",
    "flashinfer": "pip install flashinfer-python flashinfer-cubin",
    "aiter": "pip install amd-aiter",
    "vllm": "pip install vllm==0.25.1",  # later ones have another Marlin
    "vllm_xpu_kernels": "pip install vllm-xpu-kernels",
}
FLASHINFER_ATTRIBUTES = (
    ("flashinfer.fused_moe", "cutlass_fused_moe"),
    ("flashinfer", "fp4_quantize"),
    ("flashinfer", "nvfp4_block_scale_interleave"),
    ("flashinfer.fused_moe", "trtllm_fp4_block_scale_moe"),
)
# vLLM's compiled operators: `_C` holds CUTLASS, `_moe_C` Marlin; a build for the CPU has only the first.
VLLM_EXTENSIONS = ("_C", "_moe_C")
VLLM_OPS = "FP8MOE_VLLM_OPS"
"""Names a folder with vLLM's compiled operators, for a machine without vLLM."""


@dataclass(frozen=True)
class Surroundings:
    """What detection asks about the machine it runs on; a test gives its own answers."""

    find_spec: Callable[[str], ModuleSpec | None] = importlib.util.find_spec
    import_module: Callable[[str], Any] = importlib.import_module
    which: Callable[[str], str | None] = shutil.which
    version_of: Callable[[str], str] = importlib.metadata.version
    read_text: Callable[[str], str] = lambda path: Path(path).read_text(encoding="utf-8", errors="replace")
    env: Mapping[str, str] = field(default_factory=lambda: os.environ)

    def version(self, *distributions: str) -> str | None:
        """The version of the first of these that is installed."""
        for name in distributions:
            try:
                return self.version_of(name)
            except Exception:  # not installed, or metadata that cannot be read
                continue
        return None


@dataclass(frozen=True)
class LibraryProbe:
    """Whether a kernel library can be used here; `detail` says where it is, or which step found it missing."""

    name: str
    present: bool
    detail: str
    version: str | None = None

    @property
    def install(self) -> str:
        """The command that installs it."""
        return INSTALL[self.name]


class _Missing(Exception):
    """A step of a probe failed; the text says what is missing."""


def one_line(error: BaseException) -> str:
    """An exception's type and first line."""
    text = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def probe_libraries(kind: str, surroundings: Surroundings | None = None) -> tuple[LibraryProbe, ...]:
    """One probe for each of `LIBRARIES`, in their order; never raises.

    Only FlashInfer is imported, and only on CUDA and after its cheaper steps passed: its rule asks for attributes.

    Args:
        kind: of the platform: "cuda", "rocm", "xpu", "cpu" …
    """
    here = surroundings or Surroundings()
    return tuple(_probe(name, kind, here) for name in LIBRARIES)


def _probe(name: str, kind: str, here: Surroundings) -> LibraryProbe:
    version = here.version(*DISTRIBUTIONS[name])
    if kind not in KINDS[name]:
        return LibraryProbe(name, False, f"its kernels run on {' and '.join(KINDS[name])} only", version)
    try:
        return LibraryProbe(name, True, _PROBES[name](here), version)
    except _Missing as missing:
        return LibraryProbe(name, False, str(missing), version)
    except (Exception, SystemExit) as error:  # a library that breaks when it is looked at is as good as absent
        return LibraryProbe(name, False, f"it is broken: {one_line(error)}", version)


def _find(module: str, here: Surroundings) -> ModuleSpec:
    try:
        spec = here.find_spec(module)
    except ModuleNotFoundError:  # of a parent package
        spec = None
    if spec is None:
        raise _Missing(f"module {module} is not found")
    return spec


def _folders(spec: ModuleSpec) -> Iterator[Path]:
    return (Path(folder) for folder in spec.submodule_search_locations or ())


def _where(spec: ModuleSpec) -> str:
    return spec.origin or ", ".join(map(str, _folders(spec))) or "an unknown place"


def _deep_gemm(here: Surroundings) -> str:
    try:
        return f"module deep_gemm, {_where(_find('deep_gemm', here))}"
    except _Missing as missing:
        try:
            vllm = _find("vllm", here)
        except _Missing:
            raise missing from None
        copy = _deep_gemm_of(vllm)
        if copy is None:
            raise _Missing(f"{missing}, and {_where(vllm)} holds no copy of it") from None
        return f"the copy inside vllm, {copy}"


def _deep_gemm_of(vllm: ModuleSpec) -> Path | None:
    copies = (folder / "third_party" / "deep_gemm" for folder in _folders(vllm))
    return next((copy for copy in copies if (copy / "__init__.py").is_file()), None)


def vllms_deep_gemm(surroundings: Surroundings | None = None) -> Path | None:
    """The folder of the DeepGEMM inside an installed vLLM, which is not imported; None where there is none."""
    try:
        return _deep_gemm_of(_find("vllm", surroundings or Surroundings()))
    except _Missing:
        return None


def _flashinfer(here: Surroundings) -> str:
    spec = _find("flashinfer", here)
    kernels = _flashinfer_kernels(here)
    _find("flashinfer.fused_moe", here)
    for module, attribute in FLASHINFER_ATTRIBUTES:
        if not hasattr(here.import_module(module), attribute):
            raise _Missing(f"{module}.{attribute} is missing, so this FlashInfer is too old or too new")
    return f"module flashinfer, {_where(spec)}; kernels from {kernels}"


def _flashinfer_kernels(here: Surroundings) -> str:
    """Where its kernels come from: built already, or a compiler to build them."""
    try:
        return f"flashinfer_cubin, {_where(_find('flashinfer_cubin', here))}"
    except _Missing as missing:
        text = here.env.get(FLASHINFER_CUBIN, "0")
        try:
            if int(text) != 0:
                return f"{FLASHINFER_CUBIN}={text}"
            note = ""
        except ValueError:
            note = f" ({FLASHINFER_CUBIN}={text!r} is no integer)"
        nvcc = here.which("nvcc")
        if nvcc is None:
            raise _Missing(
                f"{missing}, {FLASHINFER_CUBIN} is not on{note}, and no nvcc is on PATH: it has no kernels and cannot "
                "build any"
            ) from None
        return f"nvcc, {nvcc}"


def _vllm(here: Surroundings) -> str:
    files, place = _vllm_files(here)
    return f"operators in {', '.join(path.name for path in files.values())} of {place}"


def _vllm_files(here: Surroundings) -> tuple[dict[str, Path], str]:
    """The file of each extension, and where they are in words."""
    named = here.env.get(VLLM_OPS)
    if named:
        folders, place, lacks = [Path(named)], f"{VLLM_OPS}={named}", "expected both in one folder"
    else:
        spec = _find("vllm", here)
        folders, place, lacks = list(_folders(spec)), _where(spec), "a build without GPU kernels"
    found = {}
    for extension in VLLM_EXTENSIONS:
        files = [
            path
            for folder in folders
            for pattern in (f"{extension}.*so", f"{extension}_stable_libtorch.*so")
            for path in sorted(folder.glob(pattern))
        ]
        if not files:
            raise _Missing(f"{place} has no compiled {extension}: {lacks}")
        found[extension] = files[0]
    return found, place


def vllm_operators(surroundings: Surroundings | None = None) -> dict[str, Path]:
    """The files with vLLM's compiled operators, by extension: of the folder in `FP8MOE_VLLM_OPS`, or of an installed
    vLLM, which is not imported.

    Raises:
        FileNotFoundError: they are not there; the text says where they were looked for.
    """
    try:
        return _vllm_files(surroundings or Surroundings())[0]
    except _Missing as missing:
        raise FileNotFoundError(str(missing)) from None


_PROBES: dict[str, Callable[[Surroundings], str]] = {
    "deep_gemm": _deep_gemm,
    "flashinfer": _flashinfer,
    "aiter": lambda here: f"module aiter, {_where(_find('aiter', here))}",
    "vllm": _vllm,
    "vllm_xpu_kernels": lambda here: f"module vllm_xpu_kernels, {_where(_find('vllm_xpu_kernels', here))}",
}
