"""Every relation convicts a backend with a fault of its kind, and says so with a number and a place."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from conformance.checks import CHECKS, check_case
from conformance.plan import Subject, Target
from conformance.relations import RELATIONS, relation_case
from conformance.results import CheckResult, Status
from conformance.zoo.around import AROUND
from conformance.zoo.plant import plant
from fp8moe.activations import SWIGLU_LIMIT, SWIGLUOAI_ALPHA
from fp8moe.backends.torch_experts import TorchExperts
from fp8moe.experts import MoEWeights
from fp8moe.platforms import PLATFORMS

HERE = Target("cpu", PLATFORMS["cpu"], "cpu")
Apply = Callable[..., Tensor]
Experts = type[TorchExperts]


def verdict(relation: str, cls: Experts, scheme: str, activation: str) -> CheckResult:
    check = CHECKS[f"computes.relation.{relation}"]
    case = relation_case(check, scheme, activation, seed=1)
    return check_case(case, Subject(cls.__name__, cls, cls.__name__), HERE, check.id)


def planted(apply: Callable[..., Tensor]) -> Experts:
    """`apply(self, honest, hidden, weights, ids, **kwargs)` in the place of TorchExperts' own."""

    def overriding(self: Any, hidden: Tensor, weights: Tensor, ids: Tensor, **kwargs: Any) -> Tensor:
        return apply(self, lambda *a, **k: TorchExperts.apply(self, *a, **k), hidden, weights, ids, **kwargs)

    return type("Planted", (TorchExperts,), {"apply": overriding})


def loaded(change: Callable[[MoEWeights], MoEWeights]) -> Experts:
    class Loaded(TorchExperts):
        def __init__(self, config: Any, quant: Any, weights: MoEWeights) -> None:
            super().__init__(config, quant, weights)
            self.weights = change(weights)

    return Loaded


def known(name: str) -> Experts:
    """A fault of the zoo."""
    fault = next(fault for fault in AROUND if fault.name == name)
    cls = plant(fault, TorchExperts)
    assert issubclass(cls, TorchExperts)
    return cls


def into(result: Tensor, output: Tensor | None) -> Tensor:
    return result if output is None else output.copy_(result)


@planted
def tile_of_eight(self: Any, honest: Apply, *args: Any, output: Tensor | None = None, **kwargs: Any) -> Tensor:
    """Rows past the first tile are 2% too large."""
    result = honest(*args, **kwargs)
    result[8:] *= 1.02
    return into(result, output)


@planted
def by_batch(self: Any, honest: Apply, *args: Any, output: Tensor | None = None, **kwargs: Any) -> Tensor:
    """A gain that grows with the batch."""
    return into(honest(*args, **kwargs) * (1 + len(args[0]) / 256), output)


@planted
def alone_otherwise(self: Any, honest: Apply, *args: Any, output: Tensor | None = None, **kwargs: Any) -> Tensor:
    """The kernel for one token is 2% off."""
    result = honest(*args, **kwargs)
    return into(result * 1.02 if len(args[0]) == 1 else result, output)


@planted
def not_a_number_for_all(self: Any, honest: Apply, *args: Any, output: Tensor | None = None, **kwargs: Any) -> Tensor:
    """Padding rows are multiplied by 0 instead of left out."""
    return into(honest(*args, **kwargs) + (0.0 * args[0].sum(dim=0)), output)


@planted
def weight_by_token(self: Any, honest: Apply, hidden: Tensor, weights: Tensor, ids: Tensor, **kwargs: Any) -> Tensor:
    """The inverse permutation holds tokens where it should hold slots: each slot has the first one's weight."""
    return honest(hidden, weights[:, :1].expand_as(weights).contiguous(), ids, **kwargs)


@planted
def least_weight(self: Any, honest: Apply, hidden: Tensor, weights: Tensor, ids: Tensor, **kwargs: Any) -> Tensor:
    """A weight of 0 becomes a small one."""
    return honest(hidden, weights.clamp(min=1e-6), ids, **kwargs)


class MaskedByProduct(TorchExperts):
    """What an absent slot holds is multiplied by 0."""

    def combine(self, slots: Tensor, weights: Tensor, present: Tensor) -> Tensor:
        terms = slots * (weights * present)[:, :, None]
        return terms.sum(dim=1).to(self.config.in_dtype)


