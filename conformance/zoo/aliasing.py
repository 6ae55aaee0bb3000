"""Faults of the caller's tensors: inputs that are changed, outputs that are not written, or not only written."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from conformance.cases import Case
from conformance.zoo.override import nth, overriding
from fp8moe.dispatch import local_ids, weighted_input

SMALL = Case(tokens=16, experts=4, hidden=128, inter=128, seed=5)
ABSENT = Case(tokens=16, experts=4, hidden=128, inter=128, law="masked")
SINGLE = Case(tokens=16, experts=4, top_k=1, hidden=128, inter=128, weight_on_input=True)
SHARD = Case(tokens=16, experts=8, hidden=128, inter=128, ep="2:1", seed=8)

# -- inputs --


@overriding(
    "apply",
    "the result is written over the hidden states, which shared experts still need",
    catalogue="inplace-clobbers-shared-input",
    witness=SMALL,
    shows="input",
)
def clobbers_hidden_states(right: Any, self: Any, hidden: Tensor, *routing: Tensor, **options: Any) -> Any:
    result = right(self, hidden, *routing, **options)
    hidden.copy_(result)
    return result


@overriding(
    "apply",
    "the router's weight is multiplied into the caller's hidden states in place",
    witness=SINGLE,
    shows="input",
)
def weights_input_in_place(right: Any, self: Any, hidden: Tensor, weights: Tensor, ids: Tensor, **options: Any) -> Any:
    result = right(self, hidden, weights, ids, **options)
    if options.get("apply_router_weight_on_input"):
        hidden.copy_(weighted_input(hidden, weights))
    return result


@overriding(
    "apply",
    "with an expert map the caller's ids are replaced by local ones in place",
    witness=SHARD,
    shows="input",
)
def maps_ids_in_place(right: Any, self: Any, hidden: Tensor, weights: Tensor, ids: Tensor, **options: Any) -> Any:
    result = right(self, hidden, weights, ids, **options)
    if options.get("expert_map") is not None:
        ids.copy_(local_ids(ids, options["expert_map"], self.config.num_local_experts))
    return result


@overriding(
    "apply",
    "the weights of absent slots are set to 0 in the caller's tensor",
    witness=ABSENT,
    shows="input",
)
def zeroes_absent_weights(right: Any, self: Any, hidden: Tensor, weights: Tensor, ids: Tensor, **options: Any) -> Any:
    weights.masked_fill_(ids < 0, 0.0)
    return right(self, hidden, weights, ids, **options)


# -- outputs --


@overriding(
    "apply",
    "a given output doubles as scratch: a token whose first slot is absent is added to what the scratch held",
    catalogue="output-aliases-intermediate",
    witness=ABSENT,
)
def output_is_scratch(right: Any, self: Any, hidden: Tensor, weights: Tensor, ids: Tensor, **options: Any) -> Any:
    result = right(self, hidden, weights, ids, **options)
    if options.get("output") is not None:
        result[ids[:, 0] < 0] += hidden[ids[:, 0] < 0]
    return result


@overriding(
    "apply",
    "the last 128 columns of a given output are not written: its copy's grid is rounded down",
    witness=SMALL,
)
def given_output_cut_short(
    right: Any, self: Any, *given: Tensor, output: Tensor | None = None, **options: Any
) -> Tensor:
    result: Tensor = right(self, *given, **options)
    if output is None:
        return result
    whole = (result.shape[1] - 1) // 128 * 128
    output[:, :whole] = result[:, :whole]
    return output


@overriding(
    "apply",
    "a given output is added to: a GEMM's beta left at 1",
    witness=SMALL,
)
def given_output_added_to(right: Any, self: Any, *given: Tensor, output: Tensor | None = None, **options: Any) -> Any:
    result = right(self, *given, **options)
    return result if output is None else output.add_(result)


@overriding(
    "apply",
    "an output of the backend's own is not cleared, and tokens without an expert keep what the memory held",
    witness=ABSENT,
)
def own_output_not_cleared(right: Any, self: Any, hidden: Tensor, weights: Tensor, ids: Tensor, **options: Any) -> Any:
    result = right(self, hidden, weights, ids, **options)
    if options.get("output") is None:
        local = local_ids(ids, options.get("expert_map"), self.config.num_local_experts)
        result[(local < 0).all(dim=1)] = 1.0
    return result


@overriding(
    "apply",
    "the first call is timed with several tactics, all of which add to one output",
    witness=SMALL,
)
def tuning_adds_up(right: Any, self: Any, *given: Tensor, **options: Any) -> Any:
    result = right(self, *given, **options)
    return result.mul_(2) if nth(self, "apply") == 1 else result


ALIASING = (
    clobbers_hidden_states,
    weights_input_in_place,
    maps_ids_in_place,
    zeroes_absent_weights,
    output_is_scratch,
    given_output_cut_short,
    given_output_added_to,
    own_output_not_cleared,
    tuning_adds_up,
)
