"""Small cases on which each relation has something to show: enough to take every relation on every scheme."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from conformance.cases import Case
from conformance.named_check import Check

PREFIX = "computes.relation."
PLAIN: Mapping[str, Any] = {"experts": 4, "top_k": 2, "hidden": 128, "inter": 128}
TOKENS = (9, 12, 17, 8)
"""In turn by the seed: odd and even, and one past a tile of 16."""
MANY = 70
"""Tokens where an oracle judges only some of them: relations reach the others."""

WIDE = {"hidden": 256, "inter": 256, "values": "block_scales"}
"""Several blocks of very different scales along both axes, gate and up apart."""
TAIL = {"hidden": 160, "inter": 160, "values": "block_scales"}
"""The same with blocks that are cut off."""

TELLING: Mapping[str, Mapping[str, Any]] = {
    "token_permutation": {"values": "loud_quiet", "law": "skewed"},
    "duplicate_tokens": {"law": "all_to_one"},
    "chunks": {"values": "loud_quiet", "tokens": MANY},
    "batch_invariance": {"values": "loud_quiet", "law": "skewed"},
    "nan_containment": {"law": "all_to_one"},
    "slot_permutation": {"top_k": 3, "law": "unnormalised"},
    "weights_scaled": {"top_k": 3, "law": "unnormalised"},
    "weights_additive": {"top_k": 3, "law": "unnormalised"},
    "zero_weight": {"top_k": 3, "law": "skewed"},
    "merged_duplicates": {"top_k": 3, "law": "unnormalised"},
    "absent_slots": {"top_k": 3},
    "expert_relabelling": {"experts": 5, "values": "bimodal_scales"},
    "shard_sum": {"law": "empty"},
    "padding_experts": {"values": "bimodal_scales"},
    "output_scale": WIDE,
    "input_scale": TAIL,
    "scale_code_exchange": TAIL,
    "block_isolation": WIDE,
    "padding_hidden": {"hidden": 160},
    "clamp_witness": {},
    "layout": {"hidden": 160},
    "output_given": {"hidden": 160},
    "poison": {"law": "masked"},
    "inputs_untouched": {"law": "repeated"},
    "no_aliasing": {},
    "sequence": {"law": "skewed"},
    "reload": {"values": "bimodal_scales"},
    "repeat": {"top_k": 3},
    "settled": {},
    "graph_replay": {"law": "skewed"},
}
"""By name of the relation, what differs from the plain sizes; values and laws are those that make a fault of its kind
visible."""


def relation_case(check: Check, scheme: str, activation: str = "silu", seed: int = 0, *, dtype: str = "bf16") -> Case:
    """A small case of a scheme for a relation. Where the relation does not apply (to this activation, say), its
    `why_not` says so.

    Raises:
        KeyError: the check is no relation.
    """
    fields = {**PLAIN, **TELLING[check.id.removeprefix(PREFIX)]}
    fields = {"tokens": TOKENS[seed % len(TOKENS)], **fields}
    return Case(scheme=scheme, activation=activation, dtype=dtype, seed=seed, **fields)
