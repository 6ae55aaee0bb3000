"""The contract of a backend: one class that takes a layer's weights once and then computes it."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fp8moe.config import FusedMoEActivationFormat, FusedMoEConfig
from fp8moe.envs import Env
from fp8moe.keys import QuantKey
from fp8moe.platforms import Platform, detected_platform
from fp8moe.quant import FusedMoEQuantConfig
from fp8moe.recipe import Arithmetic, Contract, Recipe
from fp8moe.registry import Reason
from fp8moe.support import Support
from fp8moe.texts import said

__all__ = [
    "Arithmetic",
    "Contract",
    "FusedMoEPermuteExpertsUnpermute",
    "MoEWeights",
    "Recipe",
    "contract_violations",
]


@dataclass(frozen=True)
class MoEWeights:
    """A layer's weights in the checkpoint's layout. E local experts, H hidden, I intermediate per partition.

    Args:
        w13: (E, 2I, H), rows gate then up; (E, I, H) where the MLP is not gated. FP8, or 16 bit unquantised.
        w2: (E, H, I).
        w13_scale, w2_scale: fp32; per tensor (E,); per channel (E, rows, 1); per block
            (E, ceil(rows / 128), ceil(columns / 128)), for w13 the gate's blocks then the up's; None unquantised.
        w13_bias, w2_bias: (E, rows), or None.
        a13_scale, a2_scale: fp32 scalars, one element, for static activation scales; else None.
    """

    w13: Tensor
    w2: Tensor
    w13_scale: Tensor | None = None
    w2_scale: Tensor | None = None
    w13_bias: Tensor | None = None
    w2_bias: Tensor | None = None
    a13_scale: Tensor | None = None
    a2_scale: Tensor | None = None

    def to(self, device: torch.device | str) -> MoEWeights:
        """The same weights on another device."""
        return MoEWeights(
            *(None if value is None else value.to(device) for value in vars(self).values())  # type: ignore[arg-type]
        )


class FusedMoEPermuteExpertsUnpermute(ABC):
    """A backend: from hidden states, expert ids and weights to the layer's output.

    A vendor's class sets `support` (or overrides `is_supported_config`) and `contract`, and implements
    `activation_format` and either `apply` (Standard) or `apply_batched` (BatchedExperts).

    Args:
        config: the layer.
        quant: dtypes, group shapes, static or dynamic; no scale values.
        weights: the canonical layout; converted to the kernel's own here, once, and never changed.

    Raises:
        InvalidMoEInput: (a ValueError) a weight or scale has another shape, dtype or device than `config` and
            `quant` call for, or a scale is not finite.
        BackendUnavailable: the library, the device or the adapter is not there.
        LayerNotSupported: the kernels cannot take this layer, whatever the predicate says; the text names the limit.
    """

    support: ClassVar[Support | None] = None
    contract: Contract = Contract()
    observe: Callable[[str, Tensor], None] | None = None
    """Set by whoever wants to look at a backend's stages, None otherwise. A backend that can show them calls it, where
    it is set, once a call with each name and a row for each token-expert pair, number token * top_k + slot (for
    `apply_batched` for each of the E * T places; the base class puts them in order): "first_gemm" (P, 2I), gate then
    up, with bias; "activation" (P, I); "requantisation" (P, I), the FP8 codes without their scales; "second_gemm"
    (P, H) with bias, before the routing weight. Rows of absent pairs may hold anything."""
    _late_ids: Tensor | None = None

    def __init__(self, config: FusedMoEConfig, quant: FusedMoEQuantConfig, weights: MoEWeights) -> None:
        from fp8moe.validation import check_weights

        check_weights(config, quant, weights)
        self.config = config
        self.quant = quant
        self.weights = weights
        # Whether a captured call met an id out of range; allocated here, since a capture's own memory is its graph's.
        self._late_ids = torch.zeros((), dtype=torch.bool, device=weights.w13.device)

    @staticmethod
    @abstractmethod
    def activation_format() -> FusedMoEActivationFormat:
        """The layout this class takes."""

    @staticmethod
    def is_supported_config(
        cls: type[FusedMoEPermuteExpertsUnpermute],
        config: FusedMoEConfig,
        weight_key: QuantKey | None,
        activation_key: QuantKey | None,
        activation_format: FusedMoEActivationFormat,
        platform: Platform | None = None,
        env: Mapping[str, str] | None = None,
    ) -> tuple[bool, Reason | None]:
        """Whether the class takes a configuration, by rule; and if not, the first reason.

        Whether its library is installed and its adapter written is another question: constructing answers that.
        A class without `support` takes everything in its own format.

        Raises:
            MalformedVariable: a variable that the device check reads holds nonsense.
        """
        if cls.support is None:
            fits = activation_format is cls.activation_format()
            return fits, None if fits else Reason.FORMAT
        reason = cls.support.first_refusal(
            detected_platform() if platform is None else platform,
            Env.of(env),
            config.facets,
            weight_key,
            activation_key,
            activation_format,
        )
        return reason is None, reason

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
        """The layer's output for M tokens.

        Args:
            hidden_states: (M, H), `config.in_dtype`.
            topk_weights: (M, k) fp32, as the router gives them; not renormalised here.
            topk_ids: (M, k) integers, global expert ids; -1 counts as absent. An id may repeat in a row.
            expert_map: (num_experts,) from global to local ids, -1 for experts elsewhere; None: ids are local.
            apply_router_weight_on_input: multiply the hidden states instead of the result; top-1 only.
            output: (M, H), written and returned when given.

        Returns:
            (M, H) in `config.in_dtype`; a token without a local expert gets zeros.

        Raises:
            InvalidMoEInput: a tensor has another shape, dtype or device than expected, or an id is out of range.
        """
        if self.activation_format() is not FusedMoEActivationFormat.BatchedExperts:
            raise NotImplementedError(f"{type(self).__name__} implements apply()")
        from fp8moe.batched import apply_through_batches

        return apply_through_batches(
            self, hidden_states, topk_weights, topk_ids, expert_map, apply_router_weight_on_input, output
        )

    def check_call(
        self,
        hidden_states: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        *,
        expert_map: Tensor | None = None,
        apply_router_weight_on_input: bool = False,
        output: Tensor | None = None,
    ) -> None:
        """What an `apply` may begin with: checks its arguments. Under graph capture nothing waits for the device: an
        id out of range is marked there instead, and the next eager call raises.

        Raises:
            InvalidMoEInput: as `apply`.
        """
        from fp8moe.validation import (
            InvalidMoEInput,
            check_call,
            check_ids,
            id_limit,
            mark_late,
        )

        device = self.weights.w13.device
        check_call(
            self.config,
            device,
            hidden_states,
            topk_weights,
            topk_ids,
            expert_map=expert_map,
            apply_router_weight_on_input=apply_router_weight_on_input,
            output=output,
        )
        late = self._late_ids
        if is_capturing(device):
            if late is not None:
                mark_late(self.config, topk_ids, expert_map, late)
            return
        if late is not None and bool(late):
            late.zero_()
            limit = id_limit(self.config, expert_map)
            raise InvalidMoEInput(
                "topk_ids",
                "(or expert_map) out of range in an earlier replay of a captured graph, where it counted as -1",
                f"-1 <= id < {limit} in every replay",
            )
        check_ids(self.config, topk_ids, expert_map)

    def apply_batched(self, hidden_states: Tensor, expert_num_tokens: Tensor) -> Tensor:
        """(E, T, H) tokens grouped by expert, the first `expert_num_tokens[e]` rows of each valid, to (E, T, H).

        Rows past an expert's count are left undefined. The base class dispatches to it and combines its results.
        """
        raise NotImplementedError(f"{type(self).__name__} implements apply_batched()")


def is_capturing(device: torch.device) -> bool:
    """Whether work on this device is being captured in a graph, so that nothing may wait for it."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def contract_violations(cls: object) -> list[str]:
    """What keeps a class from being a backend, one sentence each; empty where it keeps the contract."""
    if not inspect.isclass(cls) or not issubclass(cls, FusedMoEPermuteExpertsUnpermute):
        return [f"experts_cls={cls!r}: expected a subclass of FusedMoEPermuteExpertsUnpermute"]
    base = FusedMoEPermuteExpertsUnpermute
    abstract = sorted(getattr(cls, "__abstractmethods__", ()))
    found = (
        [f"{cls.__name__} leaves {', '.join(abstract)} abstract, so it can never be constructed"] if abstract else []
    )
    try:
        layout = cls.activation_format()
    except (Exception, SystemExit) as error:
        return [f"{cls.__name__}.activation_format() raised {said(error)}; make it a staticmethod"]
    if layout is FusedMoEActivationFormat.Standard:
        if cls.apply is base.apply:
            found.append(f"{cls.__name__} takes the Standard format and does not implement apply()")
    elif layout is FusedMoEActivationFormat.BatchedExperts:
        if cls.apply_batched is base.apply_batched and cls.apply is base.apply:
            found.append(f"{cls.__name__} takes the BatchedExperts format and does not implement apply_batched()")
    else:
        found.append(f"{cls.__name__}.activation_format() gave {layout!r}: expected a FusedMoEActivationFormat")
    if cls.support is not None and not isinstance(cls.support, Support):
        found.append(
            f"{cls.__name__}.support is {type(cls.support).__name__}: expected a fp8moe.support.Support or None"
        )
    if cls.support is not None and isinstance(cls.support, Support) and cls.support.activation_format is not layout:
        found.append(f"{cls.__name__}.support.activation_format differs from activation_format()")
    if not isinstance(inspect.getattr_static(cls, "is_supported_config"), staticmethod):
        found.append(f"{cls.__name__}.is_supported_config is no staticmethod")
    if not isinstance(cls.contract, (Contract, property)):
        found.append(f"{cls.__name__}.contract is {type(cls.contract).__name__}: expected a Contract")
    found += _signature_violations(cls)
    return found


def _signature_violations(cls: type[FusedMoEPermuteExpertsUnpermute]) -> list[str]:
    """The suite passes three arguments by position and the rest by keyword; `**kwargs` and `*args` take them all."""
    parameters = list(inspect.signature(cls.apply).parameters.values())
    kinds = [parameter.kind for parameter in parameters]
    found = []
    positional = sum(
        kind in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD) for kind in kinds
    )
    if positional < 4 and inspect.Parameter.VAR_POSITIONAL not in kinds:
        found.append(f"{cls.__name__}.apply takes no hidden_states, topk_weights and topk_ids by position")
    names = [parameter.name for parameter in parameters]
    keywords = ("expert_map", "apply_router_weight_on_input", "output")
    missing = [name for name in keywords if name not in names]
    if missing and inspect.Parameter.VAR_KEYWORD not in kinds:
        found.append(f"{cls.__name__}.apply lacks the keyword {', '.join(missing)}")
    return found
