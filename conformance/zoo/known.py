"""Mutants that are known to survive, and why: a figure that is published with its exceptions."""

from __future__ import annotations

from collections.abc import Mapping

KNOWN_SURVIVORS: Mapping[str, Mapping[str, str]] = {}
"""By mutant and level, the reason."""
