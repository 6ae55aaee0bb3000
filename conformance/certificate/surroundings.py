"""What a certificate tells of where it was made: the device, the suite's own source, the backend's distribution."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict
from importlib import metadata
from importlib.resources import files
from importlib.resources.abc import Traversable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from conformance.distributions import bringing
from conformance.versions import versions
from conformance.waivers.release import OWN, Release
from fp8moe import __version__
from fp8moe.detection import describe_device

PACKAGES = ("conformance", "fp8moe")
SOURCE = (".py", ".json")
GROUP = "fp8moe.backends"


def surroundings(origin: str, release: Release) -> dict[str, Any]:
    """
    Args:
        origin: of the backend, a registered name or "module:Class".
        release: whose kernels it runs, which for an adapter is not the distribution that brings it.
    """
    return {
        "device": asdict(describe_device()),
        "versions": versions(),
        "suite": {"version": __version__, "sha256": suite_digest()},
        "distribution": distribution_of(origin),
        "release": asdict(release),
    }


def released(told: Mapping[str, Any]) -> Release:
    """The release that a certificate's surroundings tell; in earlier ones, the backend's own distribution."""
    given = told.get("release")
    if given is not None:
        return Release(*(str(given.get(name, "")) for name in ("distribution", "version", "why")))
    own = told["distribution"] or {}
    version = str(own.get("version", ""))
    return Release(str(own.get("name", "no distribution")), version, "" if version else "no version is recorded")


def suite_digest() -> str:
    """SHA-256 of every source and data file of the suite and the runtime, names included; whatever else a checkout has
    beside them, and whether it is one, does not show."""
    found = hashlib.sha256()
    for package in PACKAGES:
        for name, content in sorted(_sources(files(package), package)):
            found.update(f"{name} {len(content)}\n".encode())
            found.update(content)
    return found.hexdigest()


def _sources(folder: Traversable, name: str) -> list[tuple[str, bytes]]:
    found: list[tuple[str, bytes]] = []
    for each in folder.iterdir():
        if each.is_dir():
            found += _sources(each, f"{name}/{each.name}")
        elif each.name.endswith(SOURCE):
            found.append((f"{name}/{each.name}", each.read_bytes()))
    return found


def distribution_of(origin: str) -> dict[str, str] | None:
    """Name, version and the SHA-256 of the list of files (RECORD) of the distribution that a backend comes from; None
    where it comes from none."""
    module = origin.partition(":")[0]
    entries = [entry for entry in metadata.entry_points(group=GROUP) if entry.name == origin]
    if entries and entries[0].dist is not None:
        return _told(entries[0].dist)
    package = "fp8moe" if ":" not in origin else module.partition(".")[0]
    file = _file_of(package)
    name: str | None
    if package in PACKAGES:
        name = OWN  # and the certificate has a digest of its very source
    elif file is not None:
        name = next(bringing(package, file), None)
    else:  # a namespace of several distributions
        name = next(iter(metadata.packages_distributions().get(package, ())), None)
    try:
        return None if name is None else _told(metadata.distribution(name))
    except metadata.PackageNotFoundError:
        return None


def _file_of(package: str) -> Path | None:
    """Of a package at the top level, found without its import."""
    try:
        found = find_spec(package)
    except (ImportError, ValueError):
        return None
    return Path(found.origin).resolve() if found is not None and found.has_location and found.origin else None


def brought_by(told: Mapping[str, Any]) -> str:
    """The distribution that a certificate's surroundings tell, in words; "" where there is none."""
    own = told["distribution"] or {}
    return " ".join(str(own[name]) for name in ("name", "version") if own.get(name))


def _told(found: metadata.Distribution) -> dict[str, str]:
    record = found.read_text("RECORD") or ""
    return {
        "name": found.metadata["Name"],
        "version": found.version,
        "record_sha256": hashlib.sha256(record.encode()).hexdigest() if record else "",
    }
