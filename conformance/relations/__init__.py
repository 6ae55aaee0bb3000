"""Metamorphic relations: named checks that need no reference, only what must not change when something else does."""

from __future__ import annotations

from conformance.trial import Check

RELATIONS: tuple[Check, ...] = ()
