"""What adapters of kernel libraries share: loading, the layout of the weights, what surrounds the library's call."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, ClassVar

import torch
from torch import Tensor

from fp8moe.backends.triton_stages import device_guard, gate_refused
from fp8moe.config import FusedMoEActivationFormat
from fp8moe.dispatch import weighted_input
from fp8moe.experts import FusedMoEPermuteExpertsUnpermute, MoEWeights
from fp8moe.kernel_format import convert_to_fp8_moe_kernel_format
from fp8moe.libraries import DISTRIBUTIONS, Surroundings
from fp8moe.platforms import Platform, detected_platform
from fp8moe.registry import BackendUnavailable, Fp8MoeBackend, LayerNotSupported
from fp8moe.validation import InvalidMoEInput


def loaded(module: str, names: Sequence[str], user: str, remedy: str) -> Any:
    """A library's module that has all of these.

    Raises:
        BackendUnavailable: it does not load, for whatever reason, since a library's own set-up may raise anything; or
            it lacks one of them, and is another version.
    """
    try:
        found = import_module(module)
    except (Exception, SystemExit) as error:
        told = (str(error).strip().splitlines() or ["no text"])[0]
        raise BackendUnavailable(
            f"{user}: {module} does not load ({type(error).__name__}: {told}); {remedy}"
        ) from error
    missing = [name for name in names if not hasattr(found, name)]
    if missing:
        place = getattr(found, "__file__", None) or "no file"
        version = Surroundings().version(*DISTRIBUTIONS.get(module.partition(".")[0], ()))
        of = f" of release {version}" if version else ""
        told = f"{module}{of} ({place}) has no {', '.join(missing)}: another version"
        raise BackendUnavailable(f"{user}: {told}; {remedy}")
    return found


@dataclass(frozen=True)
class LibraryCall:
    """One call, for a library that knows no -1; all tensors contiguous.

    Args:
        hidden_states: (M, H).
        weights: (M, k) fp32, 0 for absent pairs.
        ids: (M, k) int32. An absent pair has an expert that its token has anyway, so that it brings no work to another
            and no value of its own into a scale that pairs share; a token without any has an expert of another rank, or
            the first one where there is none.
        present: (M, k) bool, False for pairs that are absent.
        local_ids: (M, k) int32, the local id of each pair, -1 for those that are absent or another rank's.
        without: (M, 1) bool, True for tokens without any expert.
        expert_map: (num_experts,) int32, or None where ids are local.
    """

    hidden_states: Tensor
    weights: Tensor
    ids: Tensor
    present: Tensor
    local_ids: Tensor
    without: Tensor
    expert_map: Tensor | None

    @classmethod
    def of(
        cls, hidden_states: Tensor, topk_weights: Tensor, topk_ids: Tensor, expert_map: Tensor | None, local: int
    ) -> LibraryCall:
        placed = None if expert_map is None else expert_map.to(torch.int32).contiguous()
        ids, weights, present, local_ids, without = _settled(topk_ids, topk_weights, placed, local)
        return cls(hidden_states.contiguous(), weights, ids, present, local_ids, without, placed)


def settled_by_torch(
    topk_ids: Tensor, topk_weights: Tensor, expert_map: Tensor | None, local: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `fp8moe.kernels.settle.settle_pairs`, where Triton is not to be had, in a dozen operations."""
    ids = topk_ids.to(torch.int64)
    limit = local if expert_map is None else expert_map.numel()
    present = (ids >= 0) & (ids < limit)  # out of range counts as absent, as in a captured graph
    held = present.any(1, keepdim=True)
    own = ids.gather(1, present.to(torch.int8).argmax(1, keepdim=True))
    other: Tensor | int = 0
    if expert_map is not None:
        elsewhere = expert_map < 0
        other = torch.where(elsewhere.any(), elsewhere.to(torch.int8).argmax(), 0)
    own = torch.where(held, own, other)
    here = ids if expert_map is None else expert_map.to(torch.int64)[ids.clamp(0, limit - 1)]
    return (
        torch.where(present, ids, own).to(torch.int32).contiguous(),
        topk_weights.float().masked_fill(~present, 0.0).contiguous(),
        present,
        torch.where(present & (here >= 0), here, -1).to(torch.int32),
        ~held,
    )


