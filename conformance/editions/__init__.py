"""Editions of the suite, as data: what must pass, and within which limits. An edition never changes once it is out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files

from conformance.checks import CHECKS
from conformance.levels import items_for
from conformance.plan import Target
from conformance.vocabulary import SCHEME_NAMES
from fp8moe.config import ACTIVATIONS
from fp8moe.platforms import PLATFORMS

EVERYTHING = dict.fromkeys(SCHEME_NAMES, ACTIVATIONS)
DEVICES = ("cpu", "cuda", "rocm", "xpu")
"""The targets that a certificate can be of: in Triton's interpreter nothing runs on a device."""


class UnknownEdition(ValueError):
    """There is no edition of that name, or this suite no longer makes its cases; the text says what to do."""


@dataclass(frozen=True)
class Edition:
    """What a certificate is held to.

    Args:
        edition: its name.
        level, seed: of the run.
        limit: of error/bound, and of every other ratio.
        checks: every check that a backend goes through, by id.
        manifests: by kind of device, `manifest` of what a backend goes through that takes every scheme and activation.
    """

    edition: str
    level: str
    seed: int
    limit: float
    checks: Sequence[str]
    manifests: Mapping[str, str]

    @property
    def stale(self) -> str:
        """Why this suite does not go through the edition's cases any more; "" where it does."""
        if sorted(CHECKS) != list(self.checks):
            return f"the suite's checks are not those of edition {self.edition}"
        wrong = [kind for kind, digest in self.manifests.items() if manifest(self, KINDS[kind]) != digest]
        return f"the suite's cases on {', '.join(wrong)} are not those of edition {self.edition}" if wrong else ""


KINDS: Mapping[str, str] = {"cpu": "cpu", "gpu": "cuda"}
"""A target of each kind of device, which decides on the sizes of cases."""


def names() -> list[str]:
    """Of all editions, the newest last."""
    return sorted(file.name.removesuffix(".json") for file in files(__name__).iterdir() if file.name.endswith(".json"))


def edition(name: str) -> Edition:
    """
    Raises:
        UnknownEdition: there is none of that name.
    """
    if name not in names():
        raise UnknownEdition(f"edition={name!r}: expected {' or '.join(names())}")
    return Edition(**json.loads(files(__name__).joinpath(f"{name}.json").read_text(encoding="utf-8")))


def target_of(name: str) -> Target:
    """As far as cases depend on it.

    Raises:
        ValueError: none that a certificate can be of.
    """
    if name not in DEVICES:
        raise ValueError(f"target={name!r}: expected one of {', '.join(DEVICES)}")
    return Target(name, PLATFORMS["cpu"], {"cpu": "cpu", "xpu": "xpu"}.get(name, "cuda"))


def manifest(which: Edition, target: str) -> str:
    """SHA-256 of the ids of every check and case, in order."""
    items = items_for(which.level, EVERYTHING, target_of(target), which.seed, fnuz=False)
    text = "\n".join(f"{item.check} {item.case}" for item in items)
    return hashlib.sha256(text.encode()).hexdigest()
