"""Questions to the selector, and its answers in words."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch

from fp8moe.config import FusedMoEConfig, FusedMoEParallelConfig, RoutingMethodType
from fp8moe.platforms import PLATFORMS
from fp8moe.registry import seed_backends
from fp8moe.schemes import SCHEMES
from fp8moe.selector import Selection, explain_fp8_moe_backend

BATCHED = {"dp_size": 2, "enable_expert_parallel": True, "all2all_backend": "deepep_low_latency"}
"""A dispatch that hands tokens to the experts in batches."""


@dataclass(frozen=True)
class Question:
    """One call of the selector; a layer of ordinary sizes, which no rule reads.

    Args:
        device: of the catalogue.
        scheme: by its name.
        layer: fields of `FusedMoEConfig` in place of the ordinary ones.
        parallel: arguments of `FusedMoEParallelConfig.make`.
        env: variables that are set.
        cutlass: `allow_vllm_cutlass`.
    """

    device: str = "h100"
    scheme: str = "block"
    layer: dict[str, Any] = field(default_factory=dict)
    parallel: dict[str, Any] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=dict)
    cutlass: bool = False

    def answer(self) -> Selection:
        """Of the eleven alone: what else is installed where the site is built is not part of it."""
        config = FusedMoEConfig(
            num_experts=8,
            experts_per_token=2,
            hidden_dim=4096,
            intermediate_size_per_partition=2048,
            num_local_experts=8,
            activation="silu",
            device="cpu",
            routing_method=RoutingMethodType.Renormalize,
            moe_parallel_config=FusedMoEParallelConfig.make(**self.parallel),
            in_dtype=torch.bfloat16,
        )
        return explain_fp8_moe_backend(
            replace(config, **self.layer),
            *SCHEMES[self.scheme],
            allow_vllm_cutlass=self.cutlass,
            platform=PLATFORMS[self.device],
            env=self.env,
            backends=seed_backends(),
        )

    def __str__(self) -> str:
        parts = [self.device, self.scheme]
        parts += ["batched"] if self.parallel == BATCHED else []
        parallel = {} if self.parallel == BATCHED else self.parallel
        for given in (self.layer, parallel, self.env):
            parts += [f"{name}={getattr(value, 'name', value)}" for name, value in given.items()]
        return ", ".join([*parts, *(["allow_vllm_cutlass"] if self.cutlass else [])])


def outcome(selection: Selection) -> str:
    """The backend's name, NONE, or the error's first line."""
    if selection.error is not None:
        return f"{type(selection.error).__name__}: {str(selection.error).splitlines()[0]}"
    assert selection.backend is not None
    return str(selection.backend.value)
