"""Checks of what a backend is given: weights at construction, tensors at each call; errors name field, value, fix."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

import torch
from torch import Tensor

from fp8moe.config import FusedMoEConfig
from fp8moe.keys import GroupShape
from fp8moe.quant import FusedMoEQuantConfig

FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e4m3fnuz)
ID_DTYPES = (torch.int32, torch.int64, torch.uint32)


class InvalidMoEInput(ValueError):
    """A tensor given to a backend is not what it expects; `field` names it."""

    def __init__(self, field: str, given: str, expected: str) -> None:
        super().__init__(f"{field} is {given}: expected {expected}")
        self.field = field


def weight_rows(config: FusedMoEConfig) -> int:
    """Rows of w13: 2I where the MLP is gated, else I."""
    return config.intermediate_size_per_partition * (2 if config.is_act_and_mul else 1)


def scale_shape(group: GroupShape, experts: int, rows: int, columns: int, halves: int = 1) -> tuple[int, ...]:
    """Shape of a weight's scales (specification section 4); `halves` = 2 for w13, whose halves are blocked apart."""
    if group.is_per_tensor():
        return (experts,)
    if group.is_per_channel():
        return (experts, rows, 1)
    row_blocks = halves * -(-(rows // halves) // group.row)
    return (experts, row_blocks, -(-columns // group.col))


def _kind(value: object) -> str:
    return "None" if value is None else f"a {type(value).__name__}"


def _shape(field: str, tensor: Tensor, expected: Sequence[int], axes: str) -> None:
    if tuple(tensor.shape) != tuple(expected):
        raise InvalidMoEInput(field, f"of shape {tuple(tensor.shape)}", f"{axes} = {tuple(expected)}")


def check_weights(config: FusedMoEConfig, quant: FusedMoEQuantConfig, weights: object) -> None:
    """Shapes, dtypes and devices of the canonical layout, and finite scales.

    Raises:
        InvalidMoEInput: names the field.
    """
    from fp8moe.experts import MoEWeights

    if not isinstance(weights, MoEWeights):
        raise InvalidMoEInput("weights", _kind(weights), "a fp8moe.MoEWeights")
    if not isinstance(config, FusedMoEConfig):
        raise InvalidMoEInput("config", _kind(config), "a fp8moe.FusedMoEConfig")
    if not isinstance(quant, FusedMoEQuantConfig):
        raise InvalidMoEInput("quant", _kind(quant), "a fp8moe.FusedMoEQuantConfig")
    for name, tensor in vars(weights).items():
        required = name in ("w13", "w2")
        if not isinstance(tensor, Tensor) and (required or tensor is not None):
            raise InvalidMoEInput(name, _kind(tensor), "a tensor" + ("" if required else ", or None"))
    for name, tensor in vars(weights).items():
        if tensor is not None and tensor.device != weights.w13.device:
            raise InvalidMoEInput(name, f"on {tensor.device}", f"the device of w13, {weights.w13.device}")
    experts, hidden = config.num_local_experts, config.hidden_dim
    inter, rows = config.intermediate_size_per_partition, weight_rows(config)
    _shape("w13", weights.w13, (experts, rows, hidden), "(num_local_experts, 2I or I, hidden_dim)")
    _shape("w2", weights.w2, (experts, hidden, inter), "(num_local_experts, hidden_dim, I)")
    quantised = quant.w1.dtype is not None
    for name in ("w13", "w2"):
        dtype = getattr(weights, name).dtype
        if quantised and dtype not in FP8_DTYPES:
            raise InvalidMoEInput(name, f"of dtype {dtype}", f"one of {FP8_DTYPES}, since quant.w1 is {quant.w1.dtype}")
        if not quantised and dtype != config.in_dtype:
            raise InvalidMoEInput(name, f"of dtype {dtype}", f"config.in_dtype = {config.in_dtype} (unquantised)")
    if weights.w13.dtype != weights.w2.dtype:
        raise InvalidMoEInput("w2", f"of dtype {weights.w2.dtype}", f"the dtype of w13, {weights.w13.dtype}")
    _check_scales(quant, weights, experts, rows, hidden, inter, 2 if config.is_act_and_mul else 1)
    _check_biases(weights, experts, rows, hidden)


def _check_scales(
    quant: FusedMoEQuantConfig, weights: object, experts: int, rows: int, hidden: int, inter: int, halves: int
) -> None:
    for name, n, k, parts in (("w13_scale", rows, hidden, halves), ("w2_scale", hidden, inter, 1)):
        scale: Tensor | None = getattr(weights, name)
        if quant.w1.dtype is None:
            if scale is not None:
                raise InvalidMoEInput(name, "given", "None, since the weights are not quantised")
            continue
        group = quant.w1.shape or GroupShape.PER_TENSOR
        if scale is None:
            raise InvalidMoEInput(name, "None", f"fp32 scales per {group}")
        _float32(name, scale)
        _shape(name, scale, scale_shape(group, experts, n, k, parts), f"one scale per {group}")
        _finite(name, scale)
    for name, desc in (("a13_scale", quant.a1), ("a2_scale", quant.a2)):
        scale = getattr(weights, name)
        wanted = desc.dtype is not None and desc.static
        if wanted and scale is None:
            raise InvalidMoEInput(name, "None", "one fp32 scale, since the activations are quantised statically")
        if not wanted and scale is not None:
            raise InvalidMoEInput(name, "given", "None, since the activations are not quantised statically")
        if wanted and scale is not None:
            _float32(name, scale)
            if scale.numel() != 1:
                raise InvalidMoEInput(name, f"of shape {tuple(scale.shape)}", "one element (the maximum over experts)")
            _finite(name, scale)
            if float(scale) <= 0:
                raise InvalidMoEInput(name, f"{float(scale)!r}", "a positive scale")


def _check_biases(weights: object, experts: int, rows: int, hidden: int) -> None:
    for name, n in (("w13_bias", rows), ("w2_bias", hidden)):
        bias = getattr(weights, name)
        if bias is not None:
            _shape(name, bias, (experts, n), "(num_local_experts, rows)")


def _float32(field: str, scale: Tensor) -> None:
    if scale.dtype != torch.float32:
        raise InvalidMoEInput(field, f"of dtype {scale.dtype}", "torch.float32")


def _finite(field: str, scale: Tensor) -> None:
    bad = ~torch.isfinite(scale)
    if bool(bad.any()):
        where = tuple(int(part) for part in bad.nonzero()[0])
        raise InvalidMoEInput(field, f"{float(scale[where] if where else scale)} at {where}", "finite scales")


def check_call(
    config: FusedMoEConfig,
    device: torch.device,
    hidden_states: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    *,
    expert_map: Tensor | None = None,
    apply_router_weight_on_input: bool = False,
    output: Tensor | None = None,
) -> None:
    """The tensors of one `apply`: shapes, dtypes, devices; nothing here waits for the device. `check_ids` comes next.

    Raises:
        InvalidMoEInput: names the field.
    """
    given = {
        "hidden_states": hidden_states,
        "topk_weights": topk_weights,
        "topk_ids": topk_ids,
        "expert_map": expert_map,
        "output": output,
    }
    for name, tensor in given.items():
        optional = name in ("expert_map", "output")
        if not isinstance(tensor, Tensor) and not (optional and tensor is None):
            raise InvalidMoEInput(name, _kind(tensor), "a tensor" + (", or None" if optional else ""))
    if hidden_states.dim() != 2 or hidden_states.shape[1] != config.hidden_dim:
        raise InvalidMoEInput(
            "hidden_states", f"of shape {tuple(hidden_states.shape)}", f"(M, hidden_dim={config.hidden_dim})"
        )
    if hidden_states.dtype != config.in_dtype:
        raise InvalidMoEInput(
            "hidden_states", f"of dtype {hidden_states.dtype}", f"config.in_dtype = {config.in_dtype}"
        )
    tokens = hidden_states.shape[0]
    _shape("topk_ids", topk_ids, (tokens, topk_ids.shape[-1] if topk_ids.dim() == 2 else 1), "(M, top-k)")
    _shape("topk_weights", topk_weights, tuple(topk_ids.shape), "the shape of topk_ids")
    if topk_weights.dtype != torch.float32:
        raise InvalidMoEInput("topk_weights", f"of dtype {topk_weights.dtype}", "torch.float32")
    if topk_ids.numel() >= 2**31:
        raise InvalidMoEInput(
            "topk_ids", f"of {topk_ids.numel()} token-expert pairs", "fewer than 2^31 in one call: split it"
        )
    if topk_ids.dtype not in ID_DTYPES:
        raise InvalidMoEInput("topk_ids", f"of dtype {topk_ids.dtype}", "int32, int64 or uint32")
    if apply_router_weight_on_input and topk_ids.shape[1] != 1:
        raise InvalidMoEInput(
            "apply_router_weight_on_input",
            f"True with top-k = {topk_ids.shape[1]}",
            "False, or top-1 routing: "
            "the activation is not linear, so weighting the input is another function for more experts",
        )
    if expert_map is not None:
        _shape("expert_map", expert_map, (config.num_experts,), "(num_experts,)")
        if expert_map.dtype not in (torch.int32, torch.int64):
            raise InvalidMoEInput("expert_map", f"of dtype {expert_map.dtype}", "int32 or int64")
    if output is not None:
        _shape("output", output, tuple(hidden_states.shape), "the shape of hidden_states")
        if output.dtype != config.in_dtype:
            raise InvalidMoEInput("output", f"of dtype {output.dtype}", f"config.in_dtype = {config.in_dtype}")
    for name, tensor in given.items():
        if tensor is not None and tensor.device != device:
            raise InvalidMoEInput(name, f"on {tensor.device}", f"the device of the weights, {device}")


def id_limit(config: FusedMoEConfig, expert_map: Tensor | None) -> int:
    """Expert ids of a call are below this."""
    return config.num_experts if expert_map is not None else config.num_local_experts


def ids_out_of_range(config: FusedMoEConfig, topk_ids: Tensor, expert_map: Tensor | None) -> Tensor:
    """(M, k) bool, on the device."""
    ids = topk_ids.to(torch.int64)
    return (ids < -1) | (ids >= id_limit(config, expert_map))


def map_out_of_range(config: FusedMoEConfig, expert_map: Tensor) -> Tensor:
    """(num_experts,) bool, on the device."""
    local = expert_map.to(torch.int64)
    return (local < -1) | (local >= config.num_local_experts)


def mark_late(config: FusedMoEConfig, topk_ids: Tensor, expert_map: Tensor | None, late: Tensor) -> None:
    """Sets `late`, () bool, where an id or the map is out of range; waits for nothing. On a CUDA or ROCm device by one
    kernel for each, where Triton is there; elsewhere by several of torch's."""
    if late.device.type == "cuda" and find_spec("triton") is not None:
        from fp8moe.kernels.marks import mark_out_of_range

        with torch.cuda.device(late.device):
            mark_out_of_range(topk_ids, id_limit(config, expert_map), late)
            if expert_map is not None:
                mark_out_of_range(expert_map, config.num_local_experts, late)
        return
    late.logical_or_(ids_out_of_range(config, topk_ids, expert_map).any())
    if expert_map is not None:
        late.logical_or_(map_out_of_range(config, expert_map).any())


def check_ids(config: FusedMoEConfig, topk_ids: Tensor, expert_map: Tensor | None) -> None:
    """The range of the ids and of the map; waits for the device, so not for a call that is being captured.

    Raises:
        InvalidMoEInput: names the field, and the first id out of range.
    """
    if topk_ids.numel() == 0:
        return
    limit = id_limit(config, expert_map)
    ids = topk_ids.to(torch.int64)
    bad = ids_out_of_range(config, topk_ids, expert_map)
    if bool(bad.any()):
        token, slot = (int(part) for part in bad.nonzero()[0])
        known = "num_experts" if expert_map is not None else "num_local_experts (no expert_map given)"
        raise InvalidMoEInput(
            "topk_ids", f"{int(ids[token, slot])} at token {token}, slot {slot}", f"-1 <= id < {known} = {limit}"
        )
    if expert_map is not None and bool(map_out_of_range(config, expert_map).any()):
        raise InvalidMoEInput(
            "expert_map",
            f"from {int(expert_map.min())} to {int(expert_map.max())}",
            f"-1 or a local id below num_local_experts = {config.num_local_experts}",
        )
