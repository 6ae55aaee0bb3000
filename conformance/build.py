"""From a case to its tensors: the same bits on every device and every version of torch (`draw.py` says how)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from conformance import calibration, laws, weights
from conformance.cases import Case
from conformance.draw import Draw
from conformance.models import Router, model_and_split
from conformance.regimes import REGIMES
from fp8moe.config import FusedMoEConfig, FusedMoEParallelConfig, RoutingMethodType
from fp8moe.experts import FusedMoEPermuteExpertsUnpermute, MoEWeights
from fp8moe.keys import GroupShape
from fp8moe.quant import FusedMoEQuantConfig
from fp8moe.schemes import SCHEMES

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
ROW_GAP = 128
"""Elements between the rows of strided hidden states, half of them before the first."""
JUDGED = 64
TILE_EDGES = (15, 16, 17, 63, 64, 65, 127, 128, 129)
LEAST_CAPACITY = 256

# What an outline tells, by name, so that a field added to a configuration leaves the golden digests as they are.
TOLD_OF_CONFIG = (
    "num_experts",
    "experts_per_token",
    "hidden_dim",
    "intermediate_size_per_partition",
    "num_local_experts",
    "activation",
    "in_dtype",
    "router_logits_dtype",
    "max_num_tokens",
    "has_bias",
    "is_act_and_mul",
    "is_lora_enabled",
)
TOLD_OF_PARALLEL = (
    "tp_size",
    "pcp_size",
    "dp_size",
    "ep_size",
    "tp_rank",
    "pcp_rank",
    "dp_rank",
    "ep_rank",
    "use_ep",
    "all2all_backend",
)


@dataclass(frozen=True, eq=False)
class CaseTensors:
    """All that one call of a backend takes, on one device."""

    case: Case
    config: FusedMoEConfig
    quant: FusedMoEQuantConfig
    weights: MoEWeights
    hidden_states: Tensor
    topk_weights: Tensor
    topk_ids: Tensor
    expert_map: Tensor | None
    apply_router_weight_on_input: bool

    def call(self, backend: FusedMoEPermuteExpertsUnpermute, output: Tensor | None = None) -> Tensor:
        """One call of a backend's `apply`, three arguments by position and the rest by keyword; waits for nothing."""
        return backend.apply(
            self.hidden_states,
            self.topk_weights,
            self.topk_ids,
            expert_map=self.expert_map,
            apply_router_weight_on_input=self.apply_router_weight_on_input,
            output=output,
        )

    def named(self) -> dict[str, Tensor]:
        """Every tensor that is there, by name."""
        call = ("hidden_states", "topk_weights", "topk_ids", "expert_map")
        found = vars(self.weights) | {name: getattr(self, name) for name in call}
        return {name: tensor for name, tensor in found.items() if tensor is not None}


def config_of(case: Case, device: torch.device | str = "cpu") -> FusedMoEConfig:
    """The layer's configuration; a model's routing method and logits, or softmax with a renormalised top-k."""
    shared: dict[str, Any] = {"device": device, "max_num_tokens": max(LEAST_CAPACITY, case.tokens)}
    if case.model is not None:
        model, split = model_and_split(case.model)
        dtype = DTYPES[case.dtype]
        return model.config(split, dtype=dtype, activation=case.activation, has_bias=case.bias, **shared)
    return FusedMoEConfig(
        num_experts=case.experts,
        experts_per_token=case.top_k,
        hidden_dim=case.hidden,
        intermediate_size_per_partition=case.inter,
        num_local_experts=case.local_experts,
        activation=case.activation,
        routing_method=RoutingMethodType.Renormalize,
        moe_parallel_config=FusedMoEParallelConfig.make(
            tp_size=case.ep_size, tp_rank=case.ep_rank, enable_expert_parallel=case.ep_size > 1
        ),
        in_dtype=DTYPES[case.dtype],
        has_bias=case.bias,
        is_act_and_mul=case.gated,
        **shared,
    )


def quant_of(case: Case) -> FusedMoEQuantConfig:
    """The scheme's quantisation."""
    return FusedMoEQuantConfig.from_keys(*SCHEMES[case.scheme])


def build(case: Case, device: torch.device | str = "cpu") -> CaseTensors:
    """The tensors of a case on a device; what is large is drawn there, so nothing large is copied."""
    draw = Draw(case.seed, device)
    config, quant = config_of(case, device), quant_of(case)
    topk_weights, topk_ids = (tensor.to(device) for tensor in routing(case))
    expert_map = expert_map_of(case)
    tensors = CaseTensors(
        case,
        config,
        quant,
        _weights(case, draw, config, quant),
        _hidden_states(case, draw),
        topk_weights,
        topk_ids,
        None if expert_map is None else expert_map.to(device),
        case.weight_on_input,
    )
    if not (quant.a1.static and quant.a1.dtype is not None):
        return tensors
    return replace(tensors, weights=_with_static_scales(draw, tensors))


def _weights(case: Case, draw: Draw, config: FusedMoEConfig, quant: FusedMoEQuantConfig) -> MoEWeights:
    regime = REGIMES[case.values]
    found: dict[str, Tensor] = {}
    for projection in weights.projections(config):
        name = projection.name
        if quant.w1.dtype is None:
            values, scale = weights.draw_weight(draw, regime, projection, weights.BLOCK, config.in_dtype)
            found[name] = weights.scaled(projection, values, scale)
        else:
            codes, scale = weights.draw_weight(draw, regime, projection, quant.w1.shape or GroupShape.PER_TENSOR)
            convert = weights.as_fnuz if case.fnuz else weights.as_fn
            found[name], found[f"{name}_scale"] = convert(codes, scale)
        if case.bias:
            found[f"{name}_bias"] = weights.draw_bias(draw, projection, config.in_dtype)
    return MoEWeights(**found)


