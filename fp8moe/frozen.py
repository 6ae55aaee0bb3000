"""Hash once: a frozen dataclass that serves as a dictionary key keeps its hash."""

from __future__ import annotations

from dataclasses import fields
from typing import Any


def hash_once(self: Any) -> int:
    """`__hash__` of a frozen dataclass: over its fields, computed at the first use and kept."""
    found: int | None = self.__dict__.get("_hash")
    if found is None:
        found = hash(tuple(getattr(self, field.name) for field in fields(self)))
        object.__setattr__(self, "_hash", found)
    return found


def state_without_derived(self: Any) -> dict[str, Any]:
    """`__getstate__`: the fields only; hashes and interned values belong to one process."""
    return {name: value for name, value in self.__dict__.items() if not name.startswith("_")}
