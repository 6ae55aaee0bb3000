"""A question to both selectors: a call as parts that JSON can hold, so that one line of text brings it back."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

import torch

from conformance.selection import axes
from conformance.selection.axes import SCHEMES
from conformance.selection.build import make_config, make_parallel
from conformance.selection.draw import Call
from fp8moe import FusedMoEConfig, GroupShape, Platform, QuantKey, RoutingMethodType, ScaleDesc, quant

Parts = dict[str, Any]
INSTALLED = "vllm"
"""The library of every platform here: where vLLM is asked, it is there."""
NAMED = {name: key for name, key in vars(quant).items() if isinstance(key, QuantKey)}
KEYS = ("weight_key", "activation_key")
PLATFORM = ("kind", "capability", "gcn_arch", "cuda_version", "libraries")
PARALLEL = (
    *("tp_size", "pcp_size", "dp_size", "ep_size"),
    *("use_ep", "all2all_backend", "enable_eplb", "is_sequence_parallel"),
)
LEFT_OUT = ("PATH",)
"""Variables that are the process's own; they are drawn to show that a selector does not read them."""


def platform_parts(platform: Platform) -> Parts:
    found = {name: getattr(platform, name) for name in PLATFORM}
    for pair in ("capability", "cuda_version"):
        found[pair] = None if found[pair] is None else list(found[pair])
    return found | {"libraries": sorted(platform.libraries - {INSTALLED})}


def parts_of(call: Call) -> Parts:
    """A call's parts; candidates of its own are no part."""
    config, parallel = call.config, call.config.moe_parallel_config
    return (
        platform_parts(call.platform)
        | {"weight_key": key_text(call.weight_key), "activation_key": key_text(call.activation_key)}
        | {"activation": config.activation, "is_act_and_mul": config.is_act_and_mul}
        | {"routing_method": config.routing_method.name, "in_dtype": _dtype_text(config.in_dtype)}
        | {"router_logits_dtype": _dtype_text(config.router_logits_dtype), "is_lora_enabled": config.is_lora_enabled}
        | {name: getattr(parallel, name) for name in PARALLEL}
        | {"allow_vllm_cutlass": call.allow_vllm_cutlass}
        | {"env": {name: text for name, text in call.env.items() if name not in LEFT_OUT}}
    )


def call_of(parts: Parts, here: Platform | None = None) -> Call:
    """The call of the parts; `here` is its platform where they are to be asked of the real one.

    Raises:
        ValueError, TypeError, KeyError: no call has these parts.
    """
    return Call(
        _config(parts),
        _key(parts["weight_key"]),
        _key(parts["activation_key"]),
        parts["allow_vllm_cutlass"],
        here or _platform(parts),
        dict(parts["env"]),
        None,
    )


def _platform(parts: Parts) -> Platform:
    fields = {name: parts[name] for name in PLATFORM}
    return Platform(**fields | {"libraries": frozenset(parts["libraries"]) | {INSTALLED}})


def _config(parts: Parts) -> FusedMoEConfig:
    parallel = make_parallel(
        tp=parts["tp_size"],
        pcp=parts["pcp_size"],
        dp=parts["dp_size"],
        ep=parts["ep_size"],
        use_ep=parts["use_ep"],
        exchange=parts["all2all_backend"],
        eplb=parts["enable_eplb"],
        sequence_parallel=parts["is_sequence_parallel"],
    )
    return make_config(
        activation=parts["activation"],
        gated=parts["is_act_and_mul"],
        routing=RoutingMethodType[parts["routing_method"]],
        parallel=parallel,
        in_dtype=_dtype(parts["in_dtype"]),
        logits_dtype=_dtype(parts["router_logits_dtype"]),
        lora=parts["is_lora_enabled"],
    )


def _dtype_text(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")


def _dtype(text: str) -> torch.dtype:
    dtype = getattr(torch, text, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{text!r} is no dtype")
    return dtype


def key_text(key: QuantKey | None) -> Any:
    """A named key's name; of another one dtype, scale's dtype, static, and the group's rows and columns."""
    if key is None:
        return None
    for name, one in NAMED.items():
        if one == key:
            return name
    if key.scale2 is not None or not key.symmetric:
        raise ValueError(f"{key} has no text")
    shape = key.scale.group_shape
    return [_dtype_text(key.dtype), _dtype_text(key.scale.dtype), key.scale.static, shape.row, shape.col]


def _key(text: Any) -> QuantKey | None:
    if text is None:
        return None
    if isinstance(text, str):
        return NAMED[text]
    dtype, scale, static, row, col = text
    return QuantKey(_dtype(dtype), ScaleDesc(_dtype(scale), static, GroupShape(row, col)))


USUAL: Parts = parts_of(
    Call(make_config(), *SCHEMES["block"], False, axes.DEVICES["sm90"].with_libraries(INSTALLED), {}, None)
)


def told(parts: Parts) -> str:
    """One line: the parts that are not the usual ones."""
    return json.dumps({name: value for name, value in parts.items() if value != USUAL[name]}, ensure_ascii=True)


def parse(text: str) -> Parts:
    """
    Raises:
        ValueError: no line of `told`.
    """
    given = json.loads(text)
    if not isinstance(given, dict) or not given.keys() <= USUAL.keys():
        raise ValueError(f"{text!r} is no question: expected an object with some of {', '.join(USUAL)}")
    parts = USUAL | given
    try:
        call_of(parts)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{text!r} is no question: {type(error).__name__}: {error}") from error
    return parts


def can_be_put(env: Mapping[str, str]) -> bool:
    """Whether a process's environment can hold these texts."""
    try:
        return all(b"\0" not in os.fsencode(text) for text in env.values())
    except UnicodeEncodeError:
        return False
