"""What a table is compared with on this machine: the device's name and the installed versions, each asked once."""

from __future__ import annotations

from functools import cache
from importlib import metadata

import fp8moe
from fp8moe.detection import TRITON_DISTRIBUTIONS, describe_device


def installed_versions(*packages: str) -> dict[str, str]:
    """The versions of those distributions that are installed; "triton" under any of the names it comes under."""
    found = {package: _installed_version(package) for package in packages}
    return {package: version for package, version in found.items() if version is not None}


@cache
def _installed_version(package: str) -> str | None:
    if package == "fp8moe":  # a checkout need not be installed
        return fp8moe.__version__
    for name in TRITON_DISTRIBUTIONS if package == "triton" else (package,):
        try:
            return metadata.version(name)
        except (metadata.PackageNotFoundError, ValueError):
            continue
    return None


@cache
def device_name_here() -> str:
    """The name of the device that torch sees first, as `fp8moe platform` prints it."""
    return describe_device().name
