"""What adapters of kernel libraries share: loading, the layout of the weights, what surrounds the library's call."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from importlib import import_module
from typing import Any, ClassVar

import torch
from torch import Tensor

from fp8moe.config import FusedMoEActivationFormat
from fp8moe.dispatch import weighted_input
from fp8moe.experts import FusedMoEPermuteExpertsUnpermute, MoEWeights
from fp8moe.kernel_format import convert_to_fp8_moe_kernel_format
from fp8moe.platforms import Platform, detected_platform
from fp8moe.registry import BackendUnavailable, Fp8MoeBackend
from fp8moe.validation import InvalidMoEInput


def loaded(module: str, names: Sequence[str], user: str, remedy: str) -> Any:
    """A library's module that has all of these.

    Raises:
        BackendUnavailable: it does not load, for whatever reason, since a library's own set-up may raise anything; or
            it lacks one of them, and is another version.
    """
    try:
        found = import_module(module)
    except Exception as error:
        told = (str(error).strip().splitlines() or ["no text"])[0]
        raise BackendUnavailable(
            f"{user}: {module} does not load ({type(error).__name__}: {told}); {remedy}"
        ) from error
    missing = [name for name in names if not hasattr(found, name)]
    if missing:
        raise BackendUnavailable(f"{user}: {module} has no {', '.join(missing)}: another version; {remedy}")
    return found


class LibraryExperts(FusedMoEPermuteExpertsUnpermute):
    """A library's whole MoE behind `apply`; a class of it loads the library, converts the weights and computes."""

    backend: ClassVar[Fp8MoeBackend]
    written_from: ClassVar[str]
    """The distribution and the release that it was written from and is tried beside, having run on no device."""

    @staticmethod
    def activation_format() -> FusedMoEActivationFormat:
        return FusedMoEActivationFormat.Standard

    def platform(self) -> Platform:
        """The device; a test without one has another."""
        return detected_platform()

    def converted_weights(self, platform: Platform) -> MoEWeights:
        """
        Raises:
            BackendUnavailable: sizes or scales that the kernel's layout cannot hold, with the limit.
        """
        given = (self.backend, self.config, self.quant, self.weights)
        try:
            return convert_to_fp8_moe_kernel_format(*given, platform=platform)
        except ValueError as error:
            raise BackendUnavailable(f"{type(self).__name__}: {error}") from error

    @abstractmethod
    def compute(
        self, hidden_states: Tensor, weights: Tensor, ids: Tensor, expert_map: Tensor | None, output: Tensor
    ) -> None:
        """The layer's output for tokens that are there, all arguments contiguous.

        Args:
            weights, ids: (M, k) fp32 and int32, without -1: `without_absent`.
            output: (M, H), to be written.
        """

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
        self.check_call(
            hidden_states,
            topk_weights,
            topk_ids,
            expert_map=expert_map,
            apply_router_weight_on_input=apply_router_weight_on_input,
            output=output,
        )
        if output is None:
            output = torch.empty_like(hidden_states, memory_format=torch.contiguous_format)
        if topk_ids.numel() == 0:
            return output.zero_()
        if apply_router_weight_on_input:
            hidden_states, topk_weights = weighted_input(hidden_states, topk_weights), torch.ones_like(topk_weights)
        weights, ids = without_absent(topk_weights, topk_ids, expert_map)
        written = output if output.is_contiguous() else torch.empty_like(output, memory_format=torch.contiguous_format)
        self.compute(hidden_states.contiguous(), weights, ids, expert_map, written)
        return output if written is output else output.copy_(written)


def without_absent(topk_weights: Tensor, topk_ids: Tensor, expert_map: Tensor | None) -> tuple[Tensor, Tensor]:
    """Weights (M, k) fp32 and ids (M, k) int32 for a library that knows no -1: such a pair goes to an expert that is
    elsewhere, or where none is to the first one, and has no weight."""
    ids = topk_ids.to(torch.int64)
    absent = ids < 0
    other: Tensor | int = 0 if expert_map is None else expert_map.argmin()
    weights = topk_weights.float().masked_fill(absent, 0.0)
    return weights.contiguous(), torch.where(absent, other, ids).to(torch.int32).contiguous()


def first_local(expert_map: Tensor, local: int) -> int:
    """The first expert of this rank, whose experts follow each other.

    Raises:
        InvalidMoEInput: they do not.
    """
    offset = int((expert_map == 0).to(torch.int32).argmax())
    expected = torch.full_like(expert_map, -1)
    expected[offset : offset + local] = torch.arange(local, device=expert_map.device)[: expert_map.numel() - offset]
    if not torch.equal(expert_map, expected):
        raise InvalidMoEInput(
            "expert_map", "not one run of experts", f"experts n to n + {local - 1} as 0 to {local - 1}, in this order"
        )
    return offset
