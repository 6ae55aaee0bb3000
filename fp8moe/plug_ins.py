"""Backends of installed packages that cannot be used: left out of the order, and told."""

from __future__ import annotations

import logging
import os
import threading
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

STRICT = "FP8MOE_STRICT_PLUG_INS"
"""Set, and not to 0: a plug-in that cannot be used is an error for whoever asks for the order, not a warning. It is
read when the order is first asked for."""

SLOW_SECONDS = 10.0
LOGGER = logging.getLogger("fp8moe.plug_ins")


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


@contextmanager
def told_if_slow(where: str) -> Iterator[None]:
    """Says what is waited for, should an import hang; the logger writes to standard error where none is set up."""
    timer = threading.Timer(SLOW_SECONDS, LOGGER.warning, (f"still importing {where} after {SLOW_SECONDS:g} s",))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


_told: set[BrokenPlugIn] = set()
