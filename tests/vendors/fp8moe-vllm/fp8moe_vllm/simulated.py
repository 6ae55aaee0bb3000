"""A platform that is not here, put under vLLM's selector: device, libraries, and what vLLM remembers of them."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from fp8moe import Platform
from fp8moe.registry import BackendUnavailable
from fp8moe_vllm.theirs import load, need

KINDS = {"cuda": "CUDA", "rocm": "ROCM", "tpu": "TPU", "xpu": "XPU", "cpu": "CPU"}
"""Names of vLLM's platforms; any other kind is one from out of its tree."""
BASES = {
    "cuda": ("vllm.platforms.cuda", "CudaPlatformBase"),
    "rocm": ("vllm.platforms.rocm", "RocmPlatform"),
    "xpu": ("vllm.platforms.xpu", "XPUPlatform"),
    "cpu": ("vllm.platforms.cpu", "CpuPlatform"),
}
"""vLLM's own classes, of which only the capability is replaced."""
COMPILED = (
    *("vllm._C", "vllm._C_stable_libtorch", "vllm_xpu_kernels"),
    *("vllm_xpu_kernels._C", "vllm_xpu_kernels._moe_C", "vllm_xpu_kernels._xpu_C"),
)
"""What vLLM's modules of platforms load, whether it is called or not."""
MEMO = type(lru_cache(repr))
OLDEST_TOOLKIT = {9: (12, 3), 10: (12, 8)}
"""By a capability's major number: what vLLM's grouped CUTLASS kernels must be compiled with (specification 2.3)."""


class Now:
    """The platform that vLLM sees at present."""

    platform: Platform


class Standing:
    """In place of vLLM's `current_platform`, in every module that holds it."""

    def __init__(self, now: Now) -> None:
        enum, interface = need(load("vllm.platforms"), "PlatformEnum"), load("vllm.platforms.interface")
        self._plain = need(interface, "Platform")
        self._capability = need(interface, "DeviceCapability")
        need(self._plain, "get_device_capability")
        self._now, self._made = now, {kind: self._of(kind, need(enum, name)) for kind, name in KINDS.items()}
        self._foreign = self._of("out of tree", need(enum, "OOT"))

    def _of(self, kind: str, member: Any) -> Any:
        def get_device_capability(cls: type, device_id: int = 0) -> Any:
            pair = self._now.platform.capability
            return None if pair is None else self._capability(*pair)

        module, name = BASES.get(kind, ("", ""))
        base = need(_loaded_anywhere(module), name) if name else self._plain
        body = {"_enum": member, "get_device_capability": classmethod(get_device_capability)}
        if base is self._plain:
            body |= {"device_name": kind, "device_type": kind}
        return type("Simulated", (base,), body)()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._made.get(self._now.platform.kind, self._foreign), name)


def _loaded_anywhere(module: str) -> Any:
    """A platform's module where its device and the compiled parts for it are not: it loads them, or looks at it.

    Nothing compiled is called here; what does not load stands empty while the module is loaded.
    """
    if module in sys.modules:
        return load(module)
    empty = [name for name in COMPILED if not _loads(name)]
    cuda: Any = torch.cuda
    properties = cuda.get_device_properties
    sys.modules.update({name: ModuleType(name) for name in empty})
    cuda.get_device_properties = lambda *_: SimpleNamespace(gcnArchName="")
    try:
        return load(module)
    finally:
        cuda.get_device_properties = properties
        for name in empty:
            del sys.modules[name]


def _loads(module: str) -> bool:
    try:
        importlib.import_module(module)
    except Exception:
        return False
    return True


