"""Short ways to a layer's configuration, for checks that vary only what selection looks at."""

from __future__ import annotations

import torch

from fp8moe import FusedMoEConfig, FusedMoEParallelConfig, RoutingMethodType


def make_parallel(
    *,
    tp: int = 1,
    pcp: int = 1,
    dp: int = 1,
    ep: int = 1,
    use_ep: bool = False,
    exchange: str = "naive",
    eplb: bool = False,
    sequence_parallel: bool = False,
) -> FusedMoEParallelConfig:
    """Rank 0 of a parallel configuration; the default is one device."""
    return FusedMoEParallelConfig(tp, pcp, dp, ep, 0, 0, 0, 0, use_ep, exchange, eplb, sequence_parallel)


SINGLE = make_parallel()
BATCHED = make_parallel(dp=2, ep=2, use_ep=True, exchange="deepep_low_latency")
"""The parallel configuration of the batched rows in the specification's executed matrix."""


def make_config(
    *,
    activation: str = "silu",
    gated: bool = True,
    routing: RoutingMethodType = RoutingMethodType.DeepSeekV3,
    parallel: FusedMoEParallelConfig = SINGLE,
    in_dtype: torch.dtype = torch.bfloat16,
    logits_dtype: torch.dtype | None = torch.bfloat16,
    lora: bool = False,
) -> FusedMoEConfig:
    """A layer of 64 experts, of sizes at which no backend has a limit."""
    return FusedMoEConfig(
        num_experts=64,
        experts_per_token=4,
        hidden_dim=2048,
        intermediate_size_per_partition=1024,
        num_local_experts=64,
        activation=activation,
        device="cpu",
        routing_method=routing,
        moe_parallel_config=parallel,
        in_dtype=in_dtype,
        router_logits_dtype=logits_dtype,
        is_act_and_mul=gated,
        is_lora_enabled=lora,
    )
