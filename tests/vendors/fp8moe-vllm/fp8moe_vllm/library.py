"""vLLM's expert classes, made as its engine makes them; vLLM is imported when the first layer is made, not before."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from fp8moe.config import FusedMoEConfig
from fp8moe.experts import MoEWeights
from fp8moe.quant import FusedMoEQuantConfig
from fp8moe.registry import BackendUnavailable

RELEASE = "0.25.1"
REMEDY = f"install vllm=={RELEASE} together with the torch that it is built for: pip install vllm=={RELEASE}"
E8M0 = "VLLM_USE_DEEP_GEMM_E8M0"
ORACLE = "vllm.model_executor.layers.fused_moe.oracle.fp8"
BLOCK = 128
MOST_TOKENS = 1 << 15
"""Of a call, at least; vLLM's CUTLASS class keeps index buffers for so many."""


@dataclass(frozen=True)
class Of:
    """A class of vLLM.

    Args:
        backend: a name of its enum of FP8 backends, which tells the layout of the weights.
        module, name: where the class is.
    """

    backend: str
    module: str
    name: str


def load(user: str, which: Of) -> Any:
    """The class.

    Raises:
        BackendUnavailable: vLLM is not installed, does not load, is another version, or rounds scales to powers of two.
    """
    try:
        with fp32_scales():
            version = str(getattr(importlib.import_module("vllm"), "__version__", RELEASE)).partition("+")[0]
            if version != RELEASE:
                raise BackendUnavailable(f"{user}: vllm {version} is installed, another version; {REMEDY}")
            importlib.import_module(ORACLE)
            module = importlib.import_module(which.module)
    except ModuleNotFoundError as error:
        told = "vllm is not installed" if error.name == "vllm" else f"vllm does not load ({error})"
        raise BackendUnavailable(f"{user}: {told}; {REMEDY}") from error
    except BackendUnavailable:
        raise
    except Exception as error:
        told = (str(error).strip().splitlines() or ["no text"])[0]
        raise BackendUnavailable(f"{user}: vllm does not load ({type(error).__name__}: {told}); {REMEDY}") from error
    if not hasattr(module, which.name):
        raise BackendUnavailable(f"{user}: {which.module} has no {which.name}: another version; {REMEDY}")
    with fp32_scales():
        _refuse_powers_of_two(user)
    return getattr(module, which.name)


@contextmanager
def fp32_scales() -> Iterator[None]:
    """vLLM's variable at 0 where it is not set. vLLM asks for it once a process and keeps the answer, which it is made
    to do here; the environment stays as it was, since a backend has no business with it."""
    absent = E8M0 not in os.environ
    os.environ.setdefault(E8M0, "0")
    try:
        yield
    finally:
        if absent:
            os.environ.pop(E8M0, None)


def _refuse_powers_of_two(user: str) -> None:
    from vllm.utils.deep_gemm import is_deep_gemm_e8m0_used

    if is_deep_gemm_e8m0_used():
        raise BackendUnavailable(
            f"{user}: vLLM rounds scales to powers of two in this process, weights' scales too; set {E8M0}=0"
        )


