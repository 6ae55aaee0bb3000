"""What the selector's predicate claims for a target, and whether our class refuses what the predicate refuses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode

from conformance.build import build, config_of
from conformance.cases import Case
from conformance.compiled.targets import CompileTarget
from fp8moe.backends import triton_stages
from fp8moe.backends.triton_experts import TritonExperts
from fp8moe.config import FusedMoEActivationFormat
from fp8moe.envs import Env
from fp8moe.experts import MoEWeights
from fp8moe.platforms import PLATFORMS, Platform
from fp8moe.registry import BackendUnavailable
from fp8moe.schemes import SCHEMES

UNQUANTISED = "none"
TINY = Case(tokens=1, experts=2, top_k=1, hidden=128, inter=128)
SUPPORTED = PLATFORMS["h100"]
"""The control: a device where the class has to construct."""


@dataclass(frozen=True)
class Claims:
    """Whether any FP8 scheme, and whether unquantised weights, are supported by rule."""

    fp8: bool
    unquantised: bool

    def covers(self, fp8: bool) -> bool:
        """A kernel that needs e4m3, or one that needs nothing but Triton."""
        return self.fp8 if fp8 else self.unquantised


def claims_for(target: CompileTarget) -> Claims:
    """The word of `TritonExperts.is_supported_config`, which is what the selector goes by."""
    supported = {name for name in SCHEMES if _supported(name, target.platform)}
    return Claims(fp8=bool(supported - {UNQUANTISED}), unquantised=UNQUANTISED in supported)


def _supported(scheme: str, platform: Platform) -> bool:
    config = config_of(TINY)
    supported, _ = TritonExperts.is_supported_config(
        TritonExperts,
        config,
        *SCHEMES[scheme],
        FusedMoEActivationFormat.Standard,
        platform=platform,
        env=Env.of({}),
    )
    return supported


class _OnGpu(torch.Tensor):
    """A tensor of this machine's memory that says it is on a GPU: enough for a constructor, which launches nothing."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda", 0)


class _GpuMemoryHere(TorchFunctionMode):
    """What is allocated on a GPU comes from this machine's memory."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cuda":
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


@lru_cache
def class_refusal(target: CompileTarget) -> str | None:
    """Why our class does not construct on this device with FP8 weights; None where it does.

    Needs a process in which triton compiles: the interpreter stands for another platform.

    Raises:
        RuntimeError: it does not construct on the control either, so that refusing says nothing.
    """
    if _construct(SUPPORTED) is not None:
        raise RuntimeError(f"TritonExperts does not construct on {SUPPORTED}: {_construct(SUPPORTED)}")
    return _construct(target.platform)


def _construct(platform: Platform) -> str | None:
    tensors = build(TINY)
    placed: dict[str, Any] = {
        name: None if value is None else value.as_subclass(_OnGpu) for name, value in vars(tensors.weights).items()
    }
    weights = MoEWeights(**placed)
    with mock.patch.object(triton_stages, "detected_platform", return_value=platform), _GpuMemoryHere():
        try:
            TritonExperts(tensors.config, tensors.quant, weights)
        except BackendUnavailable as error:
            return str(error)
    return None