def once_a_token(ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Each expert in the first of a token's slots that have it, with the sum of their weights, for a library that finds
    an expert once a token: of a second slot it would compute nothing, or that one in place of the first.

    Args:
        ids: (M, k) int32, negative where a pair is absent.
        weights: (M, k) fp32.

    Returns:
        (M, k) int32 ids, -1 in all other slots, and (M, k) fp32 weights, 0 there. Sums are taken in fp64.
    """
    same = ids[:, :, None] == ids[:, None, :]
    slots = torch.arange(ids.shape[1], device=ids.device)
    kept = (same.to(torch.int8).argmax(2) == slots) & (ids >= 0)
    sums = torch.where(same, weights[:, None, :].double(), 0.0).sum(2).float()
    return torch.where(kept, ids, -1), torch.where(kept, sums, 0.0)


def _settled(*given: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    device = given[0].device
    if device.type != "cuda":
        return settled_by_torch(*given)
    from fp8moe.kernels.settle import settle_pairs

    with device_guard(device):
        return settle_pairs(*given)


class LibraryBackend(FusedMoEPermuteExpertsUnpermute):
    """A backend whose kernels are a library's."""

    backend: ClassVar[Fp8MoeBackend]
    written_from: ClassVar[str]
    """The distribution and the release that it was written from and is tried beside."""
    tried_on: ClassVar[str] = ""
    """The devices where the library's kernels have run under the suite, in words; "" where on none."""
    variants: ClassVar[Mapping[str, str]] = {}
    """Classes of the same backend that compute by another recipe, as "module:Class", by what is other. No selection
    gives them; `fp8moe check` takes them."""

    def platform(self) -> Platform:
        """The device; a test without one has another."""
        return detected_platform()

    @classmethod
    def lacks_here(cls, platform: Platform, env: Mapping[str, str]) -> str:
        """What an installed library lacks on this machine before it can be called, kernels that are not built or a
        compiler, with the remedy; "" where nothing is known of.

        Args:
            platform: the device here, which the backend's rule takes.
        """
        return ""

    def converted_weights(self, platform: Platform, *, e8m0: bool = False) -> MoEWeights:
        """
        Args:
            e8m0: as `convert_to_fp8_moe_kernel_format` has it.

        Raises:
            LayerNotSupported: sizes or scales that the kernel's layout cannot hold, with the limit.
        """
        given = (self.backend, self.config, self.quant, self.weights)
        try:
            return convert_to_fp8_moe_kernel_format(*given, platform=platform, e8m0=e8m0)
        except ValueError as error:
            raise LayerNotSupported(f"{type(self).__name__}: {error}") from error

    def refused_activation(self) -> str:
        """Of an activation that the backend's predicate takes no layer with; "" where it takes it."""
        known = self.support.activations if self.support else ()
        if self.config.activation not in known:
            return f"activation={self.config.activation}: expected {', '.join(sorted(known))}"
        return gate_refused(self.config)

    def show(self, stage: str, values: Tensor, rows: Callable[[Tensor], Tensor]) -> None:
        """To whoever observes the stages; `rows` puts them into the order of `observe`."""
        if self.observe is not None:
            self.observe(stage, rows(values))

    def activated_by_triton(
        self, gate_up: Tensor, *, present: Tensor | None = None, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """The layer's activation by our kernel, in fp32 and rounded once.

        Args:
            gate_up: (rows, 2I), or (rows, I) without a gate; fp32, bf16 or fp16.
            present: (rows,) int32; rows where it is negative are left undefined.

        Returns:
            (rows, I) of `dtype`.
        """
        from fp8moe.kernels.activation import activate

        with device_guard(gate_up.device):
            return activate(gate_up, self.config.activation, present=present, dtype=dtype)

    def combine(
        self, results: Tensor, places: Tensor, output: Tensor, weights: Tensor | None, *, by_row: bool = True
    ) -> None:
        """The weighted sum over a token's slots by our kernel, in fused steps and rounded once.

        Args:
            results: (rows, H) fp32, bf16 or fp16.
            places: (M * k,) int32, the row of each pair, negative where it has none.
            output: (M, H), written to.
            weights: (M, k) fp32; None: a plain sum.
            by_row: False for results in the order of the pairs, whatever number `places` gives them.
        """
        from fp8moe.kernels.reduce import weighted_sum

        with device_guard(output.device):
            weighted_sum(results, places, output, weights, by_row=by_row)


class LibraryExperts(LibraryBackend):
    """A library's whole MoE behind `apply`; a class of it loads the library, converts the weights and computes."""

    @staticmethod
    def activation_format() -> FusedMoEActivationFormat:
        return FusedMoEActivationFormat.Standard

    def compute(self, call: LibraryCall, output: Tensor) -> None:
        """Writes the layer's output, (M, H) and contiguous, for at least one token. What it writes for a token without
        any expert is of no account."""
        raise NotImplementedError(f"{type(self).__name__} implements neither compute nor compute_pairs")

    def compute_pairs(
        self, hidden_states: Tensor, weights: Tensor, ids: Tensor, expert_map: Tensor | None, output: Tensor
    ) -> None:
        """As `compute`, for a library that knows -1: with the arguments of `apply` as they are, and with zeros for a
        token without any expert."""
        call = LibraryCall.of(hidden_states, weights, ids, expert_map, self.config.num_local_experts)
        self.compute(call, output)
        output.masked_fill_(call.without, 0.0)

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
        written = output if output.is_contiguous() else torch.empty_like(output, memory_format=torch.contiguous_format)
        self.compute_pairs(hidden_states, topk_weights, topk_ids, expert_map, written)
        return output if written is output else output.copy_(written)


def first_local(expert_map: Tensor, local: int) -> int:
    """The first expert of this rank, whose experts follow each other.

    Raises:
        InvalidMoEInput: they do not.
    """
    offset = int((expert_map == 0).to(torch.int32).argmax())
    expected = torch.full_like(expert_map, -1)
    expected[offset : offset + local] = torch.arange(local, device=expert_map.device)[: expert_map.numel() - offset]
    if offset + local > expert_map.numel() or not torch.equal(expert_map, expected):
        raise InvalidMoEInput(
            "expert_map", "not one run of experts", f"experts n to n + {local - 1} as 0 to {local - 1}, in this order"
        )
    return offset
