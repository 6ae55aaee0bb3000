"""Metamorphic relations: named checks that need no reference, only what must not change when something else does.

Where the results of two calls must have equal bits is decided in `grounds`; where they need not, the bound around the
recipe's result of the changed problem judges, and no tolerance is picked. `telling` gives each relation small cases.
"""

from __future__ import annotations

from conformance.named_check import Check
from conformance.relations.experts import EXPERTS
from conformance.relations.memory import MEMORY
from conformance.relations.scales import SCALES
from conformance.relations.sequence import SEQUENCE
from conformance.relations.slots import SLOTS
from conformance.relations.telling import relation_case
from conformance.relations.tokens import TOKENS
from conformance.relations.weights import WEIGHTS

__all__ = ["RELATIONS", "relation_case"]

RELATIONS: tuple[Check, ...] = (*TOKENS, *SLOTS, *EXPERTS, *SCALES, *WEIGHTS, *MEMORY, *SEQUENCE)
