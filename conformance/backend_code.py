"""Which code a backend has: a digest over the files of the package that holds its class, and the release it is of.

A run that was not finished is gone on with, and pieces of one are put together, only where this is the same.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path

from conformance.certificate.surroundings import PACKAGES, suite_digest
from conformance.contain import SubjectRef, Worker
from conformance.distributions import file_of
from conformance.waivers.release import Release, release_of

SUFFIX = re.compile(
    r"\.(py[xid]?|json|so(\.[0-9]+)*|dll|dylib|c|cc|cpp|cxx|h|hpp|inc|cu|cuh|hip|cl|metal|cubin|ptx|fatbin|hsaco|co|spv)$"
)
"""Of source and of what is compiled or loaded from it."""
MOST_FILES = 20_000
MOST_BYTES = 1 << 30
"""Of a package that are read, in the order of their names; of what is beyond, the digest has names and sizes alone."""
UNRECORDED = "it was made before the backend's code was recorded"
UNKNOWN = "no file of the backend's code is found here"
WORDS = {
    "package": "the backend's package",
    "sha256": "the SHA-256 of its source and compiled files",
    "suite": "the SHA-256 of the suite's own source",
    "distribution": "its distribution",
    "version": "its distribution's version",
}
"""The fields of `code_of`."""


def code_of(worker: Worker, ref: SubjectRef, module: str) -> dict[str, str]:
    """What `Report.code` holds; empty where no file of the backend is found. Nothing of the backend is imported here.

    Args:
        module: of the backend's class; "" where it could not be loaded.
    """
    named = ref.path.partition(":")[0]
    packages = sorted({package_of(each) for each in (module, named) if each})
    digest = _digest(packages)
    if digest is None:
        return {}
    return {"package": ", ".join(packages), "sha256": digest, **_with(release_of(worker, ref))}


def _with(release: Release) -> dict[str, str]:
    return {"suite": suite_digest(), "distribution": release.distribution, "version": release.version}


def is_own(package: str) -> bool:
    """Whether the suite's digest is that of the package, too."""
    return package in PACKAGES


def package_of(module: str) -> str:
    """The package at the top that holds a module; below a namespace, which may be of many distributions, the first that
    is none."""
    parts = module.split(".")
    for depth in range(1, len(parts)):
        name = ".".join(parts[:depth])
        if not _is_namespace(name):
            return name
    return module


def difference(before: Mapping[str, str], other: Mapping[str, str]) -> str:
    """What differs between two records of a backend's code, in words; "" where they are the same."""
    if not before:
        return UNRECORDED
    if not other:
        return UNKNOWN
    return "; ".join(
        f"{words} was {before.get(name, '')[:80]!r}, and is {other.get(name, '')[:80]!r}"
        for name, words in WORDS.items()
        if before.get(name, "") != other.get(name, "")
    )


def _digest(packages: list[str]) -> str | None:
    """Of all of them together, names included."""
    if packages and all(map(is_own, packages)):
        return suite_digest()
    found = hashlib.sha256()
    for package in packages:
        file = file_of(package)
        if file is None:
            return None
        whole = file.name.startswith("__init__.")
        _take(found, _below(file.parent) if whole else [(file.name, file)], package)
    return found.hexdigest() if packages else None


def _take(found: hashlib._Hash, files: Iterable[tuple[str, Path]], package: str) -> None:
    left = MOST_BYTES
    for number, (name, path) in enumerate(files):
        try:
            size = path.stat().st_size
            found.update(f"{package} {name} {size}\n".encode(errors="surrogateescape"))
            if number < MOST_FILES and size <= left:
                left -= size
                with path.open("rb") as file:
                    while part := file.read(1 << 20):
                        found.update(part)
        except OSError as error:  # it is there, and cannot be read
            found.update(f"{package} {name} {type(error).__name__}\n".encode(errors="surrogateescape"))


def _below(folder: Path) -> Iterator[tuple[str, Path]]:
    """The files of a package, by their names in it; no link to a folder is followed."""
    for here, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if name != "__pycache__" and not name.startswith("."))
        for name in sorted(names):
            path = Path(here, name)
            if SUFFIX.search(name) and path.is_file():
                yield path.relative_to(folder).as_posix(), path


def _is_namespace(package: str) -> bool:
    """Whether it has no code of its own, which makes it safe to look below it."""
    try:
        spec = find_spec(package)
    except (ImportError, ValueError, AttributeError):
        return False
    return spec is not None and spec.origin is None and spec.submodule_search_locations is not None
