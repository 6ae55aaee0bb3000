"""Which installed distribution brings a file of a package."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.metadata import Distribution, distribution, distributions, packages_distributions
from pathlib import Path
from urllib.parse import unquote, urlsplit


def bringing(package: str, file: Path) -> Iterator[str]:
    """Distributions that have a file of a package, and those installed as editable from a folder that has it."""
    for name in sorted(set(packages_distributions().get(package, ()))):
        found = distribution(name)
        own = (entry for entry in found.files or () if entry.name == file.name)
        if any(Path(str(found.locate_file(entry))).resolve() == file for entry in own):
            yield name
    for found in distributions():
        folder = _editable_from(found)
        if folder is not None and file.is_relative_to(folder):
            yield found.name


def _editable_from(found: Distribution) -> Path | None:
    """The folder that a distribution is installed from, by PEP 610; None where its files were copied."""
    try:
        told = json.loads(found.read_text("direct_url.json") or "null")
        url = urlsplit(told["url"]) if told["dir_info"]["editable"] else None
    except (ValueError, TypeError, KeyError):  # from elsewhere than a folder
        return None
    return Path(unquote(url.path)).resolve() if url is not None and url.scheme == "file" else None