def _hidden_states(case: Case, draw: Draw) -> Tensor:
    values = REGIMES[case.values].hidden(draw, case.tokens, case.hidden, case.dtype).to(DTYPES[case.dtype])
    if case.layout == "contiguous":
        return values
    apart = torch.full((case.tokens, case.hidden + ROW_GAP), torch.nan, dtype=values.dtype, device=values.device)
    inner = apart[:, ROW_GAP // 2 : ROW_GAP // 2 + case.hidden]
    return inner.copy_(values)


def _with_static_scales(draw: Draw, tensors: CaseTensors) -> MoEWeights:
    inputs, given = tensors.hidden_states, tensors.weights
    if tensors.apply_router_weight_on_input:
        inputs = (inputs.float() * tensors.topk_weights).to(inputs.dtype)
    assert given.w13_scale is not None
    a13 = calibration.input_scale(inputs)
    a2 = calibration.intermediate_scale(
        draw,
        tensors.config,
        inputs,
        tensors.topk_ids,
        tensors.expert_map,
        given.w13,
        given.w13_scale,
        given.w13_bias,
    )
    doubled = 2.0 if tensors.case.fnuz else 1.0  # as the weights' scales, specification section 4
    return replace(given, a13_scale=a13 * doubled, a2_scale=a2 * doubled)


def routing(case: Case) -> laws.Routing:
    """topk_weights and topk_ids on the CPU.

    Under expert parallelism the ids are rotated so that the busiest expert is the last one of this rank.
    """
    draw = Draw(case.seed)
    if case.law == "router":
        by: Router | None = None if case.model is None else model_and_split(case.model)[0].router
        topk_weights, topk_ids = laws.router(draw, case.tokens, case.experts, case.top_k, by)
    else:
        topk_weights, topk_ids = laws.LAWS[case.law](draw, case.tokens, case.experts, case.top_k)
    present = topk_ids >= 0
    if case.ep is None or not bool(present.any()):
        return topk_weights, topk_ids
    counts = torch.bincount(topk_ids[present].long(), minlength=case.experts)
    busiest = int((counts == counts.max()).nonzero()[0])
    rotated = (topk_ids + (case.ep_rank + 1) * case.local_experts - 1 - busiest) % case.experts
    return topk_weights, torch.where(present, rotated, -1)


def expert_map_of(case: Case) -> Tensor | None:
    """(E,) int32 from global to local ids, -1 for experts of other ranks; None without expert parallelism."""
    if case.ep is None:
        return None
    placed = torch.arange(case.experts, dtype=torch.int32) - case.ep_rank * case.local_experts
    return placed.masked_fill((placed < 0) | (placed >= case.local_experts), -1)


def judged_tokens(case: Case) -> Tensor:
    """Ascending int64 tokens that an oracle judges in full: all up to 64, else 64.

    First, last, the edges of tiles, and a seeded sample of the rest; under expert parallelism the sample takes tokens
    with an expert on this rank first.
    """
    if case.tokens <= JUDGED:
        return torch.arange(case.tokens)
    rank = Draw(case.seed).integers("judged", (case.tokens,), 1 << 30)
    if case.ep is not None:
        placed = expert_map_of(case)
        assert placed is not None
        ids = routing(case)[1].long()
        here = ((ids >= 0) & (placed[ids.clamp(min=0)] >= 0)).any(dim=1)
        rank = torch.where(here, rank, rank + (1 << 30))
    edges = [token for token in (0, *TILE_EDGES, case.tokens - 1) if token < case.tokens]
    rank[torch.tensor(edges)] = -1
    return rank.sort(stable=True).indices[:JUDGED].sort().values


def outline(case: Case) -> dict[str, str]:
    """What a case comes to without its values, as text: the configuration, and each tensor's dtype and shape."""
    config, quant = config_of(case), quant_of(case)
    told = {name: str(getattr(config, name)) for name in TOLD_OF_CONFIG}
    told |= {name: str(getattr(config.moe_parallel_config, name)) for name in TOLD_OF_PARALLEL}
    told["routing_method"] = config.routing_method.name
    told["weight_key"], told["activation_key"] = str(quant.weight_key), str(quant.activation_key)
    return told | {name: f"{dtype} {shape}" for name, (dtype, shape) in forms(case).items()}


def forms(case: Case) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """dtype and shape of every tensor that `build` makes, without making any."""
    config, quant = config_of(case), quant_of(case)
    fp8 = torch.float8_e4m3fnuz if case.fnuz else torch.float8_e4m3fn
    found: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for projection in weights.projections(config):
        name = projection.name
        quantised = quant.w1.dtype is not None
        shape = (projection.experts, projection.rows, projection.columns)
        found[name] = (fp8 if quantised else config.in_dtype, shape)
        if quantised:
            found[f"{name}_scale"] = (torch.float32, projection.grid(quant.w1.shape or GroupShape.PER_TENSOR))
        if case.bias:
            found[f"{name}_bias"] = (config.in_dtype, shape[:2])
    if quant.a1.static and quant.a1.dtype is not None:
        found["a13_scale"] = found["a2_scale"] = (torch.float32, (1,))
    found["hidden_states"] = (config.in_dtype, (case.tokens, case.hidden))
    found["topk_weights"] = (torch.float32, (case.tokens, case.top_k))
    found["topk_ids"] = (torch.int32, (case.tokens, case.top_k))
    if case.ep is not None:
        found["expert_map"] = (torch.int32, (case.experts,))
    return found
