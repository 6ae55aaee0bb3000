"""Backends of installed packages that cannot be used: left out of the order, and told."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable
from dataclasses import dataclass

STRICT = "FP8MOE_STRICT_PLUG_INS"
"""Set, and not to 0: a plug-in that cannot be used is an error for whoever asks for the order, not a warning. It is
read when the order is first asked for."""


class BrokenPlugInWarning(UserWarning):
    """An installed package's backend cannot be used and is left out, so that another may be selected in its place."""


@dataclass(frozen=True)
class BrokenPlugIn:
    """One entry point whose backend cannot be used.

    Args:
        name: the entry point's.
        backend: the name in its `BackendSpec`; the entry point's where it did not get that far.
        distribution: the package that brings it, as an error message names it.
        error: what is wrong; it names the entry point or the backend, and the distribution.
    """

    name: str
    backend: str
    distribution: str
    error: str


def strict() -> bool:
    return os.environ.get(STRICT, "0").strip() not in ("", "0")


def warn_of(broken: Iterable[BrokenPlugIn]) -> None:
    """One warning for each that was not told before."""
    for plug_in in broken:
        if plug_in not in _told:
            warnings.warn(
                f"{plug_in.error}; it is left out of the order, and another backend may be selected in its place. "
                f"Repair or uninstall {plug_in.distribution}; {STRICT}=1 makes this an error",
                BrokenPlugInWarning,
                stacklevel=3,
            )
            _told.add(plug_in)


_told: set[BrokenPlugIn] = set()