@planted
def global_id_in_local_table(
    self: Any, honest: Apply, hidden: Tensor, weights: Tensor, ids: Tensor, expert_map: Any = None, **kwargs: Any
) -> Tensor:
    """A rank takes every id for one of its own."""
    if expert_map is not None:
        ids = torch.where(ids < 0, ids, ids % self.config.num_local_experts)
    return honest(hidden, weights, ids, **kwargs)


@planted
def wrapped_block(self: Any, honest: Apply, hidden: Tensor, weights: Tensor, ids: Tensor, **kwargs: Any) -> Tensor:
    """With experts that are no multiple of four, the last block of counts overwrites the first expert's."""
    lost = self.config.num_experts % 4 != 0
    return honest(hidden, weights, ids.masked_fill(ids == 0, -1) if lost else ids, **kwargs)


class HighFloor(TorchExperts):
    """The floor of the amax is 8 instead of 1e-10."""

    @property
    def recipe(self) -> Any:
        return replace(self.contract.recipe, amax_floor=8.0)


class GateClampedBothWays(TorchExperts):
    def activation(self, gate_up: Tensor) -> Tensor:
        gate, up = (half.clamp(-SWIGLU_LIMIT, SWIGLU_LIMIT) for half in gate_up.chunk(2, dim=-1))
        return gate * torch.sigmoid(SWIGLUOAI_ALPHA * gate) * (up + 1)


