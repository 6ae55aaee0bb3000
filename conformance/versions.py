"""The versions that a report belongs to, found without importing what they are of."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

from fp8moe import __version__
from fp8moe.detection import TRITON_DISTRIBUTIONS


def versions() -> dict[str, str]:
    """Of fp8moe, Python, torch and triton; "none" where one is not installed."""
    torch, triton = _first("torch"), _first(*TRITON_DISTRIBUTIONS)
    return {"fp8moe": __version__, "python": platform.python_version(), "torch": torch, "triton": triton}


def _first(*distributions: str) -> str:
    for name in distributions:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "none"
