"""What a certificate tells of where it was made: the device, the suite's own source, the backend's distribution."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict
from importlib import metadata
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from conformance.distributions import bringing, editable_from, file_of, having
from conformance.plan import reference_subjects
from conformance.versions import versions
from conformance.waivers.release import OWN, Release
from fp8moe import __version__
from fp8moe.detection import describe_device
from fp8moe.registry import seed_backends

if TYPE_CHECKING:
    from importlib.abc import Traversable  # Python 3.10 has it there alone

PACKAGES = ("conformance", "fp8moe")
SOURCE = (".py", ".json")


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
        "distribution": distribution_of(origin, release),
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


def distribution_of(origin: str, release: Release) -> dict[str, Any] | None:
    """Name, version and the SHA-256 of the list of files (RECORD) of the distribution that a backend comes from, and
    `editable` where it is installed so, since that list has none of its source; None where it comes from none."""
    package = origin.partition(":")[0].partition(".")[0] if ":" in origin else ""
    file = file_of(package) if package else None
    name: str | None
    ours = [*(spec.name for spec in seed_backends()), *(subject.name for subject in reference_subjects())]
    if package in PACKAGES or origin in ours:
        name = OWN  # and the certificate has a digest of its very source
    elif ":" not in origin:  # a registered one, whose release is of what registered it
        name = release.distribution
    elif file is not None:
        name = next(bringing(package, file), None)
    else:  # a namespace of several distributions
        name = next(iter(having(package)), None)
    try:
        return None if name is None else _told(metadata.distribution(name))
    except metadata.PackageNotFoundError:
        return None


def brought_by(told: Mapping[str, Any]) -> str:
    """The distribution that a certificate's surroundings tell, in words; "" where there is none."""
    own = told["distribution"] or {}
    return " ".join(str(own[name]) for name in ("name", "version") if own.get(name))


def _told(found: metadata.Distribution) -> dict[str, Any]:
    record = found.read_text("RECORD") or ""
    return {
        "name": found.metadata["Name"],
        "version": found.version,
        "record_sha256": hashlib.sha256(record.encode()).hexdigest() if record else "",
        **({"editable": True} if editable_from(found) is not None else {}),
    }