class UpNotClamped(TorchExperts):
    def activation(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        gate = gate.clamp(max=SWIGLU_LIMIT)
        return gate * torch.sigmoid(SWIGLUOAI_ALPHA * gate) * (up + 1)


@planted
def walks_storage(self: Any, honest: Apply, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Rows are taken to follow one another."""
    return honest(hidden.as_strided(hidden.shape, (hidden.shape[1], 1)).clone(), *args, **kwargs)


@planted
def one_element_too_many(self: Any, honest: Apply, *args: Any, output: Tensor | None = None, **kwargs: Any) -> Tensor:
    """The last store is not masked."""
    result = honest(*args, output=output, **kwargs)
    if output is not None and output.untyped_storage().nbytes() > output.numel() * output.element_size():
        output.as_strided((1,), (1,), output.storage_offset() + output.numel()).zero_()
    return result


@planted
def ignores_strides_of_output(
    self: Any, honest: Apply, *args: Any, output: Tensor | None = None, **kwargs: Any
) -> Tensor:
    """Rows are written as if they followed one another."""
    result = honest(*args, **kwargs)
    if output is None:
        return result
    output.as_strided(output.shape, (output.shape[1], 1)).copy_(result)
    return output


@planted
def no_memset(self: Any, honest: Apply, *args: Any, output: Tensor | None = None, **kwargs: Any) -> Tensor:
    """Results are added to an output that nobody zeroed."""
    result = honest(*args, **kwargs)
    return result if output is None else output.add_(result)


@planted
def scratch_as_found(self: Any, honest: Apply, *args: Any, output: Tensor | None = None, **kwargs: Any) -> Tensor:
    """Scratch memory of the output's size, not zeroed, is added with a weight of 0."""
    result = honest(*args, **kwargs)
    return into((result + 0.0 * result.new_empty(result.shape, dtype=torch.float32)).to(result.dtype), output)


@planted
def counts_in_the_ids(self: Any, honest: Apply, hidden: Tensor, weights: Tensor, ids: Tensor, **kwargs: Any) -> Tensor:
    """A word behind the ids is written."""
    result = honest(hidden, weights, ids, **kwargs)
    if ids.untyped_storage().nbytes() > ids.numel() * ids.element_size():
        ids.as_strided((1,), (1,), ids.storage_offset() + ids.numel()).zero_()
    return result


@planted
def one_buffer(self: Any, honest: Apply, *args: Any, output: Tensor | None = None, **kwargs: Any) -> Tensor:
    """Every call of a shape returns the same memory."""
    result = honest(*args, **kwargs)
    kept = self.__dict__.setdefault("buffers", {}).setdefault(result.shape, result)
    return into(kept.copy_(result), output)


@planted
def stale_counter(self: Any, honest: Apply, *args: Any, output: Tensor | None = None, **kwargs: Any) -> Tensor:
    """After a larger call the last row is the earlier call's."""
    result = honest(*args, **kwargs)
    largest = self.__dict__.get("largest", 0)
    if len(result) < largest:
        result[-1] = self.last
    self.largest, self.last = max(largest, len(result)), result[-1].clone()
    return into(result, output)


class CachedByShape(TorchExperts):
    """Converted weights are kept by their shape, for every layer of the model."""

    kept: ClassVar[dict[Any, MoEWeights]] = {}

    def __init__(self, config: Any, quant: Any, weights: MoEWeights) -> None:
        super().__init__(config, quant, weights)
        self.weights = self.kept.setdefault((weights.w13.shape, weights.w13.dtype), weights)


@planted
def now_and_then(self: Any, honest: Apply, *args: Any, output: Tensor | None = None, **kwargs: Any) -> Tensor:
    """One bit of one element is another in one call of seven."""
    result = honest(*args, **kwargs)
    self.calls = self.__dict__.get("calls", 0) + 1
    if self.calls % 7 == 0:
        result.view(torch.int16)[-1, -1] ^= 1
    return into(result, output)


@planted
def returns_early(self: Any, honest: Apply, *args: Any, output: Tensor | None = None, **kwargs: Any) -> Tensor:
    """The result is written by a thread that the call does not wait for."""
    result = honest(*args, **kwargs)
    given = torch.empty_like(result) if output is None else output

    def write() -> None:
        time.sleep(0.001)
        given.copy_(result)

    threading.Thread(target=write).start()
    return given


def _added(weights: MoEWeights) -> MoEWeights:
    assert weights.w2_scale is not None
    return replace(weights, w2_scale=weights.w2_scale + 2.0**-12)


@dataclass(frozen=True)
class Planted:
    relation: str
    cls: Experts
    scheme: str = "block"
    activation: str = "silu"


FAULTS = (
    Planted("token_permutation", known("last_token_lost")),
    Planted("duplicate_tokens", tile_of_eight),
    Planted("chunks", by_batch),
    Planted("batch_invariance", alone_otherwise),
    Planted("nan_containment", not_a_number_for_all),
    Planted("slot_permutation", weight_by_token),
    Planted("weights_scaled", known("renormalised")),
    Planted("weights_additive", known("renormalised")),
    Planted("zero_weight", least_weight),
    Planted("merged_duplicates", known("duplicate_dropped")),
    Planted("absent_slots", MaskedByProduct),
    Planted("expert_relabelling", known("expert0_scale")),
    Planted("shard_sum", global_id_in_local_table),
    Planted("padding_experts", wrapped_block),
    Planted("output_scale", loaded(_added)),
    Planted("input_scale", HighFloor),
    Planted("scale_code_exchange", known("scale_transposed")),
    Planted("scale_code_exchange", known("expert0_scale"), "tensor_tok"),
    Planted("block_isolation", known("scale_transposed")),
    Planted("block_isolation", known("gate_up_swapped"), "channel_tok"),
    Planted("padding_hidden", known("tail_dropped")),
    Planted("clamp_witness", GateClampedBothWays, activation="swigluoai"),
    Planted("clamp_witness", UpNotClamped, activation="swigluoai"),
    Planted("layout", walks_storage),
    Planted("output_given", one_element_too_many),
    Planted("output_given", ignores_strides_of_output),
    Planted("poison", no_memset),
    Planted("poison", scratch_as_found),
    Planted("inputs_untouched", counts_in_the_ids),
    Planted("no_aliasing", one_buffer),
    Planted("sequence", stale_counter),
    Planted("reload", CachedByShape),
    Planted("repeat", now_and_then),
    Planted("settled", returns_early),
)
GRAPH = "graph_replay"  # has a file of its own


def _id(fault: Planted) -> str:
    return f"{fault.relation}-{fault.scheme}-{fault.cls.__name__}"


@pytest.mark.parametrize("fault", FAULTS, ids=_id)
def test_the_relation_convicts(fault: Planted) -> None:
    result = verdict(fault.relation, fault.cls, fault.scheme, fault.activation)
    assert result.status is Status.FAILED, result.reason
    accident = re.search(r" raised |apply returned (shape|dtype|device)", result.reason)
    assert accident is None, result.reason


@pytest.mark.parametrize("fault", FAULTS, ids=_id)
def test_the_honest_backend_passes_where_the_fault_does_not(fault: Planted) -> None:
    result = verdict(fault.relation, TorchExperts, fault.scheme, fault.activation)
    assert result.status is Status.PASSED, result.reason


def test_every_relation_has_a_fault() -> None:
    names = {check.id.removeprefix("computes.relation.") for check in RELATIONS}
    assert {fault.relation for fault in FAULTS} | {GRAPH} == names
