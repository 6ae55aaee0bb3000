"""The configuration of one fused MoE layer: sizes, parallelism, routing; frozen and checked when built."""

from __future__ import annotations

import os
from dataclasses import dataclass
from enum import Enum, IntEnum
from typing import TYPE_CHECKING, Any

from fp8moe.frozen import hash_once, state_without_derived

if TYPE_CHECKING:
    import torch

    from fp8moe.facets import SelectionFacets

GATED_ACTIVATIONS = ("silu", "gelu", "swigluoai", "swiglustep")
NON_GATED_ACTIVATIONS = ("silu_no_mul", "gelu_no_mul", "relu2_no_mul")
ACTIVATIONS = GATED_ACTIVATIONS + NON_GATED_ACTIVATIONS
CLAMPED_ACTIVATIONS = ("swigluoai", "swiglustep")
"""Those that limit the gate and the up."""

ALL2ALL_BACKENDS = (
    "naive",
    "pplx",
    "deepep_high_throughput",
    "deepep_low_latency",
    "mori",
    "allgather_reducescatter",
    "flashinfer_all2allv",
)


class FusedMoEActivationFormat(Enum):
    """Layout of the activations that reach the experts; the values are one-tuples, as upstream has them."""

    Standard = ("standard",)
    """2-D: (tokens, hidden)."""
    BatchedExperts = ("batched_experts",)
    """3-D: (experts, most tokens of an expert, hidden)."""


class RoutingMethodType(IntEnum):
    """How the router turns logits into expert ids and weights (specification section 3.4)."""

    Default = 0  # softmax, then top-k
    Renormalize = 1  # top-k, then softmax
    DeepSeekV3 = 2  # sigmoid, bias, grouped top-k
    Llama4 = 3  # top-1, then sigmoid
    RenormalizeNaive = 4  # softmax, top-k, renormalise
    TopK = 5
    Custom = 6
    Simulated = 7
    Unspecified = 8


PASSED_THROUGH = (
    *(f"{kind}_{what}" for kind in ("tp", "dp", "pcp", "ep") for what in ("size", "rank")),
    "use_ep",
    "use_pplx_kernels",
    "use_deepep_ht_kernels",
    "use_deepep_ll_kernels",
    "use_mori_kernels",
    "use_fi_all2allv_kernels",
    "use_naive_all2all_kernels",
)
"""What a `FusedMoEConfig` answers from its parallel part."""


def default_max_num_tokens() -> int:
    """The default of `FusedMoEConfig.max_num_tokens`: VLLM_MOE_DP_CHUNK_SIZE, or 256; read once, at import.

    Raises:
        ValueError: the variable's text is not a positive integer.
    """
    text = os.environ.get("VLLM_MOE_DP_CHUNK_SIZE", "256")
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise ValueError(
            f"VLLM_MOE_DP_CHUNK_SIZE={text!r}: expected a positive integer (default 256); unset it or fix it"
        )
    return value


DEFAULT_MAX_NUM_TOKENS = default_max_num_tokens()