class Simulated:
    """Simulated platforms under vLLM, from `with` to its end.

    Raises:
        BackendUnavailable: a name that has to be replaced is not there.
    """

    def __init__(self) -> None:
        self.now = Now()
        self.now.platform = Platform("cpu")
        self._before: list[tuple[Any, str, Any]] = []
        self._memos: list[Any] = []

    def __enter__(self) -> Simulated:
        try:
            self._place()
        except BaseException:
            self._restore()
            raise
        self._memos = memos()
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()
        self.forget()

    def become(self, platform: Platform) -> None:
        """What vLLM asks from here on it is told of this platform."""
        self.now.platform = platform
        self._aiter.IS_AITER_FOUND = platform.has("aiter")
        for owner, name in self._architectures:
            setattr(owner, name, platform.gcn_arch or "")
        self.forget()

    def forget(self) -> None:
        for memo in self._memos:
            memo.cache_clear()

    def _place(self) -> None:
        now = self.now
        standing = Standing(now)  # loads vLLM's platforms, so before anything is replaced
        flashinfer, deep_gemm = load("vllm.utils.flashinfer"), load("vllm.utils.deep_gemm")
        self._aiter, operators = load("vllm._aiter_ops"), load("vllm._custom_ops")
        need(operators, "cutlass_group_gemm_supported")
        self._keep(self._aiter, "IS_AITER_FOUND")
        self._everywhere(load("vllm.platforms"), "current_platform", standing)
        for name in ("has_flashinfer_cutlass_fused_moe", "has_flashinfer_trtllm_fused_moe"):
            self._everywhere(flashinfer, name, lambda: now.platform.has("flashinfer"))
        self._everywhere(deep_gemm, "has_deep_gemm", lambda: now.platform.has("deep_gemm"))
        compiled = SimpleNamespace(cutlass_group_gemm_supported=self._cutlass_is_compiled)
        self._replace(operators, "torch", SimpleNamespace(ops=SimpleNamespace(_C=compiled)))
        self._place_architecture(load("vllm.platforms.rocm"))

    def _place_architecture(self, rocm: Any) -> None:
        need(rocm, "on_gfx9")
        self._architectures: list[tuple[Any, str]] = []
        if hasattr(rocm, "_get_gcn_arch_via_amdsmi"):
            self._everywhere(rocm, "_get_gcn_arch_via_amdsmi", lambda: self.now.platform.gcn_arch or "")
        else:  # later versions look once, while they are loaded
            self._keep(rocm, "_GCN_ARCH")
            self._architectures.append((rocm, "_GCN_ARCH"))
            self._everywhere(rocm, "on_gfx9", lambda: self.now.platform.is_rocm_gfx9)
            self._everywhere(rocm, "on_mi3xx", lambda: self.now.platform.has_gcn_arch("gfx942", "gfx950"))

    def _cutlass_is_compiled(self, capability: int) -> bool:
        """vLLM's compiled operator, which tells what it was compiled with."""
        toolkit = self.now.platform.cuda_version
        return toolkit is not None and toolkit >= OLDEST_TOOLKIT.get(capability // 10, (sys.maxsize, 0))

    def _keep(self, owner: Any, name: str) -> Any:
        value = need(owner, name)
        self._before.append((owner, name, value))
        return value

    def _replace(self, owner: Any, name: str, by: Any) -> None:
        self._keep(owner, name)
        setattr(owner, name, by)

    def _everywhere(self, owner: Any, name: str, by: Any) -> None:
        """Also in the modules that have taken it by `from ... import`."""
        value = need(owner, name)
        self._replace(owner, name, by)
        for module in vllm_modules():
            for own, held in list(vars(module).items()):
                if held is value:
                    self._replace(module, own, by)

    def _restore(self) -> None:
        while self._before:
            owner, name, value = self._before.pop()
            setattr(owner, name, value)


def vllm_modules() -> list[Any]:
    return [
        module for name, module in list(sys.modules.items()) if module is not None and name.partition(".")[0] == "vllm"
    ]


def memos(but: str = "\0") -> list[Any]:
    """Functions of vLLM's that keep their answers, methods too; not those of modules whose name begins so."""
    found = {}
    for module in vllm_modules():
        if module.__name__.startswith(but):
            continue
        for value in list(vars(module).values()):
            parts = list(vars(value).values()) if isinstance(value, type) else [value]
            for part in parts:
                function = part.__func__ if isinstance(part, (classmethod, staticmethod)) else part
                if isinstance(function, MEMO):
                    found[id(function)] = function
    return list(found.values())


@contextmanager
def here() -> Iterator[Callable[[], None]]:
    """The real platform: gives a function that clears what vLLM has kept of the variables."""
    kept = memos(but="vllm.platforms")

    def forget() -> None:
        for memo in kept:
            memo.cache_clear()

    yield forget
    forget()


def unmoved(what: str) -> BackendUnavailable:
    return BackendUnavailable(
        f"fp8moe_vllm.selection: vLLM's selector answers the same with and without {what}: what this command puts in "
        "place of its probe is not asked"
    )
