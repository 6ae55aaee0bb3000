"""A vLLM played in this process: the names of its selector's modules, its types, its probes and their memos.

What it decides is fp8moe's decision for the platform that its probes tell of, so that it agrees where the platform has
been put under it whole; a fault can be planted.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, fields, make_dataclass
from enum import Enum, IntEnum
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import torch

from fp8moe import Fp8MoeBackend as Backends
from fp8moe import FusedMoEConfig, FusedMoEParallelConfig, GroupShape, Platform, QuantKey, RoutingMethodType, ScaleDesc
from fp8moe.envs import AITER, FLASHINFER_BACKEND, FLASHINFER_FP8, MalformedVariable
from fp8moe.refusals import BackendNotSupported, NoBackendFits
from fp8moe.registry import Reason, seed_backends
from fp8moe.selector import select_fp8_moe_backend

LAYERS = "vllm.model_executor.layers.fused_moe"
QUANT = "vllm.model_executor.layers.quantization.utils.quant_utils"
TOKENS = {
    Reason.DEVICE: "current device",
    Reason.GATING: "no act_and_mul MLP layer",
    Reason.ACTIVATION: "some activation",
    Reason.SCHEME: "quantization scheme",
    Reason.PARALLEL: "parallel config",
    Reason.ROUTING: "routing method",
    Reason.FORMAT: "('standard',) activation format",
    Reason.LOGITS_DTYPE: "float32 router_logits with non-DeepSeekV3 routing",
}
FaultyAnswer = Callable[[tuple[Any, ...], Platform], tuple[Any, ...]]


class Enumerated(Enum):
    CUDA = 1
    ROCM = 2
    TPU = 3
    XPU = 4
    CPU = 5
    OOT = 6


class Capability(NamedTuple):
    major: int
    minor: int


class PlayedPlatform:
    """The class that every platform is of; the one that is here is a CPU."""

    _enum = Enumerated.CPU

    @classmethod
    def get_device_capability(cls) -> Capability | None:
        return None


@dataclass(frozen=True)
class Scale:
    dtype: torch.dtype
    static: bool
    group_shape: tuple[int, int]


@dataclass(frozen=True)
class Key:
    dtype: torch.dtype
    scale: Scale
    scale2: Scale | None
    symmetric: bool


class Shape(NamedTuple):
    row: int
    col: int


Routing = IntEnum("Routing", {method.name: method.value for method in RoutingMethodType})  # type: ignore[misc]
Parallel = make_dataclass("FusedMoEParallelConfig", [(field.name, Any) for field in fields(FusedMoEParallelConfig)])
Config = make_dataclass("FusedMoEConfig", [(field.name, Any) for field in fields(FusedMoEConfig)])


def modules(version: str = "0.16.0", fault: FaultyAnswer | None = None) -> dict[str, ModuleType]:
    """By name; `fault` changes the arguments that the decision is taken for."""
    found: dict[str, ModuleType] = {}

    def module(name: str, **names: Any) -> ModuleType:
        made = found[name] = ModuleType(name)
        made.__file__ = f"{name}.py"
        vars(made).update(names)
        return made

    module("vllm", __version__=version)
    platforms = module("vllm.platforms", PlatformEnum=Enumerated, current_platform=PlayedPlatform())
    module("vllm.platforms.interface", Platform=PlayedPlatform, DeviceCapability=Capability)
    for name, cls in (("cuda", "CudaPlatformBase"), ("xpu", "XPUPlatform"), ("cpu", "CpuPlatform")):
        module(f"vllm.platforms.{name}", **{cls: PlayedPlatform})

    rocm = module("vllm.platforms.rocm", RocmPlatform=PlayedPlatform, _get_gcn_arch_via_amdsmi=lambda: "none here")
    rocm.on_gfx9 = cache(
        lambda: any(arch in rocm._get_gcn_arch_via_amdsmi() for arch in ("gfx90a", "gfx942", "gfx950"))
    )  # type: ignore[attr-defined]

    flashinfer = module(
        "vllm.utils.flashinfer",
        has_flashinfer_cutlass_fused_moe=cache(lambda: False),
        has_flashinfer_trtllm_fused_moe=cache(lambda: False),
    )
    deep_gemm = module("vllm.utils.deep_gemm", has_deep_gemm=lambda: False)
    deep_gemm.is_deep_gemm_supported = cache(lambda: deep_gemm.has_deep_gemm())  # type: ignore[attr-defined]
    operators = module("vllm._custom_ops", torch=torch)
    operators.cutlass_group_gemm_supported = (  # type: ignore[attr-defined]
        lambda capability: 90 <= capability < 110 and operators.torch.ops._C.cutlass_group_gemm_supported(capability)
    )
    module("vllm.envs", disable_envs_cache=lambda: None)

    class Aiter:
        enabled: str | None = "as it was loaded"

        @classmethod
        def refresh_env_variables(cls) -> None:
            cls.enabled = os.environ.get(AITER)

    aiter = module("vllm._aiter_ops", IS_AITER_FOUND=False, rocm_aiter_ops=Aiter)
    module(f"{LAYERS}.config", FusedMoEConfig=Config, FusedMoEParallelConfig=Parallel, RoutingMethodType=Routing)
    module(QUANT, QuantKey=Key, ScaleDesc=Scale, GroupShape=Shape, FP8_DTYPE=torch.float8_e4m3fn)
    # what has its own hold on the two, as after `from ... import`
    taken = module(
        f"{LAYERS}.flashinfer_cutlass_moe",
        current_platform=platforms.current_platform,
        usable=flashinfer.has_flashinfer_cutlass_fused_moe,
    )

    def seen() -> Platform:
        """The platform that the probes tell of."""
        here = taken.current_platform
        capability = here.get_device_capability()
        number = -1 if capability is None else 10 * capability.major + capability.minor
        cuda = here._enum is Enumerated.CUDA
        usable = {
            "flashinfer": taken.usable(),
            "deep_gemm": deep_gemm.is_deep_gemm_supported(),
            "aiter": aiter.IS_AITER_FOUND and Aiter.enabled == os.environ.get(AITER),
            "vllm": True,
        }
        return Platform(
            here._enum.name.lower(),
            capability,
            ("gfx942" if rocm.on_gfx9() else "gfx1100") if here._enum is Enumerated.ROCM else None,
            (12, 9) if cuda and operators.cutlass_group_gemm_supported(number) else None,
            frozenset(name for name, is_usable in usable.items() if is_usable),
        )

    classes = {spec.name: type(spec.name, (), {}) for spec in seed_backends() if spec.returns_class}

    def backend_to_kernel_cls(backend: Backends) -> type:
        if backend.value not in classes:
            raise NotImplementedError
        return classes[backend.value]

    def select(config: Any, weight_key: Any, activation_key: Any, allow_vllm_cutlass: bool = False) -> Any:
        call = (_config(config), _key(weight_key), _key(activation_key), allow_vllm_cutlass)
        platform = seen()
        if fault is not None:
            call = fault(call, platform)  # type: ignore[assignment]
        try:
            backend, cls = select_fp8_moe_backend(
                *call, platform=platform, env=dict(os.environ), backends=seed_backends()
            )
        except MalformedVariable as error:
            if error.variable == FLASHINFER_BACKEND:
                text = f"Invalid value '{error.text}' for {error.variable}. Valid options: none."
                raise ValueError(text) from None
            int(error.text)
            raise AssertionError("it is an integer") from None
        except BackendNotSupported as error:
            reason = f"kernel does not support {TOKENS[error.reason]}"
            raise ValueError(f"FP8 MoE backend {error.backend.value} does not support it since {reason}.") from None
        except NoBackendFits as error:
            why = f"{FLASHINFER_FP8}=1" if error.rule == "R3c" else "No FP8 MoE backend supports it"
            raise NotImplementedError(why) from None
        except ValueError:
            raise ValueError("FlashInfer MaskedGEMM: not with FP8") from None
        return backend, None if cls is None else classes[backend.value]

    module(
        f"{LAYERS}.oracle.fp8",
        Fp8MoeBackend=Backends,
        backend_to_kernel_cls=backend_to_kernel_cls,
        select_fp8_moe_backend=select,
    )
    return found


def _config(theirs: Any) -> FusedMoEConfig:
    given = dict(vars(theirs))
    given["moe_parallel_config"] = FusedMoEParallelConfig(**vars(theirs.moe_parallel_config))
    return FusedMoEConfig(**given | {"routing_method": RoutingMethodType[theirs.routing_method.name]})


def _key(theirs: Any) -> QuantKey | None:
    if theirs is None:
        return None

    def scale(desc: Any) -> ScaleDesc:
        return ScaleDesc(desc.dtype, desc.static, GroupShape(*desc.group_shape))

    second = None if theirs.scale2 is None else scale(theirs.scale2)
    return QuantKey(theirs.dtype, scale(theirs.scale), second, theirs.symmetric)