def _at_least_one(owner: object, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        if value < 1:
            raise ValueError(f"{type(owner).__name__}.{name}={value!r}: expected an integer of at least 1")


@dataclass(frozen=True)
class FusedMoEParallelConfig:
    """Parallel sizes and ranks as one layer sees them (specification section 3.2).

    Raises:
        ValueError: a size below 1, a rank outside its size, expert parallelism together with tp_size > 1,
            or ep_size > 1 without expert parallelism.
    """

    tp_size: int
    pcp_size: int
    dp_size: int
    ep_size: int
    tp_rank: int
    pcp_rank: int
    dp_rank: int
    ep_rank: int
    use_ep: bool
    all2all_backend: str
    enable_eplb: bool
    is_sequence_parallel: bool = False

    __hash__ = hash_once
    __getstate__ = state_without_derived

    def __post_init__(self) -> None:
        _at_least_one(self, "tp_size", "pcp_size", "dp_size", "ep_size")
        for kind in ("tp", "pcp", "dp", "ep"):
            size, rank = getattr(self, f"{kind}_size"), getattr(self, f"{kind}_rank")
            if not 0 <= rank < size:
                raise ValueError(
                    f"FusedMoEParallelConfig.{kind}_rank={rank!r}: expected 0 <= {kind}_rank < {kind}_size={size}"
                )
        if self.use_ep and self.tp_size > 1:
            raise ValueError(
                f"FusedMoEParallelConfig.tp_size={self.tp_size}: expected 1 with use_ep=True; "
                "under expert parallelism the tensor-parallel ranks count in ep_size"
            )
        if not self.use_ep and self.ep_size > 1:
            raise ValueError(f"FusedMoEParallelConfig.ep_size={self.ep_size}: expected 1 with use_ep=False")

    @classmethod
    def make_no_parallel(cls) -> FusedMoEParallelConfig:
        """One device: all sizes 1, ranks 0, expert parallelism off."""
        return cls(1, 1, 1, 1, 0, 0, 0, 0, False, "naive", False, False)

    @classmethod
    def make(
        cls,
        *,
        tp_size: int = 1,
        pcp_size: int = 1,
        dp_size: int = 1,
        tp_rank: int = 0,
        pcp_rank: int = 0,
        dp_rank: int = 0,
        enable_expert_parallel: bool = False,
        all2all_backend: str = "allgather_reducescatter",
        enable_eplb: bool = False,
        is_sequence_parallel: bool | None = None,
        engine_tp_size: int | None = None,
    ) -> FusedMoEParallelConfig:
        """From the sizes a layer is given to the sizes its experts see (specification section 3.2, the factory).

        `is_sequence_parallel=None` derives it as the engine does, from `engine_tp_size` (default: `tp_size`).

        Raises:
            ValueError: as the constructor.
        """
        given = {"tp": (tp_size, tp_rank), "pcp": (pcp_size, pcp_rank), "dp": (dp_size, dp_rank)}
        for kind, (size, rank) in given.items():
            if size < 1:
                raise ValueError(
                    f"FusedMoEParallelConfig.make: {kind}_size={size!r}: expected an integer of at least 1"
                )
            if size > 1 and not 0 <= rank < size:
                raise ValueError(
                    f"FusedMoEParallelConfig.make: {kind}_rank={rank!r}: expected 0 <= {kind}_rank < {kind}_size={size}"
                )
        flat_size = dp_size * pcp_size * tp_size
        flat_rank = (dp_rank if dp_size > 1 else 0) * pcp_size * tp_size
        flat_rank += (pcp_rank if pcp_size > 1 else 0) * tp_size + (tp_rank if tp_size > 1 else 0)
        if is_sequence_parallel is None:
            tp = tp_size if engine_tp_size is None else engine_tp_size
            supported = all2all_backend not in ("pplx", "flashinfer_all2allv") and all2all_backend in ALL2ALL_BACKENDS
            is_sequence_parallel = supported and enable_expert_parallel and tp > 1 and dp_size > 1
        use_ep = flat_size > 1 and enable_expert_parallel
        tp_part, ep_part = ((1, 0), (flat_size, flat_rank)) if use_ep else ((flat_size, flat_rank), (1, 0))
        return cls(
            tp_part[0],
            pcp_size,
            dp_size,
            ep_part[0],
            tp_part[1],
            pcp_rank if pcp_size > 1 else 0,
            dp_rank if dp_size > 1 else 0,
            ep_part[1],
            use_ep,
            all2all_backend,
            enable_eplb,
            is_sequence_parallel,
        )

    @property
    def use_all2all_kernels(self) -> bool:
        """Data-parallel ranks exchange tokens; prefill context parallelism alone does not count."""
        return self.dp_size > 1 and self.use_ep

    @property
    def use_pplx_kernels(self) -> bool:
        return self.use_all2all_kernels and self.all2all_backend == "pplx"

    @property
    def use_deepep_ht_kernels(self) -> bool:
        return self.use_all2all_kernels and self.all2all_backend == "deepep_high_throughput"

    @property
    def use_deepep_ll_kernels(self) -> bool:
        return self.use_all2all_kernels and self.all2all_backend == "deepep_low_latency"

    @property
    def use_mori_kernels(self) -> bool:
        return self.use_all2all_kernels and self.all2all_backend == "mori"

    @property
    def use_naive_all2all_kernels(self) -> bool:
        return self.use_all2all_kernels and self.all2all_backend in ("naive", "allgather_reducescatter")

    @property
    def use_fi_all2allv_kernels(self) -> bool:
        return self.use_all2all_kernels and self.all2all_backend == "flashinfer_all2allv"

    @property
    def use_batched_activation_format(self) -> bool:
        return self.use_deepep_ll_kernels or self.use_pplx_kernels

    @property
    def activation_format(self) -> FusedMoEActivationFormat:
        """The layout in which this dispatch hands tokens to the experts."""
        if self.use_batched_activation_format:
            return FusedMoEActivationFormat.BatchedExperts
        return FusedMoEActivationFormat.Standard


@dataclass(frozen=True)
class FusedMoEConfig:
    """One MoE layer as its experts see it (specification section 3.1). Sizes are counts, not bytes.

    Args:
        num_experts: experts of the layer over all ranks, redundant ones included.
        experts_per_token: top-k.
        hidden_dim: H.
        intermediate_size_per_partition: I, after the tensor-parallel split.
        num_local_experts: experts held by this rank.
        activation: a name of `ACTIVATIONS`; others are kept, and refused where a backend is asked for them.
        in_dtype: dtype of the activations that come in.
        router_logits_dtype: None stands for `in_dtype`.
        is_act_and_mul: gated MLP. The selector never ties it to `activation`.

    Raises:
        ValueError: a size or count below 1, num_local_experts > num_experts, experts_per_token > num_experts.
    """

    num_experts: int
    experts_per_token: int
    hidden_dim: int
    intermediate_size_per_partition: int
    num_local_experts: int
    activation: str
    device: torch.device | str
    routing_method: RoutingMethodType
    moe_parallel_config: FusedMoEParallelConfig
    in_dtype: torch.dtype
    router_logits_dtype: torch.dtype | None = None
    max_num_tokens: int = DEFAULT_MAX_NUM_TOKENS
    has_bias: bool = False
    is_act_and_mul: bool = True
    is_lora_enabled: bool = False
    disable_inplace: bool = True

    def __post_init__(self) -> None:
        experts = self.num_experts
        if (
            experts < 1
            or self.experts_per_token < 1
            or self.hidden_dim < 1
            or self.intermediate_size_per_partition < 1
            or self.num_local_experts < 1
            or self.max_num_tokens < 1
        ):
            _at_least_one(
                self,
                "num_experts",
                "experts_per_token",
                "hidden_dim",
                "intermediate_size_per_partition",
                "num_local_experts",
                "max_num_tokens",
            )
        for name in ("num_local_experts", "experts_per_token"):
            if getattr(self, name) > experts:
                raise ValueError(f"FusedMoEConfig.{name}={getattr(self, name)}: expected at most num_experts={experts}")
        if self.router_logits_dtype is None:
            object.__setattr__(self, "router_logits_dtype", self.in_dtype)

    __getstate__ = state_without_derived

    @property
    def facets(self) -> SelectionFacets:
        """The part of this configuration that selection looks at, interned; derived at the first use."""
        found: SelectionFacets | None = self.__dict__.get("_facets")
        if found is None:
            from fp8moe.facets import SelectionFacets

            found = SelectionFacets.of(self)
            object.__setattr__(self, "_facets", found)
        return found

    def __getattr__(self, name: str) -> Any:
        """What the layer does not have itself, its parallel part may: sizes, ranks, `use_*` (section 3.1)."""
        if name.startswith("_") or name not in PASSED_THROUGH:
            raise AttributeError(f"FusedMoEConfig has no attribute {name!r}")
        return getattr(self.moe_parallel_config, name)