class Layer:
    """A layer's weights in the kernel's layout, and vLLM's kernels for them.

    Args:
        user: who asks, for errors.
        which: the class.
        config, quant, weights: as a backend is given them; the weights are shared or converted, never changed.
    """

    def __init__(
        self, user: str, which: Of, config: FusedMoEConfig, quant: FusedMoEQuantConfig, weights: MoEWeights
    ) -> None:
        self.experts_cls = load(user, which)

        from vllm.model_executor.layers.fused_moe.activation import MoEActivation
        from vllm.model_executor.layers.fused_moe.oracle.fp8 import (
            Fp8MoeBackend,
            convert_to_fp8_moe_kernel_format,
            make_fp8_moe_quant_config,
        )

        self.config, self.device = config, weights.w13.device
        self.activation = MoEActivation(config.activation)
        self.backend = Fp8MoeBackend(which.backend)
        block = None if quant.block_shape is None else [BLOCK, BLOCK]
        with configured(), torch.cuda.device(self.device):
            workspaces_from_allocator(self.device)
            self.w13, self.w2, w13_scale, w2_scale = convert_to_fp8_moe_kernel_format(
                fp8_backend=self.backend,
                layer=_described(config, weights, block),
                w13=weights.w13,
                w2=weights.w2,
                w13_scale=weights.w13_scale,
                w2_scale=weights.w2_scale,
                w13_input_scale=weights.a13_scale,
                w2_input_scale=weights.a2_scale,
            )
            self.quant = make_fp8_moe_quant_config(
                fp8_backend=self.backend,
                w1_scale=w13_scale,
                w2_scale=w2_scale,
                a1_scale=weights.a13_scale,
                a2_scale=weights.a2_scale,
                block_shape=block,
                per_act_token_quant=quant.per_act_token_quant,
                per_out_ch_quant=quant.per_out_ch_quant,
            )
            # One for each number of experts that ids may be of: this rank's, or all ranks', and one more elsewhere.
            counts = {count + more for count in (config.num_local_experts, config.num_experts) for more in (0, 1)}
            self.kernels = {count: self._kernel(count) for count in counts}

    def _kernel(self, experts: int) -> Any:
        from vllm.model_executor.layers.fused_moe.config import (
            FusedMoEConfig as VllmConfigOfLayer,
        )
        from vllm.model_executor.layers.fused_moe.config import FusedMoEParallelConfig, RoutingMethodType
        from vllm.model_executor.layers.fused_moe.oracle.fp8 import make_fp8_moe_kernel

        config = self.config
        described = VllmConfigOfLayer(
            num_experts=experts,
            experts_per_token=config.experts_per_token,
            hidden_dim=config.hidden_dim,
            intermediate_size=config.intermediate_size_per_partition,
            num_local_experts=config.num_local_experts,
            num_logical_experts=experts,
            activation=self.activation,
            device=self.device,
            routing_method=RoutingMethodType.Renormalize,
            moe_parallel_config=FusedMoEParallelConfig.make_no_parallel(),
            in_dtype=config.in_dtype,
            max_num_tokens=max(config.max_num_tokens, MOST_TOKENS),
        )
        return make_fp8_moe_kernel(
            moe_quant_config=self.quant,
            moe_config=described,
            experts_cls=self.experts_cls,
            fp8_backend=self.backend,
        )

    def __call__(
        self,
        hidden_states: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        expert_map: Tensor | None,
        apply_router_weight_on_input: bool,
    ) -> Tensor:
        """(M, H) of a new tensor.

        Args:
            hidden_states: contiguous.
            topk_weights: fp32.
            topk_ids: int32, all in range.
            expert_map: int32.
        """
        experts = self.config.num_local_experts if expert_map is None else expert_map.numel()
        with torch.cuda.device(self.device):
            found: Tensor = self.kernels[experts].apply(
                hidden_states=hidden_states,
                w1=self.w13,
                w2=self.w2,
                topk_weights=topk_weights,
                topk_ids=topk_ids,
                activation=self.activation,
                global_num_experts=experts,
                expert_map=expert_map,
                apply_router_weight_on_input=apply_router_weight_on_input,
            )
        return found


def _described(config: FusedMoEConfig, weights: MoEWeights, block: list[int] | None) -> SimpleNamespace:
    """What the conversion reads of an engine's layer; that it has a block size is what says that it has blocks."""
    sizes = {} if block is None else {"weight_block_size": block}
    return SimpleNamespace(
        w13_weight=weights.w13,
        w2_weight=weights.w2,
        num_experts=config.num_local_experts,
        local_num_experts=config.num_local_experts,
        hidden_size=config.hidden_dim,
        intermediate_size_per_partition=config.intermediate_size_per_partition,
        orig_dtype=config.in_dtype,
        params_dtype=config.in_dtype,
        **sizes,
    )


def configured() -> Any:
    """In which vLLM's objects can be made: an engine's configuration, or a default one where there is no engine."""
    from vllm.config import VllmConfig, get_current_vllm_config_or_none, set_current_vllm_config

    if get_current_vllm_config_or_none() is not None:
        return nullcontext()
    return set_current_vllm_config(VllmConfig())


def workspaces_from_allocator(device: torch.device) -> None:
    """Makes vLLM's workspace manager, unless an engine has; its buffers come from torch's allocator, call by call.

    Its own is one that grows, and a graph that was captured before goes on using what growth has freed.
    """
    from vllm.v1.worker.workspace import (
        current_workspace_manager,
        init_workspace_manager,
        is_workspace_manager_initialized,
    )

    if is_workspace_manager_initialized():
        return
    init_workspace_manager(device)

    def get_simultaneous(*shapes_and_dtypes: tuple[tuple[int, ...], torch.dtype]) -> list[Tensor]:
        return [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in shapes_and_dtypes]

    current_workspace_manager().get_simultaneous = get_simultaneous
