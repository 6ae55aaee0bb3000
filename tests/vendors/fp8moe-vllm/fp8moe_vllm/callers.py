"""vLLM's classes as vLLM calls them: the rivals of `compare`. Not for a verdict on numbers: no check, and no -1.

vLLM trusts its router's ids, and takes the tensor that it is given back; so nothing else is timed here.
"""

from __future__ import annotations

from torch import Tensor

from fp8moe_vllm.experts import (
    VllmCutlassExperts,
    VllmDeepGemmExperts,
    VllmExperts,
    VllmMarlinExperts,
    VllmTritonExperts,
    VllmTritonOrDeepGemmExperts,
)


class AsVllmCalls(VllmExperts):
    """Mixed in before a class: the kernel's call and nothing around it; `output` is left alone."""

    def apply(
        self,
        hidden_states: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        *,
        expert_map: Tensor | None = None,
        apply_router_weight_on_input: bool = False,
        output: Tensor | None = None,
    ) -> Tensor:
        return self.layer(hidden_states, topk_weights, topk_ids, expert_map, apply_router_weight_on_input)


class TritonCaller(AsVllmCalls, VllmTritonExperts):
    """`TritonExperts`."""


class DeepGemmCaller(AsVllmCalls, VllmDeepGemmExperts):
    """`DeepGemmExperts`."""


class TritonOrDeepGemmCaller(AsVllmCalls, VllmTritonOrDeepGemmExperts):
    """`TritonOrDeepGemmExperts`."""


class CutlassCaller(AsVllmCalls, VllmCutlassExperts):
    """`CutlassExpertsFp8`."""


class MarlinCaller(AsVllmCalls, VllmMarlinExperts):
    """`MarlinExperts`."""
