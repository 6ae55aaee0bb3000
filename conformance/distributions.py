"""The files of a class's modules, and which installed distribution brings them."""

from __future__ import annotations

import inspect
import json
import os
import sys
from collections.abc import Iterator
from importlib.metadata import Distribution, PackagePath, distribution, distributions
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote, urlsplit

HAVE_VERSIONS = {*sys.stdlib_module_names, "torch", "triton"}
"""Packages whose versions every report has."""


def having(package: str) -> list[str]:
    """Distributions that have a package, or module, of the top level: by their own word, else by their files, which
    `importlib.metadata.packages_distributions` of Python 3.10 does not go by."""
    found = set()
    for each in distributions():
        told = (each.read_text("top_level.txt") or "").split()
        if package in (told or map(_top_level, each.files or ())):
            found.add(each.name)
    return sorted(found)


def _top_level(file: PackagePath) -> str | None:
    return file.parts[0] if len(file.parts) > 1 else inspect.getmodulename(file.name)


def bringing(package: str, file: Path) -> Iterator[str]:
    """Distributions that have a file of a package, and those installed as editable from a folder that has it."""
    for name in having(package):
        found = distribution(name)
        own = (entry for entry in found.files or () if entry.name == file.name)
        if any(Path(str(found.locate_file(entry))).resolve() == file for entry in own):
            yield name
    for found in distributions():
        folder = editable_from(found)
        if folder is not None and file.is_relative_to(folder):
            yield found.name


def editable_from(found: Distribution) -> Path | None:
    """The folder that a distribution is installed from, by PEP 610; None where its files were copied."""
    try:
        told = json.loads(found.read_text("direct_url.json") or "null")
        url = urlsplit(told["url"]) if told["dir_info"]["editable"] else None
    except (ValueError, TypeError, KeyError):  # from elsewhere than a folder
        return None
    return Path(unquote(url.path)).resolve() if url is not None and url.scheme == "file" else None


def modules_of(cls: type) -> list[str]:
    """Where a class has its code: the modules of it and its bases, and of their functions, since a class that a call
    has made is told to be of what made it, `abc` say. Python's own, and torch's, which has a version, are left out."""
    found: set[object] = set()
    for each in cls.__mro__:
        held = [value.fget if isinstance(value, property) else value for value in vars(each).values()]
        found |= {getattr(value, "__module__", None) for value in (each, *filter(inspect.isroutine, held))}
    return sorted(
        name for name in found if isinstance(name, str) and name and name.partition(".")[0] not in HAVE_VERSIONS
    )


def origin_of(module: str) -> Path | None:
    """Where it is, as the import path leads to it, found without its import; in an archive, a path that goes on below
    it. What is above the module must be namespaces, or be imported already."""
    loaded = sys.modules.get(module)
    try:
        spec = find_spec(module)
        origin = spec.origin if spec is not None and spec.has_location else None
    except (ImportError, ValueError, AttributeError):  # such as __main__ of a script, which has no spec
        origin = getattr(loaded, "__file__", None)
    return Path(origin).absolute() if origin else None


def file_of(module: str) -> Path | None:
    """As `origin_of`, where that is a file: the very one, whatever links lead to it."""
    origin = origin_of(module)
    return origin.resolve() if origin is not None and os.path.isfile(origin) else None
