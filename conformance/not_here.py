"""What was named and is not there. Its text begins with the name as it was given, so that each front end can put before
it what was typed: an option, an argument."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable

from fp8moe.near import remedy
from fp8moe.registry import SEED_ORDER, plug_ins_installed

REFERENCES = ("TorchExperts", "BatchedTorchExperts")
"""The classes of `fp8moe.backends.torch_experts` that can be named."""


class NotHere(ValueError):
    """
    Args:
        value: what was named.
        told: why it is not there, and what would be.
    """

    def __init__(self, value: str, told: str) -> None:
        super().__init__(value, told)
        self.value = value
        self.told = told

    def __str__(self) -> str:
        return f"{self.value}: {self.told}"


class UnknownBackend(NotHere):
    """There is no backend, module or class of that name, or the class is none of a backend."""

    @classmethod
    def of(cls, text: str, known: Iterable[str]) -> UnknownBackend:
        """Of a text without a colon, which is none of these names; no module that it may name is imported."""
        module, dot, last = text.rpartition(".")
        if not text.strip():
            return cls(text, "the name is empty; expected a backend's name, or module:Class")
        if dot and all(part.isidentifier() for part in text.split(".")) and _is_importable(module.partition(".")[0]):
            meant = f"{module}:{last}" if last[:1].isupper() else f"{text}:Class"
            return cls(text, f"module:Class needs a colon, such as {meant}")
        told = f"no backend has this name; {remedy(text, known)}"
        return cls(text, told if told.endswith("?") else f"{told}, or module:Class")


def surely_unknown(text: str) -> UnknownBackend | None:
    """What `conformance.plan.load_subject` raises, where that can be told without a backend's code: neither torch is
    imported, nor a plug-in, which only a worker may run and which may have another name than its entry point."""
    known = [*(name for name, _, _ in SEED_ORDER), *REFERENCES]
    if ":" in text or text in known or (plug_ins_installed() and text.strip()):
        return None
    return UnknownBackend.of(text, known)


def _is_importable(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):  # a module that hides where it is from
        return False


class NoDevice(NotHere):
    """There is no such device here."""
