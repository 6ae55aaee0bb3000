"""Which code a backend has: a digest over the files of the package that holds its class, and the release it is of.

A run that was not finished is gone on with, and pieces of one are put together, only where this is the same.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

from conformance.certificate.surroundings import PACKAGES, suite_digest
from conformance.contain import SubjectRef, Worker
from conformance.distributions import origin_of
from conformance.waivers.release import release_of
from fp8moe.registry import ENTRY_POINT_GROUP

SUFFIX = re.compile(
    r"\.(py[xidc]?|json|ya?ml|toml|csv|so(\.[0-9]+)*|dll|dylib|bin|c|cc|cpp|cxx|h|hpp|inc|inl|cu|cuh|hip|cl|metal"
    r"|cubin|ptx|fatbin|hsaco|co|spv|ll|bc|s|td|j2|jinja|npy|npz|pt)$"
)
"""Of source, of what is compiled or loaded from it, and of tables that it may read."""
MOST_FILES = 100_000
MOST_BYTES = 4 << 30
"""Of a package that are read, in the order of their names; of what is beyond, the digest has names and sizes alone."""
UNTOLD = (
    "it tells no code of the backend: an earlier fp8moe made it, the code changed while it was run, or it is in no file"
)
UNKNOWN = "no file of the backend's code is found here"
SHOWN = 3
WORDS = {
    "package": "the backend's package",
    "sha256": "the SHA-256 of its source and compiled files",
    "suite": "the SHA-256 of the suite's own source",
    "distribution": "its distribution",
    "version": "its distribution's version",
}
"""The fields of `Code.told`."""


@dataclass(frozen=True)
class Code:
    """Of a backend as it is here.

    Args:
        told: what `Report.code` holds; empty where one of its modules is in no file.
        files: the digest of each, by its package and its name in that; none where the package is the suite's own.
    """

    told: Mapping[str, str] = field(default_factory=dict)
    packages: Sequence[str] = ()
    files: Mapping[str, str] = field(default_factory=dict)

    def changed(self) -> str:
        """Which files are others by now, in words; "" where none is."""
        if not self.told:
            return ""
        now = _digests(self.packages) or {}
        names = sorted(name for name in {*self.files, *now} if self.files.get(name) != now.get(name))
        if suite_digest() != self.told["suite"]:
            names.append("the suite's own source")
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        return ", ".join(names[:SHOWN]) + more


def code_of(worker: Worker, ref: SubjectRef, modules: Iterable[str]) -> Code:
    """Nothing of the backend is imported here.

    Args:
        modules: that its class has its code in, as `conformance.distributions.modules_of` has them.
    """
    release = release_of(worker, ref)
    named = [ref.path.partition(":")[0]] if ref.path else []
    if not ref.path and not ref.pickled:  # a registered one may be put together where its entry point leads to
        named += [
            point.value.partition(":")[0].strip()
            for point in entry_points(group=ENTRY_POINT_GROUP)
            if point.dist is not None and point.dist.name == release.distribution
        ]
    packages = sorted({package_of(each) for each in (*modules, *named) if each})
    packages = [each for each in packages if not is_own(each)] or packages
    files = _digests(packages)
    if files is None:
        return Code()
    lines = "".join(f"{name} {files[name]}\n" for name in sorted(files))
    suite = suite_digest()
    told = {
        "package": ", ".join(packages),
        "sha256": hashlib.sha256(lines.encode(errors="surrogateescape")).hexdigest() if files else suite,
        "suite": suite,
        "distribution": release.distribution,
        "version": release.version,
    }
    return Code(told, packages, files)


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
        return UNTOLD
    if not other:
        return UNKNOWN
    return "; ".join(
        f"{words} was {before.get(name, '')[:80]!r}, and is {other.get(name, '')[:80]!r}"
        for name, words in WORDS.items()
        if before.get(name, "") != other.get(name, "")
    )


def _digests(packages: Sequence[str]) -> dict[str, str] | None:
    """Of every file of packages by their names; none of the suite's own, and None where a package is in no file."""
    found: dict[str, str] = {}
    for package in packages:
        if is_own(package):
            continue
        files = _files_of(package)
        if files is None:
            return None
        left = MOST_BYTES
        for number, (name, path) in enumerate(files):
            try:
                size = path.stat().st_size
                is_read = number < MOST_FILES and size <= left
                left -= size if is_read else 0
                found[f"{package}/{name}"] = _digest(path) if is_read else f"{size} bytes"
            except OSError as error:  # it is there, and cannot be read
                found[f"{package}/{name}"] = type(error).__name__
    return found if packages else None


def _digest(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            found.update(part)
    return found.hexdigest()


def _files_of(package: str) -> Iterable[tuple[str, Path]] | None:
    """Those of a package; of a module right below a namespace, all beside it, since nothing else tells what belongs
    to it; of any other module the file alone, and of what is in an archive the archive."""
    origin = origin_of(package)
    if origin is None:
        return None
    if not os.path.isfile(origin):  # which, as a Path's own does not, takes whatever cannot be looked at for none
        archives = [each for each in origin.parents if os.path.isfile(each)]
        return [(each.name, each) for each in archives] or None
    if origin.name.startswith("__init__.") or "." in package:
        return [*_below(origin.parent), (origin.name, origin)]  # it too has no suffix but its loader's
    return [(origin.name, origin)]


def _below(folder: Path) -> Iterator[tuple[str, Path]]:
    """The files of a package, by their names in it; folders that links lead to are followed, each once."""
    root = folder.resolve()
    seen: set[Path] = set()
    for here, folders, names in os.walk(folder, followlinks=True):
        real = Path(here).resolve()
        if real in seen or (real != root and root.is_relative_to(real)):
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if name != "__pycache__" and not name.startswith("."))
        for name in sorted(names):
            path = Path(here, name)
            if SUFFIX.search(name) and os.path.isfile(path) and not (name.endswith(".pyc") and name[:-1] in names):
                yield path.relative_to(folder).as_posix(), path


def _is_namespace(package: str) -> bool:
    """Whether it has no code of its own, which makes it safe to look below it."""
    try:
        spec = find_spec(package)
    except (ImportError, ValueError, AttributeError):
        return False
    return spec is not None and spec.origin is None and spec.submodule_search_locations is not None
